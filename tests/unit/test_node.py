"""A node's authority: sessions, reservations, leases, and an explicit outcome for everything."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest

from kvstore import leases as leases_module
from kvstore import sessions as sessions_module
from kvstore import suspects as suspects_module
from kvstore.arena import Arena
from kvstore.block import HEADER_BYTES
from kvstore.calls import (
    MAX_CELLS_PER_CALL,
    CellOutcome,
    Damage,
    NodeIdentity,
    ReserveReply,
)
from kvstore.cell import BLOCK_TOKENS_MAX, CELL_BYTES_MAX, CELLS_MAX
from kvstore.clock import ManualClock
from kvstore.errors import UsageError
from kvstore.fs import LinuxFileSystem
from kvstore.leases import LEASE_MARGIN_S, LEASE_MS_MAX
from kvstore.node import Node
from kvstore.sessions import (
    OPERATIONS_PER_SESSION_MAX,
    RESERVATION_S_MAX,
    SESSION_DEAD_S,
    STALL_S,
)
from kvstore.table import WAYS, buckets_of
from kvstore.tiers.host import HostTier
from kvstore.tiers.tier import NewCell, Refusal
from tests.faults import FaultyFileSystem
from tests.worlds import (
    PAGE,
    cells_of,
    holds,
    key_number,
    new_cell,
    packed,
    request_for,
    shared_folder,
    small_tier,
    write_cell,
)

PAGES = 16
Outcome = CellOutcome


@dataclass
class World:
    clock: ManualClock
    fs: FaultyFileSystem
    tier: HostTier
    node: Node
    operation: int = 0

    def reserve(self, session: int, cells: list[NewCell], operation: int = 0) -> ReserveReply:
        self.operation += 1
        return self.node.reserve(request_for(session, operation or self.operation, cells))

    def put(self, session: int, cells: list[NewCell]) -> list[int]:
        """Store cells as a client does; the outcomes of reserving or else committing them."""
        reply = self.reserve(session, cells)
        outcomes: list[int] = reply.outcomes.tolist()
        for row, new in enumerate(cells):
            if outcomes[row] == Outcome.RESERVED:
                digest = write_cell(self.tier.arena, int(reply.offsets[row]), new)
                outcomes[row] = self.commit(session, reply, [row], [digest])[0]
        return outcomes

    def commit(
        self, session: int, reply: ReserveReply, rows: list[int], digests: list[int]
    ) -> list[int]:
        packed_digests = np.array(digests, np.uint64)
        slots, generations = reply.slots[rows], reply.generations[rows]
        outcomes: list[int] = self.node.commit(session, slots, generations, packed_digests).tolist()
        return outcomes

    def pass_time(self, seconds: float, beating: tuple[int, ...] = ()) -> None:
        for _ in range(round(seconds * 10)):
            self.clock.advance(0.1)
            assert all(self.node.beat(session) for session in beating)
            self.node.tick()


@pytest.fixture
def world() -> Iterator[World]:
    with shared_folder() as folder:
        clock, fs = ManualClock(), FaultyFileSystem(LinuxFileSystem())
        tier = small_tier(fs, clock, folder, PAGES, slots=32)
        yield World(clock, fs, tier, Node(NodeIdentity("n", 1, "h", str(folder)), tier, clock))


def keys(*numbers: int) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    return packed([key_number(number) for number in numbers])


def test_a_put_is_found_and_the_second_one_is_present(world: World) -> None:
    session = world.node.open_session()
    cells = [new_cell(number, depth=number) for number in range(4)]
    assert world.put(session, cells) == [Outcome.STORED] * 4
    assert world.put(session, cells) == [Outcome.PRESENT] * 4
    assert world.node.lookup(keys(0, 1, 2, 3), 1) == 4
    assert world.node.lookup(keys(0, 9, 2), 1) == 1
    assert world.node.lookup(keys(9), 1) == 0
    assert world.node.lookup(keys(), 1) == 0


def test_a_block_is_there_when_all_cells_of_the_mask_are(world: World) -> None:
    session = world.node.open_session()
    world.put(session, [new_cell(1, cell=c) for c in (0, 1, 63)] + [new_cell(2, cell=0)])
    assert world.node.lookup(keys(1, 2), 0b1) == 2
    assert world.node.lookup(keys(1, 2), 0b11) == 1
    assert world.node.lookup(keys(1), 1 << 63 | 0b11) == 1
    assert world.node.lookup(keys(1), 0b111) == 0


@pytest.mark.parametrize("mask", [0, -1, 1 << CELLS_MAX])
def test_masks_that_name_no_cell_are_a_callers_bug(world: World, mask: int) -> None:
    with pytest.raises(UsageError, match="mask"):
        world.node.lookup(keys(1), mask)
    with pytest.raises(UsageError, match="mask"):
        world.node.touch(keys(1), mask)


def test_an_unknown_session_changes_nothing(world: World) -> None:
    session = world.node.open_session()
    reply = world.reserve(session, [new_cell(1)])
    assert not world.node.beat(99)
    world.node.close_session(99)
    refused = world.reserve(99, [new_cell(2)])
    assert refused.outcomes.tolist() == [Outcome.REFUSED]
    assert refused.refusals.tolist() == [Refusal.SESSION]
    assert world.commit(99, reply, [0], [0]) == [Outcome.LOST]
    world.node.abort(99, reply.slots, reply.generations)
    world.node.abandon(99, reply.slots, reply.generations)
    assert world.reserve(session, [new_cell(1)]).outcomes.tolist() == [Outcome.BUSY]
    world.put(session, [new_cell(3)])
    stranger = world.node.acquire(99, keys(3, 4), cells_of(0, 0), 1000)
    assert stranger.outcomes.tolist() == [Outcome.REFUSED] * 2, "a miss would be a lie"
    assert world.node.stats().leases == 0


def test_sessions_are_numbered_and_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions_module, "SESSIONS_MAX", 3)
    sessions = [world.node.open_session() for _ in range(4)]
    assert len(set(sessions[:3])) == 3
    assert sessions[3] == 0
    world.node.close_session(sessions[0])
    assert world.node.open_session() not in (*sessions, 0)


def test_the_first_of_two_writers_has_it_until_it_dies(world: World) -> None:
    first, second = world.node.open_session(), world.node.open_session()
    reply = world.reserve(first, [new_cell(1)])
    assert world.put(second, [new_cell(1)]) == [Outcome.BUSY]
    digest = write_cell(world.tier.arena, int(reply.offsets[0]), new_cell(1))
    world.pass_time(SESSION_DEAD_S, beating=(second,))
    assert world.put(second, [new_cell(1)]) == [Outcome.STORED], "not stuck"
    assert world.commit(first, reply, [0], [digest]) == [Outcome.LOST]
    assert world.node.stats().sessions == 1
    assert world.node.stats().host.retired == 1
    assert holds(world.tier, new_cell(1))


def test_a_session_lives_while_it_beats(world: World) -> None:
    quiet, lively = world.node.open_session(), world.node.open_session()
    world.pass_time(SESSION_DEAD_S - 0.1, beating=(lively,))
    assert world.node.beat(quiet)
    world.pass_time(SESSION_DEAD_S + 0.1, beating=(lively,))
    assert not world.node.beat(quiet)


def test_nobody_dies_because_the_node_stood_still(world: World) -> None:
    session = world.node.open_session()
    world.put(session, [new_cell(1)])
    assert world.node.acquire(session, keys(1), cells_of(0), 1000).lease
    world.pass_time(0.1)
    world.clock.advance(60)
    world.node.tick()
    assert world.node.stats().leases == 1
    assert world.node.beat(session)


@pytest.mark.parametrize("apart_s", [STALL_S, 2 * STALL_S, 60.0])
def test_a_node_that_is_always_late_ends_what_is_over_all_the_same(
    world: World, apart_s: float
) -> None:
    session = world.node.open_session()
    world.put(session, [new_cell(1)])
    assert world.node.acquire(session, keys(1), cells_of(0), 1000).lease
    for _ in range(int(SESSION_DEAD_S / STALL_S)):
        assert world.node.stats().sessions == 1
        world.clock.advance(apart_s)
        world.node.tick()
    assert not world.node.beat(session)
    assert world.node.stats().leases == 0


def test_commit_is_idempotent(world: World) -> None:
    session = world.node.open_session()
    reply = world.reserve(session, [new_cell(1)])
    digest = write_cell(world.tier.arena, int(reply.offsets[0]), new_cell(1))
    assert world.commit(session, reply, [0, 0], [digest, digest]) == [Outcome.STORED] * 2
    assert world.commit(session, reply, [0], [digest]) == [Outcome.STORED]
    assert len(world.node.drain_changes()) == 1
    world.tier.evict(int(reply.slots[0]))
    assert world.commit(session, reply, [0], [digest]) == [Outcome.LOST]


def test_damaged_cells_are_said_to_be(world: World) -> None:
    session = world.node.open_session()
    reply = world.reserve(session, [new_cell(1)])
    write_cell(world.tier.arena, int(reply.offsets[0]), new_cell(2))
    assert world.commit(session, reply, [0], [1]) == [Outcome.DAMAGED]
    assert world.put(session, [new_cell(1)]) == [Outcome.STORED]


@pytest.mark.parametrize("word", ["abort", "abandon"])
def test_giving_up_twice_or_what_is_not_ones_own_is_harmless(world: World, word: str) -> None:
    session, other = world.node.open_session(), world.node.open_session()
    reply = world.reserve(session, [new_cell(1)])
    twice = np.repeat(reply.slots, 2), np.repeat(reply.generations, 2)
    give_up = getattr(world.node, word)
    give_up(other, *twice)
    assert world.node.stats().host.reserved_cells == 1
    give_up(session, twice[0], twice[1] + np.uint64(1))
    give_up(session, np.array([4_000_000], np.uint32), reply.generations)
    assert world.node.stats().host.reserved_cells == 1
    give_up(session, *twice)
    give_up(session, *twice)
    host = world.node.stats().host
    assert (host.reserved_cells, host.aborted, host.retired) == (
        (0, 1, 0) if word == "abort" else (0, 0, 1)
    )
    world.node.close_session(session)
    assert world.node.stats().host.retired == host.retired


def test_the_same_cell_twice_in_one_call(world: World) -> None:
    session = world.node.open_session()
    new = new_cell(1, ttl_s=1)
    assert world.reserve(session, [new, new]).outcomes.tolist() == [Outcome.RESERVED, Outcome.BUSY]
    world.put(session, [new_cell(2, ttl_s=1)])
    world.clock.advance(2)
    outcomes = world.reserve(session, [new_cell(2), new_cell(2)]).outcomes.tolist()
    assert outcomes == [Outcome.RESERVED, Outcome.BUSY]
    assert world.node.stats().host.expired == 1


def test_a_lease_keeps_its_cells_and_ends(world: World) -> None:
    session = world.node.open_session()
    world.put(session, [new_cell(number) for number in range(8)])
    found = world.node.acquire(session, keys(0, 99, 1), cells_of(0, 0, 0), 1000)
    assert found.outcomes.tolist() == [Outcome.FOUND, Outcome.MISS, Outcome.FOUND]
    world.put(session, [new_cell(number) for number in range(10, 18)])
    assert world.node.lookup(keys(0, 1), 1) == 2
    world.node.release(99, found.lease)
    world.node.release(session, found.lease + 1)
    assert world.node.stats().leases == 1
    world.node.release(session, found.lease)
    world.node.release(session, found.lease)
    assert world.node.stats().leases == 0
    world.put(session, [new_cell(number) for number in range(20, 28)])
    assert world.node.lookup(keys(0), 1) == 0


@pytest.mark.parametrize(
    ("asked_ms", "lives_s"), [(1000, 1.0), (0, 0.0), (10 * LEASE_MS_MAX, LEASE_MS_MAX / 1000)]
)
def test_a_lease_outlives_what_its_reader_believes(
    world: World, asked_ms: int, lives_s: float
) -> None:
    session = world.node.open_session()
    world.put(session, [new_cell(1)])
    assert world.node.acquire(session, keys(1), cells_of(0), asked_ms).lease
    world.pass_time(lives_s + LEASE_MARGIN_S - 0.1, beating=(session,))
    assert world.node.stats().leases == 1
    world.pass_time(0.2, beating=(session,))
    assert world.node.stats().leases == 0


def test_one_session_never_leases_the_whole_tier(world: World) -> None:
    greedy, other = world.node.open_session(), world.node.open_session()
    world.put(greedy, [new_cell(number) for number in range(8)])
    reply = world.node.acquire(greedy, keys(*range(8), 99), cells_of(*[0] * 9), LEASE_MS_MAX)
    half = [Outcome.FOUND] * 4 + [Outcome.REFUSED] * 4
    assert reply.outcomes.tolist() == [*half, Outcome.MISS]
    again = world.node.acquire(greedy, keys(0, 7), cells_of(0, 0), 1000)
    assert again.outcomes.tolist() == [Outcome.FOUND, Outcome.REFUSED], "its own cost nothing more"
    refused = world.node.acquire(greedy, keys(7), cells_of(0), 1000)
    assert (refused.lease, refused.outcomes.tolist()) == (0, [Outcome.REFUSED])
    assert world.put(other, [new_cell(20 + number) for number in range(4)]) == [Outcome.STORED] * 4
    world.node.release(greedy, reply.lease)
    outcomes = world.node.acquire(greedy, keys(20, 21, 22), cells_of(0, 0, 0), 1000).outcomes
    assert outcomes.tolist() == [Outcome.FOUND] * 3
    world.node.close_session(greedy)
    assert world.node.stats().leases == 0


def test_leases_of_a_session_are_counted(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases_module, "LEASES_PER_SESSION_MAX", 2)
    session, other = world.node.open_session(), world.node.open_session()
    world.put(session, [new_cell(1)])
    replies = [world.node.acquire(session, keys(1), cells_of(0), 1000) for _ in range(3)]
    outcomes = [reply.outcomes.tolist() for reply in replies]
    assert outcomes == [[Outcome.FOUND], [Outcome.FOUND], [Outcome.REFUSED]]
    assert world.node.acquire(other, keys(1), cells_of(0), 1000).lease
    world.node.release(session, replies[0].lease)
    assert world.node.acquire(session, keys(1), cells_of(0), 1000).lease


def test_a_commit_whose_place_is_taken_by_readers_is_refused(world: World) -> None:
    """All entries where the key could go are those of leased cells: that is no damage."""
    with shared_folder() as folder:
        tier = small_tier(world.fs, world.clock, folder, pages=64, slots=17)
        node = Node(NodeIdentity("n", 1, "h", str(folder)), tier, world.clock)
        small = World(world.clock, world.fs, tier, node)
        session, readers = node.open_session(), [node.open_session() for _ in range(3)]
        new, rivals = crowded(tier)
        reply = small.reserve(session, [new])
        digest = write_cell(tier.arena, int(reply.offsets[0]), new)
        assert small.put(session, rivals) == [Outcome.STORED] * len(rivals)
        for reader, start in zip(readers, range(0, 16, 6), strict=True):
            some = [one.key for one in rivals[start : start + 6]]
            assert node.acquire(reader, packed(some), cells_of(*[0] * len(some)), 1000).lease
        assert small.commit(session, reply, [0], [digest]) == [Outcome.REFUSED]
        node.close_session(readers[0])
        assert small.put(session, [new]) == [Outcome.STORED], "its memory is used again"


def crowded(tier: HostTier) -> tuple[NewCell, list[NewCell]]:
    """A cell, and the fewest others that fill both its buckets."""
    table = tier.table
    words = packed([key_number(0)]).view("<u8")
    buckets = [int(b[0]) for b in buckets_of(words, cells_of(0), table._bucket_count)]
    assert buckets[0] != buckets[1]
    rivals: list[NewCell] = []
    room = dict.fromkeys(buckets, WAYS)
    for number in range(1, 10_000):
        words = packed([key_number(number)]).view("<u8")
        mine = [int(b[0]) for b in buckets_of(words, cells_of(0), table._bucket_count)]
        if mine[0] == mine[1] and room.get(mine[0]):
            room[mine[0]] -= 1
            rivals.append(new_cell(number))
        if not any(room.values()):
            return new_cell(0), rivals
    pytest.fail("no such keys")


def test_leases_end_with_their_session(world: World) -> None:
    session = world.node.open_session()
    world.put(session, [new_cell(1)])
    for _ in range(3):
        world.node.acquire(session, keys(1, 1), cells_of(0, 0), 60_000)
    world.node.close_session(session)
    assert world.node.stats().leases == 0
    world.tier.evict(int(world.tier.held_slots()[0]))


def test_what_was_read_without_a_word_stays_when_something_has_to_go(world: World) -> None:
    session = world.node.open_session()
    for number in range(PAGES // 2):
        assert world.put(session, [new_cell(number)]) == [Outcome.STORED]
    found = world.tier.find(keys(0, 1), cells_of(0, 0))
    world.tier.uses.note(found.slots, world.tier.uses.begin())
    for number in range(100, 104):
        assert world.put(session, [new_cell(number)]) == [Outcome.STORED]
    assert [world.node.lookup(keys(n), 1) for n in range(8)] == [1, 1, 0, 0, 0, 0, 1, 1]


def test_a_note_slides_what_expires_and_means_nothing_for_a_slot_that_is_free(
    world: World,
) -> None:
    session = world.node.open_session()
    assert (
        world.put(session, [new_cell(1, ttl_s=10), new_cell(2, ttl_s=10)]) == [Outcome.STORED] * 2
    )
    slots = world.tier.find(keys(1, 2), cells_of(0, 0)).slots
    world.tier.evict(int(slots[1]))
    world.clock.advance(8)
    world.node.beat(session)
    world.tier.uses.note(slots, world.tier.uses.begin())
    world.node.tick()
    world.clock.advance(8)
    assert world.tier.find(keys(1, 2), cells_of(0, 0)).held.tolist() == [True, False]
    world.clock.advance(3)
    assert world.tier.find(keys(1), cells_of(0)).held.tolist() == [False]


def test_looking_up_neither_pins_nor_touches(world: World) -> None:
    session = world.node.open_session()
    world.put(session, [new_cell(0)])
    world.put(session, [new_cell(number) for number in range(1, 8)])
    world.node.lookup(keys(0), 1)
    world.put(session, [new_cell(8)])
    assert world.node.lookup(keys(0), 1) == 0
    assert world.node.touch(keys(1, 99), 1) == 1
    world.put(session, [new_cell(9)])
    assert world.node.lookup(keys(1), 1) == 1


def test_a_put_of_what_is_there_is_a_use(world: World) -> None:
    session = world.node.open_session()
    for number in range(8):
        world.put(session, [new_cell(number)])
    world.put(session, [new_cell(0)])
    world.put(session, [new_cell(8)])
    assert [world.node.lookup(keys(n), 1) for n in (0, 1)] == [1, 0]


def test_what_is_damaged_under_a_lease_is_discarded_after_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suspects_module, "SUSPECTS_MAX", 2)
    session = world.node.open_session()
    world.put(session, [new_cell(number) for number in range(4)])
    reply = world.node.acquire(session, keys(*range(4)), cells_of(*[0] * 4), 1000)
    assert (reply.outcomes == Outcome.FOUND).all()
    for row in (0, 1, 3):
        world.tier.arena.view(int(reply.offsets[row]) + HEADER_BYTES + 9, 1)[:] ^= 1
    lengths = tuple(reply.lengths[:1].tolist())
    claims = [Damage(key_number(row), 0, lengths) for row in range(4)]
    for claim in claims[1:]:
        assert world.node.discard([claim, claim]) == 0
    world.node.tick()
    assert world.node.lookup(keys(*range(4)), 1) == 4
    world.node.release(session, reply.lease)
    world.node.tick()
    assert [world.node.lookup(keys(n), 1) for n in range(4)] == [1, 0, 1, 1], "one was too many"
    assert world.node.stats().host.damaged == 1
    world.put(session, [new_cell(1)])
    world.node.tick()
    assert world.node.lookup(keys(1), 1) == 1, "it is forgotten"


def test_only_what_is_damaged_is_discarded(world: World) -> None:
    session = world.node.open_session()
    world.put(session, [new_cell(1), new_cell(2), new_cell(3)])
    reply = world.node.acquire(session, keys(1, 2, 3), cells_of(0, 0, 0), 1000)
    lengths = tuple(reply.lengths[:1].tolist())
    for row in (0, 1):
        world.tier.arena.view(int(reply.offsets[row]) + HEADER_BYTES + 9, 1)[:] ^= 1
    claims = [Damage(key_number(1 + row), 0, lengths) for row in range(3)]
    assert world.node.discard(claims) == 0, "under a lease"
    world.node.release(session, reply.lease)
    world.node.drain_changes()
    wrong = [
        Damage(key_number(1), 1, lengths),
        Damage(key_number(1), 0, ()),
        Damage(key_number(1), 0, (1, lengths[0] - 1)),
        Damage(key_number(9), 0, lengths),
    ]
    assert world.node.discard(wrong) == 0
    assert world.node.discard([claims[0], claims[0], claims[2]]) == 1
    assert [world.node.lookup(keys(n), 1) for n in (1, 2, 3)] == [0, 1, 1]
    assert world.node.drain_changes().added.tolist() == [False]
    assert world.put(session, [new_cell(1)]) == [Outcome.STORED]


def test_all_calls_of_one_put_are_one_use(world: World) -> None:
    session = world.node.open_session()
    for number in range(8):
        reply = world.reserve(session, [new_cell(number, depth=number)], operation=5)
        digest = write_cell(world.tier.arena, int(reply.offsets[0]), new_cell(number, depth=number))
        assert world.commit(session, reply, [0], [digest]) == [Outcome.STORED]
    world.put(session, [new_cell(50, pages=3)])
    held = [n for n in range(8) if world.node.lookup(keys(n), 1)]
    assert held == list(range(6)), "eaten from the tail"


def test_a_put_does_not_evict_what_it_has_touched(world: World) -> None:
    session, other = world.node.open_session(), world.node.open_session()
    world.put(session, [new_cell(0)])
    world.reserve(other, [new_cell(number) for number in range(10, 15)])
    assert world.node.touch(keys(0), 1, session, operation=5) == 1
    prompt = [new_cell(number, depth=number) for number in range(1, 4)]
    reply = world.reserve(session, prompt, operation=5)
    assert reply.outcomes.tolist() == [Outcome.RESERVED, Outcome.RESERVED, Outcome.REFUSED]
    assert world.node.lookup(keys(0), 1) == 1


def test_puts_of_one_session_at_the_same_time_keep_what_is_their_own(world: World) -> None:
    session = world.node.open_session()
    world.put(session, [new_cell(50, pages=7)])
    for number in range(4):
        new = new_cell(number, depth=number)
        reply = world.reserve(session, [new], operation=5)
        digest = write_cell(world.tier.arena, int(reply.offsets[0]), new)
        assert world.commit(session, reply, [0], [digest]) == [Outcome.STORED]
        world.reserve(session, [new_cell(20 + number)], operation=6)
    reply = world.reserve(session, [new_cell(4, depth=4)], operation=5)
    assert reply.refusals.tolist() == [Refusal.NO_ROOM]
    assert world.node.lookup(keys(0, 1, 2, 3), 1) == 4


def test_a_put_that_many_others_came_after_goes_on_with_a_newer_stamp(world: World) -> None:
    session = world.node.open_session()

    def stamp_of(operation: int) -> int:
        reply = world.reserve(session, [new_cell(0)], operation)
        world.node.abort(session, reply.slots, reply.generations)
        return int(world.tier.table.slots["stamp"][reply.slots[0]])

    first, second, *others = (stamp_of(1 + n) for n in range(OPERATIONS_PER_SESSION_MAX))
    assert first < second < min(others)
    assert stamp_of(1) == first
    newest = stamp_of(1 + OPERATIONS_PER_SESSION_MAX)
    assert stamp_of(1) == first, "its last call came after those of the others"
    assert stamp_of(2) > newest


def test_a_touch_of_a_session_that_is_over_has_a_stamp_of_its_own(world: World) -> None:
    session = world.node.open_session()
    for number in range(8):
        world.put(session, [new_cell(number)])
    world.node.close_session(session)
    assert world.node.touch(keys(0), 1, session, world.operation) == 1
    world.put(world.node.open_session(), [new_cell(8)])
    assert [world.node.lookup(keys(n), 1) for n in (0, 1)] == [1, 0]


@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        ({"cell": CELLS_MAX}, Refusal.BAD_REQUEST),
        ({"tokens": 0}, Refusal.BAD_REQUEST),
        ({"tokens": BLOCK_TOKENS_MAX + 1}, Refusal.BAD_REQUEST),
        ({"length": 0}, Refusal.BAD_REQUEST),
        ({"length": CELL_BYTES_MAX + 1}, Refusal.BAD_REQUEST),
        ({"key": bytes(32)}, Refusal.BAD_REQUEST),
        ({"length": PAGES * PAGE}, Refusal.TOO_LARGE),
    ],
)
def test_impossible_cells_are_refused_alone(
    world: World, change: dict[str, object], refusal: Refusal
) -> None:
    session = world.node.open_session()
    fields = {name: getattr(new_cell(1), name) for name in NewCell.__dataclass_fields__}
    reply = world.reserve(session, [NewCell(**(fields | change)), new_cell(2)])
    assert reply.outcomes.tolist() == [Outcome.REFUSED, Outcome.RESERVED]
    assert reply.refusals.tolist() == [refusal, Refusal.NONE]


def test_reservations_have_a_quota(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions_module, "RESERVATIONS_PER_SESSION_MAX", 2)
    session = world.node.open_session()
    reply = world.reserve(session, [new_cell(number) for number in range(3)])
    assert reply.outcomes.tolist() == [Outcome.RESERVED, Outcome.RESERVED, Outcome.REFUSED]
    assert reply.refusals.tolist() == [0, 0, Refusal.QUOTA]
    world.node.abort(session, reply.slots[:1], reply.generations[:1])
    assert world.reserve(session, [new_cell(5)]).outcomes.tolist() == [Outcome.RESERVED]


def test_a_write_whose_end_was_lost_does_not_block_its_cell_for_ever(world: World) -> None:
    """Abort or Abandon did not arrive, but the writer's session lives on."""
    writer, other = world.node.open_session(), world.node.open_session()
    reply = world.reserve(writer, [new_cell(1)])
    world.pass_time(RESERVATION_S_MAX - 1, beating=(writer, other))
    assert world.put(other, [new_cell(1)]) == [Outcome.BUSY]
    world.pass_time(2, beating=(writer, other))
    assert world.put(other, [new_cell(1)]) == [Outcome.STORED]
    assert world.commit(writer, reply, [0], [0]) == [Outcome.LOST]
    assert world.node.stats().host.retired == 1


def test_too_many_cells_in_one_call_are_a_callers_bug(world: World) -> None:
    session = world.node.open_session()
    many = packed([key_number(1)] * (MAX_CELLS_PER_CALL + 1))
    zeros = np.zeros(len(many), np.uint32)
    wide = zeros.astype(np.uint64)
    with pytest.raises(UsageError, match="split it"):
        world.node.acquire(session, many, zeros.astype(np.uint8), 1)
    with pytest.raises(UsageError, match="split it"):
        world.node.commit(session, zeros, wide, wide)
    with pytest.raises(UsageError, match="split it"):
        world.node.abort(session, zeros, wide)
    with pytest.raises(UsageError, match="split it"):
        world.reserve(session, [new_cell(1)] * len(many))
    assert world.node.stats().host.reserved_cells == 0


def test_no_room_is_said_while_everything_is_leased(world: World) -> None:
    session = world.node.open_session()
    world.put(session, [new_cell(number) for number in range(8)])
    other = world.node.open_session()
    lease = world.node.acquire(session, keys(*range(4)), cells_of(*[0] * 4), 1000).lease
    assert world.node.acquire(other, keys(*range(4, 8)), cells_of(*[0] * 4), 1000).lease
    reply = world.reserve(session, [new_cell(9)])
    assert reply.refusals.tolist() == [Refusal.NO_ROOM]
    world.node.release(session, lease)
    assert world.put(session, [new_cell(9)]) == [Outcome.STORED]


def test_changes_and_snapshot_agree(world: World) -> None:
    session = world.node.open_session()
    assert len(world.node.drain_changes()) == 0
    assert len(world.node.snapshot()) == 0
    for start in range(0, 20, 4):
        world.put(session, [new_cell(start + i, cell=i) for i in range(4)])
    changes, held = world.node.drain_changes(), {}
    rows = zip(changes.keys, changes.cells, changes.spans, changes.added, strict=True)
    for key, cell, span, added in rows:
        name = key.tobytes(), int(cell)
        assert (name in held) != added, "strict: added once, removed once"
        if added:
            held[name] = int(span)
        else:
            del held[name]
    snapshot = world.node.snapshot()
    rows = zip(snapshot.keys, snapshot.cells, snapshot.spans, snapshot.added, strict=True)
    assert {(k.tobytes(), int(c)): int(s) for k, c, s, _ in rows} == held
    assert snapshot.added.all()


def test_one_dying_session_whose_memory_cannot_be_given_back_stops_nobody(world: World) -> None:
    """The file system fails at every operation of a session's end; the others do not notice."""
    survivor = world.node.open_session()
    world.put(survivor, [new_cell(1)])
    for fail_at in range(1, 5):
        session = world.node.open_session()
        world.reserve(session, [new_cell(10), new_cell(11)])
        world.fs.fail_at = world.fs.operations + fail_at
        world.node.close_session(session)
        assert world.node.stats().host.reserved_cells == 0
        assert world.put(survivor, [new_cell(10)]) in ([Outcome.STORED], [Outcome.PRESENT])
        assert holds(world.tier, new_cell(1))


def test_a_mapping_of_a_reader_sees_what_was_put(world: World) -> None:
    session = world.node.open_session()
    world.put(session, [new_cell(1)])
    reply = world.node.acquire(session, keys(1), cells_of(0), 1000)
    folder = world.node.identity.arena_folder
    reader = Arena.map(LinuxFileSystem(), world.tier.arena._path.parent, writable=False)
    assert str(world.tier.arena._path.parent) == folder
    assert reader.view(int(reply.offsets[0]), 4).tobytes() == b"SMVR"
