"""Routes into a cluster: one connection per node, bounded first contact, and whose tier it is."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from kvstore import cluster_routes, contacts
from kvstore.clock import ManualClock
from kvstore.cluster_map import ClusterMap, NodeInfo
from kvstore.cluster_routes import ClusterRoutes
from kvstore.errors import UnavailableError
from kvstore.holders import Located
from kvstore.placement import homes
from kvstore.plan import OWN_NODE
from kvstore.rpc.client import ControlClient
from kvstore.sessions import SESSION_DEAD_S
from kvstore.tenants import tenant_digest
from tests.served import Served, eventually, put, some_keys, two_nodes

Away = Callable[[Path], AbstractContextManager[str]]
FOREVER_S = 3600.0
"""Whoever waits so long has no bound: the run ends before."""


@contextmanager
def serving(folder: Path, epoch: int, tier_id: str, port: int = 0) -> Iterator[Served]:
    """A node whose map has itself in it, and another one that is away."""
    folder.mkdir()
    served = Served(folder, port=port)
    nodes = two_nodes(epoch, served.address).nodes
    served.call(lambda: served.bulletin.post_map(ClusterMap(epoch, nodes, tier_id=tier_id)))
    try:
        yield served
    finally:
        served.stop()


@contextmanager
def routes_to(
    served: Served,
    host_id: str,
    call_deadline_s: float = 2.0,
    clock: ManualClock | None = None,
) -> Iterator[ClusterRoutes]:
    clock = clock or ManualClock()
    routes = ClusterRoutes.open(served.address, host_id, None, clock, call_deadline_s)
    try:
        yield routes
    finally:
        routes.close()


def held(routes: ClusterRoutes, number: int) -> bool:
    """Whether the mapped arena holds that key."""
    table = routes.own_table()
    key = some_keys(1, first=number)
    return table is not None and bool(table.find(key, np.zeros(1, np.uint8)).held[0])


def with_others(served: Served, address: str, *indexes: int) -> ClusterMap:
    """A newer map of a node's, with others that are all at one address."""
    others = [
        NodeInfo(index, f"node-{index}", f"host-{index}", 3, address, address, f"/nowhere/{index}")
        for index in indexes
    ]
    return ClusterMap(2, (served.bulletin.now.map.nodes[0], *others), tier_id="tier")


@contextmanager
def stuck(folder: Path) -> Iterator[str]:
    """A node that takes connections and answers nothing."""
    standing, go_on = threading.Event(), threading.Event()

    def stand() -> None:
        standing.set()
        go_on.wait()

    with serving(folder, 1, "tier") as served:
        thread = threading.Thread(target=served.call, args=(stand,))
        thread.start()
        standing.wait()
        try:
            yield served.address
        finally:
            go_on.set()
            thread.join()


@contextmanager
def unanswered(folder: Path) -> Iterator[str]:
    """An address where connections are neither made nor refused: its queue is full."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def test_another_tier_at_the_same_address_is_gone_by(folder: Path) -> None:
    with ExitStack() as stack:
        with serving(folder / "a", 57, "first") as before:
            routes = stack.enter_context(routes_to(before, "host-1"))
            with closing(ControlClient(before.address)) as client:
                put(client, before.node.tier.arena, some_keys(1))
            assert (routes.map.epoch, routes.map.tier_id) == (57, "first")
            assert held(routes, 1)
            port = int(before.address.rpartition(":")[2])
        after = stack.enter_context(serving(folder / "b", 1, "second", port))
        with closing(ControlClient(after.address)) as client:
            put(client, after.node.tier.arena, some_keys(1, first=2))
        eventually(lambda: (routes.map.epoch, routes.map.tier_id) == (1, "second"))
        eventually(lambda: held(routes, 2) and not held(routes, 1))
        found = routes.locate(some_keys(1), np.zeros(1, np.uint64))
        assert not found.counts.any(), "asked by the map that the node goes by"


def test_a_client_of_another_host_has_one_connection_to_its_entry(folder: Path) -> None:
    with ExitStack() as stack:
        opened = mock.Mock(wraps=ControlClient)
        for module in (cluster_routes, contacts):
            stack.enter_context(mock.patch.object(module, "ControlClient", opened))
        served = stack.enter_context(serving(folder / "a", 1, "tier"))
        routes = stack.enter_context(routes_to(served, "elsewhere"))
        assert routes.write_route().transport is routes.transport(1)
        assert routes.access(1) is routes.write_route().access
        addresses = [call.args[0] for call in opened.call_args_list]
    assert addresses.count(served.address) == 1


def test_an_arena_is_not_looked_at_long_after_its_node_was_lost(folder: Path) -> None:
    clock = ManualClock()
    with ExitStack() as stack:
        with serving(folder / "a", 1, "tier") as served:
            routes = stack.enter_context(routes_to(served, "host-1", clock=clock))
            with closing(ControlClient(served.address)) as client:
                put(client, served.node.tier.arena, some_keys(1))
            assert routes.write_route().access.session
            clock.advance(SESSION_DEAD_S + 1.0)
            assert held(routes, 1), "the session is there"
        eventually(lambda: _session(routes) == 0)
        assert held(routes, 1), "it has just been lost"
        clock.advance(SESSION_DEAD_S - 0.1)
        assert held(routes, 1)
        clock.advance(0.2)
        assert not held(routes, 1), "blocks may have been deleted since"
        with pytest.raises(UnavailableError, match="not mapped"):
            routes.transport(OWN_NODE)


def _session(routes: ClusterRoutes) -> int:
    try:
        return routes.access(OWN_NODE).session
    except UnavailableError:
        return 0


def test_who_has_moved_is_hung_up_on_without_making_others_wait(folder: Path) -> None:
    with ExitStack() as stack:
        served = stack.enter_context(serving(folder / "a", 1, "tier"))
        routes = stack.enter_context(routes_to(served, "host-1"))
        before = routes.access(2)
        assert isinstance(before, ControlClient)
        close = before.close

        def slowly() -> None:
            assert routes._contacts._lock.acquire(blocking=False), "held while one is hung up on"
            routes._contacts._lock.release()
            close()

        stack.enter_context(mock.patch.object(before, "close", slowly))
        away = replace(two_nodes(2, served.address).nodes[1], control="127.0.0.1:5", incarnation=4)
        nodes = (served.bulletin.now.map.nodes[0], away)
        served.call(lambda: served.bulletin.post_map(ClusterMap(2, nodes, tier_id="tier")))
        eventually(lambda: routes.map.epoch == 2)
        assert routes.access(2) is not before
        with pytest.raises(UnavailableError, match="was closed"):
            before.stats()


def test_who_has_left_the_map_is_hung_up_on_but_not_amid_a_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_routes, "PARTING_S", 0.01)
    with ExitStack() as stack:
        served, other = (stack.enter_context(serving(folder / n, 1, "tier")) for n in "ab")
        cluster_map = with_others(served, other.address, 2, 3)
        served.call(lambda: served.bulletin.post_map(cluster_map))
        routes = stack.enter_context(routes_to(served, "host-1"))
        eventually(lambda: routes.map.epoch == 2)
        with routes.guarding(2):
            read_from, idle = routes.access(2), routes.access(3)
            assert read_from.session != idle.session
            alone = ClusterMap(3, cluster_map.nodes[:1], tier_id="tier")
            served.call(lambda: served.bulletin.post_map(alone))
            eventually(lambda: routes._contacts.indexes == {2})
            eventually(lambda: read_from.stats().sessions == 1)
        eventually(lambda: not routes._contacts.indexes)
        for left in (read_from, idle):
            with pytest.raises(UnavailableError, match="was closed"):
                left.stats()
        back = replace(cluster_map, epoch=4)
        served.call(lambda: served.bulletin.post_map(back))
        eventually(lambda: routes.map.epoch == 4)
        assert routes.access(2).session, "it is connected to anew"


@pytest.mark.parametrize("leaves", [True, False])
def test_what_a_node_has_told_of_erasures_is_known_when_it_is_gone(
    folder: Path, monkeypatch: pytest.MonkeyPatch, leaves: bool
) -> None:
    monkeypatch.setattr(cluster_routes, "PARTING_S", 0.01)
    tenant = tenant_digest("somebody")
    with ExitStack() as stack:
        served, other = (stack.enter_context(serving(folder / n, 1, "tier")) for n in "ab")
        other.call(lambda: other.node.life.tenants.erase(tenant))
        cluster_map = with_others(served, other.address, 2)
        served.call(lambda: served.bulletin.post_map(cluster_map))
        routes = stack.enter_context(routes_to(served, "host-1"))
        eventually(lambda: routes.map.epoch == 2)
        before = routes.access(2)
        assert before.session
        eventually(lambda: routes.epoch_of(tenant) == 1)
        moved = replace(cluster_map.nodes[1], control="127.0.0.1:5", incarnation=4)
        nodes = (cluster_map.nodes[0], *([] if leaves else [moved]))
        served.call(lambda: served.bulletin.post_map(ClusterMap(3, nodes, tier_id="tier")))
        eventually(lambda: routes.map.epoch == 3)
        if leaves:
            eventually(lambda: not routes._contacts.indexes)
        else:
            assert routes.access(2) is not before
        assert routes.epoch_of(tenant) == 1


@pytest.mark.parametrize("away", [unanswered, stuck])
def test_first_contact_with_a_node_that_does_not_answer_is_short(folder: Path, away: Away) -> None:
    with ExitStack() as stack:
        address = stack.enter_context(away(folder / "b"))
        served = stack.enter_context(serving(folder / "a", 1, "tier"))
        cluster_map = with_others(served, address, 2, 3)
        served.call(lambda: served.bulletin.post_map(cluster_map))
        routes = stack.enter_context(routes_to(served, "host-1", FOREVER_S))
        span = next(s for s in range(64) if set(homes(s, cluster_map)) == {2, 3})
        found = routes.locate(some_keys(1), np.array([span], np.uint64))
        assert not found.counts.any()
        for asked in (2, 3):
            with pytest.raises(UnavailableError, match="failed a moment ago"):
                routes.access(asked)


def test_the_node_that_we_are_connected_to_is_asked_first(folder: Path) -> None:
    with ExitStack() as stack:
        served = stack.enter_context(serving(folder / "a", 1, "tier"))
        cluster_map = with_others(served, "127.0.0.1:1", 2)
        served.call(lambda: served.bulletin.post_map(cluster_map))
        routes = stack.enter_context(routes_to(served, "host-1"))
        eventually(lambda: routes.map.epoch == 2)
        locate = stack.enter_context(mock.patch.object(ControlClient, "locate", autospec=True))
        locate.return_value = Located.nothing(8)
        spans = np.arange(8, dtype=np.uint64)
        assert {homes(int(span), cluster_map)[0] for span in spans} == {1, 2}
        routes.locate(some_keys(8), spans)
        assert [call.args[0] for call in locate.call_args_list] == [routes.access(1)]


@pytest.mark.parametrize("away", [unanswered, stuck])
def test_first_contact_for_a_session_is_short(folder: Path, away: Away) -> None:
    with away(folder / "b") as address:
        client = ControlClient(address, deadline_s=FOREVER_S, contact_s=0.01)
        with closing(client):
            with pytest.raises(UnavailableError, match="no session"):
                assert client.session
            with pytest.raises(UnavailableError, match="did not answer"):
                client.lookup(some_keys(1), 1)
