"""Client and services over a real port: every call, every refusal, the life of a session."""

import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kvstore.calls import MAX_CELLS_PER_CALL, CellOutcome, Damage
from kvstore.changes import Changes
from kvstore.directory import LOCATE_KEYS_MAX, Announcement
from kvstore.errors import ConfigError, UnavailableError, UsageError
from kvstore.holders import Located
from kvstore.rpc import cache_pb2 as pb
from kvstore.rpc import client as client_module
from kvstore.rpc import wire
from kvstore.rpc.cache_service import CacheService, Context
from kvstore.rpc.client import ControlClient, StaleMap
from tests.served import (
    PAYLOAD_BYTES,
    Served,
    eventually,
    fill,
    put,
    reserve_request,
    some_keys,
    two_nodes,
)


@pytest.fixture
def client(served: Served) -> Iterator[ControlClient]:
    connection = ControlClient(served.address)
    yield connection
    connection.close()


def test_hello_says_who_and_where(served: Served, client: ControlClient) -> None:
    served.call(lambda: served.bulletin.post_map(two_nodes(3)))
    hello = client.hello()
    assert hello.identity == served.node.identity == client.identity
    assert hello.capacity_bytes == 1 << 20
    assert hello.map == two_nodes(3)


def test_a_put_and_a_get(served: Served, client: ControlClient) -> None:
    keys = some_keys(5)
    assert client.lookup(keys, 1) == 0
    put(client, served.node.tier.arena, some_keys(5))
    assert client.lookup(keys, 1) == 5
    assert client.lookup(some_keys(9), 1) == 5
    assert client.lookup(keys, 3) == 0
    acquired = client.acquire(client.session, some_keys(6), np.zeros(6, np.uint8), 1000)
    assert acquired.outcomes.tolist() == [CellOutcome.FOUND] * 5 + [CellOutcome.MISS]
    expected = served.call(lambda: served.node.tier.find(keys, np.zeros(5, np.uint8)))
    for name in ("slots", "generations", "offsets", "lengths", "header_digests"):
        assert getattr(acquired, name)[:5].tolist() == getattr(expected, name).tolist(), name
    assert client.stats().leases == 1
    client.release(client.session, acquired.lease)
    assert client.stats().leases == 0
    assert client.touch(keys, 1) == 5
    assert client.stats() == served.call(served.node.stats)


def test_a_damaged_cell_is_dropped_when_the_node_sees_it_too(
    served: Served, client: ControlClient
) -> None:
    keys, arena = some_keys(2), served.node.tier.arena
    put(client, arena, keys)
    acquired = client.acquire(client.session, keys, np.zeros(2, np.uint8), 1000)
    client.release(client.session, acquired.lease)
    # What these tests write matches no leaf digest: only the first cell's length is told right.
    claims = [
        Damage(key.tobytes(), 0, (size_bytes,))
        for key, size_bytes in zip(keys, (PAYLOAD_BYTES, PAYLOAD_BYTES - 1), strict=True)
    ]
    assert client.discard(claims) == 1
    assert client.lookup(keys[:1], 1) == 0
    assert client.lookup(keys[1:], 1) == 1
    assert client.stats().host.damaged == 1
    with pytest.raises(UsageError, match="over 16"):
        client.discard(claims[:1] * 17)
    with pytest.raises(UsageError, match="whole key"):
        client.discard([Damage(b"short", 0, (PAYLOAD_BYTES,))])


def test_a_second_put_is_present_and_a_commit_repeats(
    served: Served, client: ControlClient
) -> None:
    request = reserve_request(client.session, some_keys(2))
    reply = client.reserve(request)
    digests = fill(served.node.tier.arena, request, reply)
    for _ in range(2):
        outcomes = client.commit(client.session, reply.slots, reply.generations, digests)
        assert outcomes.tolist() == [CellOutcome.STORED] * 2
    assert client.reserve(request).outcomes.tolist() == [CellOutcome.PRESENT] * 2


def test_aborted_slots_are_free_and_abandoned_ones_are_not(
    served: Served, client: ControlClient
) -> None:
    reply = client.reserve(reserve_request(client.session, some_keys(2)))
    client.abort(client.session, reply.slots[:1], reply.generations[:1])
    client.abandon(client.session, reply.slots[1:], reply.generations[1:])
    stats = client.stats().host
    assert (stats.aborted, stats.retired, stats.reserved_cells) == (1, 1, 0)


def test_long_prompts_take_several_calls(served: Served, client: ControlClient) -> None:
    put(client, served.node.tier.arena, some_keys(3))
    mask = (1 << 64) - 1
    assert client.touch(some_keys(wire.PROBES_MAX // 64 + 7), mask) == 3
    assert client.lookup(some_keys(wire.PROBES_MAX + 7), 1) == 3


def test_a_touch_of_a_long_prompt_that_is_part_of_a_put_has_the_stamp_of_that(
    served: Served, client: ControlClient
) -> None:
    keys = some_keys(wire.PROBES_MAX // 64 + 7)
    ends = keys[[0, -1]]
    put(client, served.node.tier.arena, ends)
    client.touch(keys, (1 << 64) - 1, client.session, operation=2)
    client.touch(ends[1:], 1, client.session, operation=3)
    behind = client.reserve(reserve_request(client.session, keys[1:2], operation=2))
    table = served.node.tier.table
    slots = served.call(lambda: table.find(ends, np.zeros(2, np.uint8)).slots)
    first, last = table.slots["stamp"][slots].tolist()
    assert first == int(table.slots["stamp"][behind.slots[0]])
    assert last > first, "another operation came last"


def test_the_start_of_a_long_prompt_never_seems_older_than_its_end(
    served: Served, client: ControlClient
) -> None:
    keys = some_keys(wire.PROBES_MAX // 64 + 7)
    ends = keys[[0, -1]]
    put(client, served.node.tier.arena, ends)
    client.touch(keys, (1 << 64) - 1)
    table = served.node.tier.table
    slots = served.call(lambda: table.find(ends, np.zeros(2, np.uint8)).slots)
    first, last = table.slots["stamp"][slots].tolist()
    assert first > last


def test_too_much_in_one_call_is_the_callers_bug(served: Served, client: ControlClient) -> None:
    keys = some_keys(MAX_CELLS_PER_CALL + 1)
    with pytest.raises(UsageError, match="split the call"):
        client.reserve(reserve_request(client.session, keys))
    with pytest.raises(UsageError, match="split the call"):
        client.acquire(client.session, keys, np.zeros(len(keys), np.uint8), 1000)
    with pytest.raises(UsageError, match="split the call"):
        client.locate(0, some_keys(LOCATE_KEYS_MAX + 1))
    with pytest.raises(UsageError, match="mask"):
        client.lookup(some_keys(1), 0)
    assert client.stats().host.reserved_cells == 0


def test_a_broken_message_is_invalid_and_does_nothing(
    served: Served, client: ControlClient
) -> None:
    with pytest.raises(UsageError, match="cells has 1 bytes instead of 2"):
        client.acquire(client.session, some_keys(2), np.zeros(1, np.uint8), 1000)
    with pytest.raises(UsageError, match="outside any grid"):
        client.acquire(client.session, some_keys(1), np.full(1, 64, np.uint8), 1000)
    assert client.stats().leases == 0


def test_a_client_that_goes_leaves_nothing_reserved(served: Served, client: ControlClient) -> None:
    other = ControlClient(served.address)
    other.reserve(reserve_request(other.session, some_keys(3)))
    assert client.stats().host.reserved_cells == 3
    other.close()
    eventually(lambda: client.stats().host.retired == 3)
    assert client.stats().host.reserved_cells == 0


def test_a_session_that_the_node_ended_is_replaced(served: Served, client: ControlClient) -> None:
    session = client.session
    client.reserve(reserve_request(session, some_keys(1)))
    served.call(lambda: served.node.close_session(session))
    with pytest.raises(UnavailableError, match=f"session {session} has ended"):
        client.acquire(session, some_keys(1), np.zeros(1, np.uint8), 1000)
    eventually(lambda: _opened(client) not in (0, session))
    client.reserve(reserve_request(client.session, some_keys(1)))


def test_silence_ends_a_session(served: Served, client: ControlClient) -> None:
    first = client.session
    served.call(lambda: silence(served, 0.1))
    # Many small steps within one call: beats cannot get in between, and no step is a stall.
    served.call(lambda: silence(served, 2.1))
    assert served.call(lambda: served.node.beat(first)) is False
    eventually(lambda: _opened(client) not in (0, first))


def silence(served: Served, seconds: float) -> None:
    for _ in range(round(seconds * 10)):
        served.clock.advance(0.1)
        served.node.tick()


def _opened(client: ControlClient) -> int:
    try:
        return client.session
    except UnavailableError:
        return 0


def test_the_session_tells_the_news(served: Served, client: ControlClient) -> None:
    assert client.session
    assert (client.map.epoch, client.unreachable) == (0, frozenset())
    served.call(lambda: served.bulletin.post_map(two_nodes(1)))
    eventually(lambda: client.map == two_nodes(1))
    served.call(lambda: served.bulletin.post_unreachable(frozenset({2})))
    eventually(lambda: client.unreachable == {2})
    served.call(lambda: served.bulletin.post_unreachable(frozenset()))
    eventually(lambda: not client.unreachable)


def test_set_map_takes_only_newer_maps(served: Served, client: ControlClient) -> None:
    assert client.set_map(two_nodes(4)) == two_nodes(4)
    assert client.set_map(two_nodes(3)) == two_nodes(4)
    assert served.bulletin.now.map == two_nodes(4)


def test_set_map_takes_no_other_tiers_map(served: Served, client: ControlClient) -> None:
    ours = replace(two_nodes(4), tier_id="ours")
    assert client.set_map(ours) == ours
    assert client.set_map(replace(two_nodes(9), tier_id="theirs")) == ours


def test_locate_and_refute(served: Served, client: ControlClient) -> None:
    client.set_map(two_nodes(2))
    keys, cells = some_keys(3), np.array([0, 1, 1], np.uint8)
    changes = Changes(keys, cells, np.zeros(3, np.uint64), np.ones(3, np.bool_))
    served.call(lambda: served.directory.apply(Announcement(2, 3, 1, 0, Changes.empty())))
    served.call(lambda: served.directory.apply(Announcement(2, 3, 1, 1, changes)))
    located = client.locate(2, some_keys(4))
    assert isinstance(located, Located)
    assert located.counts.tolist() == [1, 1, 1, 0]
    assert located.nodes.tolist() == [2, 2, 2]
    assert located.masks.tolist() == [1, 2, 2]
    client.refute(2, 2, 2, keys[:1], cells[:1])  # of a former life: says nothing of this one
    assert _counts(client) == [1, 1, 1]
    client.refute(2, 2, 3, keys[:2], np.array([0, 0], np.uint8))
    assert _counts(client) == [0, 1, 1]


def _counts(client: ControlClient) -> list[int]:
    located = client.locate(2, some_keys(3))
    assert isinstance(located, Located)
    counts: list[int] = located.counts.tolist()
    return counts


@pytest.mark.parametrize("epoch", [1, 3])
def test_another_map_is_no_miss(client: ControlClient, epoch: int) -> None:
    client.set_map(two_nodes(2))
    assert client.locate(epoch, some_keys(1)) == StaleMap(two_nodes(2))


def test_the_wrong_token_is_a_wrong_setting(folder: Path) -> None:
    served = Served(folder, token="secret")
    try:
        for token in (None, "wrong", ""):
            client = ControlClient(served.address, token)
            with pytest.raises(ConfigError, match="refused the token"):
                client.hello()
            with pytest.raises(UnavailableError, match="no session"):
                _ = client.session
            client.close()
        client = ControlClient(served.address, "secret")
        assert client.session
        assert client.lookup(some_keys(1), 1) == 0
        client.close()
    finally:
        served.stop()


def test_nobody_there_is_unavailable_until_somebody_is(folder: Path) -> None:
    served = Served(folder)
    client = ControlClient(served.address)
    first = client.session
    served.stop()
    with pytest.raises(UnavailableError, match="did not answer"):
        client.stats()
    eventually(lambda: not _opened(client))
    with pytest.raises(UnavailableError, match="no session with"):
        client.reserve(reserve_request(first, some_keys(1)))
    again = Served(folder, port=int(served.address.rpartition(":")[2]))
    eventually(lambda: _opened(client))
    assert client.stats().sessions == 1
    client.close()
    again.stop()


def test_another_incarnation_gets_no_old_descriptors(served: Served, client: ControlClient) -> None:
    session = client.session
    identity = served.node.identity
    object.__setattr__(identity, "incarnation", 8)  # as if the node had restarted
    with pytest.raises(UnavailableError, match="incarnation 8, not 7"):
        client.reserve(reserve_request(session, some_keys(1)))
    eventually(lambda: _opened(client) not in (0, session))
    assert client.identity.incarnation == 8


def test_a_closed_client_is_unavailable_and_leaves_no_thread(served: Served) -> None:
    before = set(threading.enumerate())
    client = ControlClient(served.address)
    assert client.session
    client.close()
    client.close()
    with pytest.raises(UnavailableError, match="was closed"):
        client.stats()
    eventually(lambda: not _session_threads() - before)


@pytest.mark.parametrize("name", ["session", "identity"])
def test_a_client_that_closes_breaks_no_session_off(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """What breaks off costs the node memory for good."""
    ends: list[str] = []
    serve = CacheService.Session

    async def watched(service: CacheService, beats: AsyncIterator[pb.Beat], it: Context) -> None:
        ends.append("broken off")
        await serve(service, beats, it)
        ends[-1] = "ended"

    monkeypatch.setattr(CacheService, "Session", watched)
    monkeypatch.setattr(client_module, "FAREWELL_S", 60.0)
    served = Served(folder)
    for _ in range(20):
        client = ControlClient(served.address)
        assert getattr(client, name)
        client.close()
    served.stop()
    assert "broken off" not in ends
    assert len(ends) == 20 or name == "identity", "who asks no more may be gone before there is one"


def test_closing_is_quick_when_nobody_is_there() -> None:
    client = ControlClient("127.0.0.1:1")
    client.close()
    assert not _session_threads()


def _session_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "samovar-session"}


def test_a_forked_child_gets_a_clear_error(served: Served) -> None:
    command = [sys.executable, "-m", "tests.unit.forked_client", served.address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["UsageError UsageError closed", "1"]


def test_many_threads_share_one_client(served: Served, client: ControlClient) -> None:
    put(client, served.node.tier.arena, some_keys(3))
    found: list[int] = []
    threads = [
        threading.Thread(target=lambda: found.append(client.lookup(some_keys(4), 1)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [3] * 8
