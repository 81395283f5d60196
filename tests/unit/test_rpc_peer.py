"""Node to node: announcements, heartbeats, and the map on request."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import grpc
import numpy as np

from kvstore.burials import BurialDigest
from kvstore.changes import Changes
from kvstore.cluster_map import ClusterMap
from kvstore.directory import Announcement, Answer, Reception
from kvstore.membership import Heartbeat
from kvstore.rpc import cache_pb2, cluster_pb2, convert
from kvstore.rpc.bulletin import Bulletin, Notice
from kvstore.rpc.cache_pb2_grpc import CacheStub
from kvstore.rpc.cluster_pb2_grpc import ClusterStub
from kvstore.rpc.life_messages import Books
from kvstore.rpc.peer import Echo, Peer
from kvstore.rpc.wire import WIRE_VERSION
from kvstore.tenants import EpochDigest
from tests.served import BOOKS, Served, some_keys, two_nodes

Value = TypeVar("Value")
MINE = Books(BurialDigest(2, (1 << 64) - 1), EpochDigest(1, 1 << 63))


def with_peer(
    address: str, talk: Callable[[Peer], Awaitable[Value]], token: str | None = None
) -> Value:
    async def run() -> Value:
        peer = Peer(address, token)
        try:
            return await talk(peer)
        finally:
            await peer.close()

    return asyncio.run(run())


def announcement() -> Announcement:
    return Announcement(2, 3, 1, 0, Changes.empty())


def test_an_announcement_is_applied_and_answered(served: Served) -> None:
    served.call(lambda: served.bulletin.post_map(two_nodes(2)))
    keys = some_keys(2)
    changes = Changes(keys, np.zeros(2, np.uint8), np.zeros(2, np.uint64), np.ones(2, np.bool_))

    async def talk(peer: Peer) -> list[Answer | ClusterMap | None]:
        parts = [announcement(), Announcement(2, 3, 1, 1, changes)]
        return [await peer.announce(part, map_epoch=2) for part in parts]

    first, second = with_peer(served.address, talk)
    assert isinstance(first, Answer)
    assert isinstance(second, Answer)
    assert (first.reception, first.expected) == (Reception.APPLIED, 1)
    assert second.digest == served.call(lambda: served.directory.digest(2))
    assert second.digest.cells == 2


def test_an_announcement_under_another_map_is_not_applied(served: Served) -> None:
    served.call(lambda: served.bulletin.post_map(two_nodes(2)))
    answer = with_peer(served.address, lambda peer: peer.announce(announcement(), map_epoch=1))
    assert answer == two_nodes(2)
    assert served.call(lambda: served.directory.digest(2)).cells == 0


def test_a_heartbeat_is_answered_with_one_and_a_newer_map(served: Served) -> None:
    served.call(lambda: served.bulletin.post_map(two_nodes(2)))
    beat = Heartbeat(2, 3, 1, ((1, 7),))
    echo = with_peer(served.address, lambda peer: peer.beat(beat, MINE, 5.0))
    assert (served.follower.heard, served.follower.heard_books) == ([beat], [MINE])
    assert echo == Echo(Heartbeat(1, 7, 2, ((3, 2),)), 2, two_nodes(2), BOOKS)
    beat = Heartbeat(2, 3, 2, ())
    echo = with_peer(served.address, lambda peer: peer.beat(beat, MINE, 5.0))
    assert echo == Echo(Heartbeat(1, 7, 2, ((3, 2),)), 2, None, BOOKS)


def test_a_map_is_handed_on(served: Served) -> None:
    for cluster_map in (two_nodes(3), two_nodes(2)):
        theirs = with_peer(served.address, partial(hand_on, cluster_map))
        assert theirs == served.bulletin.now.map == two_nodes(3)
    served.stop()
    assert with_peer(served.address, partial(hand_on, two_nodes(4))) is None


async def hand_on(cluster_map: ClusterMap, peer: Peer) -> ClusterMap | None:
    return await peer.hand_on(cluster_map, 5.0)


def test_who_does_not_answer_or_refuses_is_none(folder: Path) -> None:
    served = Served(folder, token="secret")
    address = served.address
    beat = Heartbeat(2, 3, 1, ())
    for token in (None, "wrong"):
        assert with_peer(address, lambda peer: peer.beat(beat, MINE, 5.0), token) is None
    served.stop()
    assert with_peer(address, lambda peer: peer.beat(beat, MINE, 5.0), "secret") is None
    assert with_peer(address, lambda peer: peer.announce(announcement(), 1), "secret") is None


def test_the_map_on_request_and_as_it_changes(served: Served) -> None:
    with grpc.insecure_channel(served.address) as channel:
        stub = ClusterStub(channel)
        reply = stub.GetMap(cluster_pb2.GetMapRequest(), timeout=5)
        assert reply.verdict.outcome == cluster_pb2.DONE
        assert convert.map_from_message(reply.map) == ClusterMap(0, ())
        stream = stub.WatchMap(cluster_pb2.GetMapRequest(), timeout=5)
        assert next(stream).map.epoch == 0
        for epoch in (3, 5):
            served.call(partial(served.bulletin.post_map, two_nodes(epoch)))
            assert convert.map_from_message(next(stream).map) == two_nodes(epoch)
        stream.cancel()


def test_another_wire_version_is_refused_by_name(served: Served) -> None:
    with grpc.insecure_channel(served.address) as channel:
        request = cache_pb2.HelloRequest(wire_version=WIRE_VERSION + 1)
        verdict = CacheStub(channel).Hello(request, timeout=5).verdict
    assert verdict.outcome == cluster_pb2.INVALID
    assert f"wire version {WIRE_VERSION}, you {WIRE_VERSION + 1}" in verdict.detail


def test_a_map_that_cannot_be_is_refused(served: Served) -> None:
    message = convert.map_to_message(two_nodes(4))
    message.nodes[0].index = 9
    with grpc.insecure_channel(served.address) as channel:
        request = cluster_pb2.SetMapRequest(map=message)
        reply = ClusterStub(channel).SetMap(request, timeout=5)
    assert reply.verdict.outcome == cluster_pb2.INVALID
    assert served.bulletin.now.map.epoch == 0


def test_slow_listeners_skip_what_was_overtaken() -> None:
    async def listen() -> list[Notice]:
        bulletin = Bulletin(ClusterMap(0, ()))
        notices: AsyncIterator[Notice] = bulletin.notices()
        heard = [await anext(notices)]
        bulletin.post_map(two_nodes(1))
        bulletin.post_map(two_nodes(2))
        bulletin.post_unreachable(frozenset({2}))
        heard.append(await anext(notices))
        waiting = asyncio.ensure_future(anext(notices))
        await asyncio.sleep(0)
        assert not waiting.done()
        assert not bulletin.post_map(two_nodes(2))
        bulletin.post_unreachable(frozenset({2}))
        await asyncio.sleep(0)
        assert not waiting.done()
        bulletin.post_unreachable(frozenset())
        heard.append(await waiting)
        return heard

    heard = asyncio.run(listen())
    assert [(n.map.epoch, n.unreachable) for n in heard] == [
        (0, frozenset()),
        (2, frozenset({2})),
        (2, frozenset()),
    ]
