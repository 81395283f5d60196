"""The host tier: whole cells only, retired offsets never again, and a successor that knows it."""

import logging
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from kvstore.arena import ARENA_FILE, SPARSE_FACTOR, Arena
from kvstore.block import HEADER_BYTES
from kvstore.clock import ManualClock
from kvstore.errors import ConfigError, StateError
from kvstore.fs import LinuxFileSystem
from kvstore.table import TABLE_FILE, SlotState
from kvstore.tiers.host import HostTier
from kvstore.tiers.space import RETRY_S, SWEEP_S
from kvstore.tiers.start import default_slots, open_tier
from kvstore.tiers.tier import Commitment, Refusal
from kvstore.tiers.vacancy import QUARANTINE_S
from tests.faults import FaultyFileSystem
from tests.worlds import (
    PAGE,
    cells_of,
    holds,
    new_cell,
    packed,
    read_verified,
    right_payload,
    shared_folder,
    small_tier,
    store,
    write_cell,
)

FS = LinuxFileSystem()
PAGES = 16
CELL = 2 * PAGE
"""What ``new_cell`` takes: a page of header, a page of payload."""


@dataclass
class World:
    folder: Path
    clock: ManualClock
    tier: HostTier
    incarnation: int = 1

    def restart(self, fs: LinuxFileSystem | FaultyFileSystem = FS) -> HostTier:
        """The process is gone; its successor takes the folder over."""
        self.incarnation += 1
        self.tier = HostTier.adopt(fs, self.clock, self.folder, PAGES * PAGE, self.incarnation)
        return self.tier

    def backed_bytes(self) -> int:
        return (self.folder / ARENA_FILE).stat().st_blocks * 512

    def expires_ms(self, slot: int) -> int:
        return int(self.tier.table.slots["expires_ms"][slot])


@pytest.fixture
def world() -> Iterator[World]:
    with shared_folder() as folder:
        clock = ManualClock()
        yield World(folder, clock, small_tier(FS, clock, folder, PAGES))


def reserved(tier: HostTier, number: int, pages: int = 1) -> int:
    slot = tier.reserve(new_cell(number, pages=pages), tier.next_stamp())
    assert not isinstance(slot, Refusal), slot.name
    return slot


def place(tier: HostTier, slot: int) -> tuple[int, int]:
    record = tier.table.slots[slot]
    return int(record["offset"]), int(record["size_bytes"])


def accounted_bytes(tier: HostTier) -> int:
    """Everything that is not retired: free, held, reserved, resting."""
    records = tier.table.slots
    live = np.isin(
        records["state"], [SlotState.RESERVED, SlotState.COMMITTED, SlotState.QUARANTINED]
    )
    return tier._space.free_bytes + int(records["size_bytes"][live].sum())


def test_nothing_is_visible_before_it_is_whole(world: World) -> None:
    tier, new = world.tier, new_cell(1)
    slot = reserved(tier, 1)
    assert not holds(tier, new)
    digest = write_cell(tier.arena, place(tier, slot)[0], new)
    assert not holds(tier, new)
    assert tier.is_writing(new.key, new.cell)
    assert tier.commit(slot, digest) is Commitment.STORED
    assert holds(tier, new)
    assert not tier.is_writing(new.key, new.cell)


@pytest.mark.parametrize(
    "other",
    [
        replace(new_cell(1), key=new_cell(2).key),
        replace(new_cell(1), cell=1),
        replace(new_cell(1), tokens=17),
        replace(new_cell(1), length=PAGE - 1),
    ],
)
def test_another_cell_than_announced_is_not_committed(world: World, other: object) -> None:
    slot = reserved(world.tier, 1)
    digest = write_cell(world.tier.arena, place(world.tier, slot)[0], other)  # type: ignore[arg-type]
    assert world.tier.commit(slot, digest) is Commitment.DAMAGED
    assert not holds(world.tier, new_cell(1))
    assert accounted_bytes(world.tier) == PAGES * PAGE
    assert not world.tier.is_writing(new_cell(1).key, 0)
    store(world.tier, new_cell(1))


def test_a_header_that_does_not_match_its_digest_is_not_committed(world: World) -> None:
    slot = reserved(world.tier, 1)
    digest = write_cell(world.tier.arena, place(world.tier, slot)[0], new_cell(1))
    assert world.tier.commit(slot, digest ^ 1) is Commitment.DAMAGED
    assert world.tier.stats.aborted == 1
    slot = reserved(world.tier, 2)
    world.tier.arena.view(place(world.tier, slot)[0], PAGE)[:] = 0
    assert world.tier.commit(slot, digest) is Commitment.DAMAGED


def test_oldest_go_first_and_others_stay(world: World) -> None:
    for number in range(8):
        store(world.tier, new_cell(number))
    store(world.tier, new_cell(8))
    assert [n for n in range(9) if holds(world.tier, new_cell(n))] == list(range(1, 9))
    store(world.tier, new_cell(9, pages=3))
    assert [n for n in range(10) if holds(world.tier, new_cell(n, pages=3 if n == 9 else 1))] == [
        3, 4, 5, 6, 7, 8, 9,
    ]  # fmt: skip


def test_a_prompt_that_does_not_fit_loses_its_end_and_not_its_middle(world: World) -> None:
    tier, stamp = world.tier, world.tier.next_stamp()
    other = new_cell(100)
    store(tier, other)
    prompt = [new_cell(depth, depth=depth) for depth in range(10)]
    for new in prompt[:3]:
        store(tier, new, stamp)
    stamp = tier.next_stamp()  # again, and more of it
    found = tier.find(packed([new.key for new in prompt[:3]]), cells_of(0, 0, 0))
    tier.touch(found.slots, stamp)
    for new in prompt[3 : PAGES * PAGE // CELL]:
        store(tier, new, stamp)
    assert not holds(tier, other), "what is older makes way"
    assert tier.reserve(prompt[-1], stamp) is Refusal.NO_ROOM
    assert [holds(tier, new) for new in prompt] == [True] * 8 + [False] * 2


def test_pinned_cells_stay_and_then_there_is_no_room(world: World) -> None:
    slots = [store(world.tier, new_cell(number)) for number in range(8)]
    world.tier.pin(slots)
    world.tier.pin(slots[:1])
    assert world.tier.reserve(new_cell(8), world.tier.next_stamp()) is Refusal.NO_ROOM
    world.tier.unpin(slots)
    store(world.tier, new_cell(8))
    assert holds(world.tier, new_cell(0)), "still pinned once"
    assert not holds(world.tier, new_cell(1))


def test_next_to_leave_are_the_oldest_heads_first_and_nobody_in_use(world: World) -> None:
    tier = world.tier
    old, new = tier.next_stamp(), tier.next_stamp()
    slots = [store(tier, new_cell(n, depth=n % 4), old if n < 4 else new) for n in range(8)]
    assert tier.next_to_leave(6).tolist() == slots[:6]
    tier.pin([slots[0], slots[5]])
    assert tier.next_to_leave(6).tolist() == [*slots[1:5]]
    tier.unpin([slots[0], slots[5]])
    tier.expend(np.array(slots[1:3], np.uint32))
    assert tier.next_to_leave(6).tolist() == [slots[0], *slots[3:6]]
    assert tier.next_to_leave(100).tolist() == [slots[0], *slots[3:]]


class Underneath:
    """Has the cells of some slots."""

    def __init__(self, *slots: int) -> None:
        self.slots = slots

    def holds(self, slot: int) -> bool:
        return slot in self.slots


def test_what_is_below_too_leaves_first_and_what_is_not_is_counted(world: World) -> None:
    tier = world.tier
    stamp = tier.next_stamp()
    slots = [store(tier, new_cell(n, depth=n), stamp) for n in range(8)]
    tier.lie_above(Underneath(*slots[:4]))
    tier.expend(np.array(slots[:5], np.uint32))
    tier.expend(np.array(slots[:2], np.uint32))
    assert tier.spare_bytes == 5 * CELL
    tier.pin(slots[3:4])
    tier.touch(np.array(slots[:1], np.uint32), tier.next_stamp())
    left = set(range(8))
    # 4 has left the disk, 3 is in use, 0 was used: they are not expendable any more.
    for number, gone in enumerate([2, 1, 7, 6], start=10):
        store(tier, new_cell(number))
        left.remove(gone)
        assert {n for n in range(8) if holds(tier, new_cell(n))} == left
    assert tier.stats.dropped_unspilled == 2
    assert tier.spare_bytes == 0


def test_a_slot_that_was_used_again_is_not_expendable(world: World) -> None:
    tier = world.tier
    slots = [store(tier, new_cell(n)) for n in range(8)]
    tier.lie_above(Underneath(*slots))
    tier.expend(np.array(slots[:2], np.uint32))
    tier.touch(np.array(slots[1:2], np.uint32), tier.next_stamp())
    tier.expend(np.array(slots[1:2], np.uint32))
    assert tier.spare_bytes == 2 * CELL
    tier.evict(slots[0])
    assert tier.spare_bytes == CELL, "what rests is not free yet"
    assert store(tier, new_cell(8)) == slots[0]
    assert tier.spare_bytes == CELL
    store(tier, new_cell(9))
    assert not holds(tier, new_cell(1))
    assert tier.stats.evicted == 1


def test_what_is_being_written_is_not_evicted(world: World) -> None:
    for number in range(8):
        reserved(world.tier, number)
    assert world.tier.reserve(new_cell(8), world.tier.next_stamp()) is Refusal.NO_ROOM
    assert world.tier.stats.reserved_cells == 8


def test_every_slot_record_pinned_is_no_room_not_a_hang(world: World) -> None:
    with shared_folder() as folder:
        tier = small_tier(FS, world.clock, folder, PAGES, slots=2)
        tier.pin([store(tier, new_cell(0)), store(tier, new_cell(1))])
        assert tier.reserve(new_cell(2), tier.next_stamp()) is Refusal.NO_ROOM


def test_a_cell_larger_than_the_tier_evicts_nobody(world: World) -> None:
    store(world.tier, new_cell(1))
    huge = new_cell(2, pages=PAGES)
    assert world.tier.reserve(huge, world.tier.next_stamp()) is Refusal.TOO_LARGE
    whole = replace(new_cell(2), length=PAGES * PAGE - HEADER_BYTES)
    assert holds(world.tier, new_cell(1))
    store(world.tier, whole)
    assert holds(world.tier, whole)


def test_an_aborted_offset_is_used_again_only_after_it_rested(world: World) -> None:
    slot = reserved(world.tier, 1)
    offset, _ = place(world.tier, slot)
    world.tier.abort(slot)
    assert place(world.tier, reserved(world.tier, 2))[0] != offset
    world.clock.advance(QUARANTINE_S)
    world.tier.tick()
    assert place(world.tier, reserved(world.tier, 3))[0] == offset


def test_rest_ends_early_when_the_memory_is_needed(world: World) -> None:
    slot = reserved(world.tier, 1, pages=PAGES - 1)
    world.tier.abort(slot)
    assert place(world.tier, reserved(world.tier, 2, pages=PAGES - 1))[0] == 0
    assert world.tier.stats.evicted == 0


def test_retired_offsets_are_replaced_and_never_used_again(world: World) -> None:
    tier = world.tier
    dead: list[tuple[int, int]] = []
    for number in range(12):
        slot = reserved(tier, number, pages=1 + number % 3)
        tier.arena.view(*place(tier, slot))[:] = 1
        dead.append(place(tier, slot))
        tier.retire(slot)
        assert world.backed_bytes() == accounted_bytes(tier) == PAGES * PAGE
    assert tier.stats.retired_bytes == sum(size for _, size in dead)
    for offset, size in dead:
        assert not tier.arena.view(offset, size).any()
    for number in range(4):
        offset, size = place(tier, store(tier, new_cell(100 + number)))
        assert all(offset + size <= start or start + length <= offset for start, length in dead)


def test_a_late_write_harms_nobody_and_is_swept(world: World) -> None:
    tier = world.tier
    slot = reserved(tier, 1)
    late = tier.arena.view(*place(tier, slot))
    tier.retire(slot)
    cells = [new_cell(number) for number in range(2, 10)]
    for new in cells:
        store(tier, new)
    late[:] = 0xAA
    assert all(holds(tier, new) for new in cells)
    assert world.backed_bytes() == PAGES * PAGE + CELL
    world.clock.advance(SWEEP_S)
    tier.tick()
    assert world.backed_bytes() == PAGES * PAGE
    assert all(holds(tier, new) for new in cells)


def test_a_flapping_writer_takes_no_records(world: World) -> None:
    with shared_folder() as folder:
        tier = small_tier(FS, world.clock, folder, pages=4, slots=3)
        for number in range(40):
            tier.retire(reserved(tier, number))
            store(tier, new_cell(1000 + number))
            assert holds(tier, new_cell(1000 + number))
        assert tier.stats.retired == 40
        assert accounted_bytes(tier) == 4 * PAGE


def test_what_was_retired_is_one_range_where_it_can_be(world: World) -> None:
    tier = world.tier
    slots = [reserved(tier, number) for number in range(8)]
    for slot in (slots[1], slots[3], slots[2], slots[5], slots[4]):
        tier.retire(slot)
    assert tier.table.retired_ranges() == [(CELL, 6 * CELL)]
    assert tier.stats.retired_bytes == 5 * CELL


def test_rows_for_retired_ranges_never_run_out(world: World) -> None:
    """Free slivers between retired ranges are retired as well when all rows are taken."""
    with shared_folder() as folder:
        tier = small_tier(FS, world.clock, folder, pages=24, slots=4)
        dead: set[int] = set()
        for number in range(0, 32, 4):
            slots = [reserved(tier, number + i, pages=1 + i % 2) for i in range(4)]
            for slot in slots[::2]:
                dead |= {start for start, _ in tier._extents(np.array([slot]))}
                tier.retire(slot)
            for slot in slots[1::2]:
                tier.abort(slot)
                world.clock.advance(QUARANTINE_S)
                tier.tick()
            assert len(tier.table.retired_ranges()) <= 4
            assert accounted_bytes(tier) == 24 * PAGE
        ranges = tier.table.retired_ranges()
        assert all(any(start <= at < stop for start, stop in ranges) for at in dead)
        tier = HostTier.adopt(FS, world.clock, folder, 24 * PAGE, 2)
        assert tier.table.retired_ranges() == ranges
        assert accounted_bytes(tier) == 24 * PAGE


def test_a_worn_out_arena_shrinks_says_so_once_and_goes_on(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    with shared_folder() as folder, caplog.at_level(logging.WARNING):
        tier = small_tier(FS, world.clock, folder, pages=4, slots=8)
        keep = new_cell(500)
        pinned = [store(tier, keep)]
        tier.pin(pinned)
        retired = 0
        while not isinstance(slot := tier.reserve(new_cell(retired), tier.next_stamp()), Refusal):
            tier.retire(slot)
            retired += 1
        assert retired == 2 * SPARSE_FACTOR - 1, "all but the two pages of the cell that is held"
        assert slot is Refusal.NO_ROOM
        (said,) = caplog.records
        assert "samovar down --purge" in said.message
        tier.unpin(pinned)
        assert tier.reserve(new_cell(501, pages=2), tier.next_stamp()) is Refusal.SHRUNK
        assert holds(tier, keep), "reading goes on, and a put that is refused costs nobody"
        store(tier, new_cell(502))
        world.clock.advance(SWEEP_S)
        tier.tick()
        assert len(caplog.records) == 1


def test_a_put_that_is_refused_evicts_nobody(world: World) -> None:
    """Between pinned cells there is no stretch long enough, however many are evicted."""
    slots = [store(world.tier, new_cell(number)) for number in range(8)]
    world.tier.pin(slots[1::2])
    assert world.tier.reserve(new_cell(9, pages=2), world.tier.next_stamp()) is Refusal.NO_ROOM
    assert world.tier.stats.evicted == 0
    world.tier.unpin(slots[1:2])
    store(world.tier, new_cell(9, pages=2))
    assert world.tier.stats.evicted == 2, "those two that lie side by side"


def test_expiry_hides_and_makes_way(world: World) -> None:
    tier, new = world.tier, new_cell(1, ttl_s=10)
    store(tier, new)
    world.clock.advance(9.9)
    assert holds(tier, new)
    world.clock.advance(0.1)
    assert not holds(tier, new)
    assert not tier.find_for_writing(packed([new.key]), cells_of(0)).held[0]
    assert (tier.stats.expired, tier.stats.evicted) == (1, 0)
    store(tier, new)
    assert holds(tier, new)


@pytest.mark.parametrize(
    ("first", "second", "after_9_s", "wanted_ms"),
    [
        (10, 5, 0, 10_000),  # a shorter put does not shorten
        (10, 60, 0, 60_000),
        (10, 5, 9, 19_000),  # use slides the longer life
        (10, 0, 0, 0),  # 0 is for ever
        (0, 5, 0, 0),
        (0, 0, 9, 0),
    ],
)
def test_a_second_put_never_shortens_a_life(
    world: World, first: int, second: int, after_9_s: int, wanted_ms: int
) -> None:
    start_ms = world.clock.wall_ms()
    slot = store(world.tier, new_cell(1, ttl_s=first))
    world.clock.advance(after_9_s)
    world.tier.touch(np.array([slot], np.uint32), world.tier.next_stamp(), second)
    assert world.expires_ms(slot) == (start_ms + wanted_ms if wanted_ms else 0)


def test_a_touch_slides_by_the_cells_own_ttl(world: World) -> None:
    start_ms = world.clock.wall_ms()
    slots = [store(world.tier, new_cell(1, ttl_s=10)), store(world.tier, new_cell(2))]
    world.clock.advance(4)
    world.tier.touch(np.array(slots, np.uint32), world.tier.next_stamp())
    assert [world.expires_ms(slot) for slot in slots] == [start_ms + 14_000, 0]
    world.clock.wall_now_ms -= 3_600_000
    world.tier.touch(np.array(slots, np.uint32), world.tier.next_stamp())
    assert world.expires_ms(slots[0]) == start_ms + 14_000, "a clock set back shortens nothing"


def test_a_descriptor_ends_when_its_cell_goes(world: World) -> None:
    slot = store(world.tier, new_cell(1))
    generations = {int(world.tier.table.slots["generation"][slot])}
    world.tier.evict(slot)
    for end in (world.tier.abort, world.tier.retire):
        slot = reserved(world.tier, 1)
        generations.add(int(world.tier.table.slots["generation"][slot]))
        end(slot)
        assert int(world.tier.table.slots["generation"][slot]) not in generations
    assert len(generations) == 3


def test_changes_are_what_came_and_went(world: World) -> None:
    tier = world.tier
    first, second = new_cell(1, cell=3), new_cell(2)
    tier.evict(store(tier, first))
    store(tier, second)
    tier.abort(reserved(tier, 3))
    tier.retire(reserved(tier, 4))
    changes = [(c.key, c.cell, c.span, c.added) for c in tier.drain_changes()]
    assert changes == [
        (first.key, 3, 1, True),
        (first.key, 3, 1, False),
        (second.key, 0, 2, True),
    ]
    assert tier.drain_changes() == []


def test_a_successor_holds_what_was_whole(world: World) -> None:
    cells = [new_cell(n, pages=1 + n % 2, depth=n, ttl_s=60 * (n % 2)) for n in range(5)]
    for new in cells:
        store(world.tier, new)
    before = world.tier.table.slots["generation"].copy()
    tier = world.restart()
    assert all(holds(tier, new) for new in cells)
    assert tier.stats.adopted == tier.stats.held_cells == 5
    assert accounted_bytes(tier) == PAGES * PAGE
    assert tier.stats.held_bytes == PAGES * PAGE - tier._space.free_bytes
    world.clock.advance(60)
    assert [holds(tier, new) for new in cells] == [True, False, True, False, True]
    generation = int(tier.table.slots["generation"][reserved(tier, 9)])
    assert generation > before.max()


def test_a_successor_evicts_in_the_same_order(world: World) -> None:
    old = world.tier.next_stamp()
    slots = [store(world.tier, new_cell(n, depth=n)) for n in range(8)]
    world.tier.touch(np.array(slots[6:], np.uint32), world.tier.next_stamp())
    world.tier.touch(np.array(slots, np.uint32), old)  # a put that has been going on for long
    tier = world.restart()
    for number in range(10, 16):
        store(tier, new_cell(number))
    assert [n for n in range(8) if holds(tier, new_cell(n, depth=n))] == [6, 7]


def test_a_successor_retires_what_was_being_written_and_replaces_it(world: World) -> None:
    store(world.tier, new_cell(1))
    slot = reserved(world.tier, 2, pages=3)
    offset, size = place(world.tier, slot)
    late = Arena.map(FS, world.folder)
    for _ in range(3):
        tier = world.restart()
        assert accounted_bytes(tier) == world.backed_bytes() == PAGES * PAGE, "smaller for ever"
        late.view(offset, size)[:] = 0xAA
        for number in range(10, 20):
            other = place(tier, store(tier, new_cell(number)))
            assert other[0] + other[1] <= offset or offset + size <= other[0]
        assert tier.stats.retired_bytes == size


def test_a_successor_frees_what_was_resting(world: World) -> None:
    world.tier.abort(reserved(world.tier, 1, pages=PAGES - 1))
    tier = world.restart()
    assert tier._space.has_room(PAGES * PAGE)


@pytest.mark.parametrize("state", [SlotState.UNUSED, SlotState.QUARANTINED])
def test_an_entry_without_a_cell_is_forgotten(world: World, state: SlotState) -> None:
    slot = store(world.tier, new_cell(1))
    world.tier.table.slots["state"][slot] = state
    tier = world.restart()
    assert not holds(tier, new_cell(1))
    assert not tier.table.entries["generation"].any()
    store(tier, new_cell(1))


def test_a_successor_drops_cells_that_do_not_agree(world: World) -> None:
    def damage_header(slot: int) -> None:
        world.tier.arena.view(place(world.tier, slot)[0] + 40, 1)[:] ^= 1

    def damage_entry(slot: int) -> None:
        world.tier.table.entries["length"][world.tier.table.slots["entry"][slot]] ^= 1

    def lose_entry(slot: int) -> None:  # killed between the record and the entry of a commit
        world.tier.table.entries[int(world.tier.table.slots["entry"][slot])] = 0

    def damage(field: str, value: int) -> object:
        return lambda slot: world.tier.table.slots[field].__setitem__(slot, value)

    damages = [
        damage_header, damage_entry, lose_entry, damage("entry", 0xFFFFFFFF), damage("length", 1),
        damage("offset", PAGES * PAGE * 2), damage("size_bytes", PAGE), damage("cell", 9),
    ]  # fmt: skip
    good = new_cell(99)
    store(world.tier, good)
    for number, harm in enumerate(damages):
        harm(store(world.tier, new_cell(number)))  # type: ignore[operator]
        tier = world.restart()
        assert not holds(tier, new_cell(number)), f"damage {number}"
        assert holds(tier, good), f"damage {number}"
        assert accounted_bytes(tier) == PAGES * PAGE, f"damage {number}"


def test_a_flipped_payload_byte_is_seen_by_its_reader(world: World) -> None:
    slot = store(world.tier, new_cell(1))
    offset, _ = place(world.tier, slot)
    world.tier.arena.view(offset + HEADER_BYTES + 5, 1)[:] ^= 1
    tier = world.restart()
    found = tier.find(packed([new_cell(1).key]), cells_of(0))
    digest = int(found.header_digests[0])
    assert read_verified(tier.arena, offset, int(found.lengths[0]), digest) is None


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("boot_id", np.void(bytes(16)), "another boot"),
        ("page_bytes", 12345, "another page size"),
        ("capacity_bytes", PAGE, "another capacity"),
        ("frontier", 0, "torn"),
        ("frontier", 1 << 62, "torn"),
        ("incarnation", 2, "later incarnation"),
        ("version", 9, "format version 9"),
    ],
)
def test_a_foreign_folder_is_not_adopted(world: World, field: str, value: int, words: str) -> None:
    store(world.tier, new_cell(1))
    world.tier.table.header[field] = value
    with pytest.raises(StateError, match=words):
        world.restart()
    tier = open_tier(FS, world.clock, world.folder, PAGES * PAGE, world.incarnation)
    assert tier.stats.held_cells == 0
    store(tier, new_cell(1))


def test_an_arena_that_is_missing_or_another_is_not_adopted(world: World) -> None:
    FS.create(world.folder / ARENA_FILE, 10 * PAGE)
    with pytest.raises(StateError, match="not the one"):
        world.restart()
    FS.remove(world.folder / ARENA_FILE)
    with pytest.raises(StateError, match="not the one"):
        world.restart()
    FS.remove(world.folder / TABLE_FILE)
    with pytest.raises(StateError, match="has not started"):
        world.restart()


def test_two_slots_on_one_memory_are_torn(world: World) -> None:
    slot = reserved(world.tier, 1)
    store(world.tier, new_cell(2))
    world.tier.table.slots["offset"][slot] = PAGES * PAGE - PAGE
    with pytest.raises(StateError, match="beyond the frontier"):
        world.restart()
    world.tier.table.slots["offset"][slot] = CELL
    with pytest.raises(StateError, match="share memory"):
        world.restart()


def test_random_damage_of_the_table_is_survived(world: World) -> None:
    """Adopted or refused, never an exception of another kind; what is held then verifies."""
    for number in range(5):
        store(world.tier, new_cell(number))
    reserved(world.tier, 9)
    path = world.folder / TABLE_FILE
    table = path.read_bytes()
    memory = Arena.map(FS, world.folder).view(0, PAGES * PAGE)
    cells = memory.copy()
    used = [*range(96), *range(65536, 65536 + 7 * 64)]
    rng = np.random.default_rng(11)
    for _ in range(150):
        memory[:] = cells
        raw = bytearray(table)
        for at in rng.choice(used, rng.integers(1, 4)):
            raw[at] = rng.integers(256)
        path.write_bytes(raw)
        try:
            tier = HostTier.adopt(FS, world.clock, world.folder, PAGES * PAGE, 2)
        except StateError:
            continue
        for number in range(5):
            holds(tier, new_cell(number))
        store(tier, new_cell(50))


def test_a_failed_creation_leaves_a_folder_that_works(world: World) -> None:
    """Every operation of creating a tier fails once; each ends in an error, and a retry works."""
    for fail_at in range(1, 60):
        with shared_folder() as folder:
            fs = FaultyFileSystem(FS, fail_at)
            try:
                small_tier(fs, world.clock, folder)
            except (OSError, ConfigError, StateError):
                assert fs.faults
            else:
                assert not fs.faults, f"operation {fail_at} failed and nobody noticed"
                assert fail_at > 8
                return
            tier = open_tier(FS, world.clock, folder, PAGES * PAGE, incarnation=2)
            assert tier.stats.held_cells == 0
            store(tier, new_cell(1))
    pytest.fail("no run without a fault")


@pytest.mark.parametrize("sticky", [False, True])
def test_a_failed_adoption_loses_nothing(sticky: bool) -> None:
    """Every operation of an adoption fails once; then a successor holds all the cells."""
    for fail_at in range(1, 60):
        with shared_folder() as folder:
            clock = ManualClock()
            world = World(folder, clock, small_tier(FS, clock, folder, PAGES))
            if not adoption_survives(world, FaultyFileSystem(FS, fail_at, sticky)):
                assert fail_at > 6
                return
    pytest.fail("no run without a fault")


def adoption_survives(world: World, fs: FaultyFileSystem) -> bool:
    """Whether ``fs`` had a fault in store for the adoption; asserts that it cost nothing."""
    cells = [new_cell(number) for number in range(4)]
    for new in cells:
        store(world.tier, new)
    dead = place(world.tier, reserved(world.tier, 100, pages=2))
    try:
        tier = world.restart(fs)
    except (OSError, StateError):
        assert fs.faults
    else:
        assert all(holds(tier, new) for new in cells)
        assert accounted_bytes(tier) <= PAGES * PAGE
        assert world.backed_bytes() <= PAGES * PAGE
    tier = world.restart()
    assert all(holds(tier, new) for new in cells)
    assert accounted_bytes(tier) == world.backed_bytes() == PAGES * PAGE
    for number in range(200, 204):
        offset, size = place(tier, store(tier, new_cell(number)))
        assert offset + size <= dead[0] or sum(dead) <= offset
    return bool(fs.faults)


def test_open_tier_never_discards_for_an_operating_system_fault(world: World) -> None:
    cells = [new_cell(number) for number in range(4)]
    for new in cells:
        store(world.tier, new)
    for fail_at in range(1, 60):
        world.incarnation += 1
        fs = FaultyFileSystem(FS, fail_at)
        try:
            tier = open_tier(fs, world.clock, world.folder, PAGES * PAGE, world.incarnation)
        except OSError:
            continue
        assert all(holds(tier, new) for new in cells), f"operation {fail_at} cost all cells"
        if not fs.faults:
            return
    pytest.fail("no run without a fault")


@pytest.mark.parametrize("sticky", [False, True])
def test_whatever_fails_in_a_life_the_tier_is_whole_again(sticky: bool) -> None:
    """Every operation of retiring, sweeping, dying and adopting fails once, or from then on."""
    for fail_at in range(1, 100):
        with shared_folder() as folder:
            clock = ManualClock()
            world = World(folder, clock, small_tier(FS, clock, folder, PAGES))
            fs = FaultyFileSystem(FS, fail_at, sticky)
            dead = troubled_life(world, fs)
            tier = world.restart()
            assert accounted_bytes(tier) == world.backed_bytes() == PAGES * PAGE
            ranges = tier.table.retired_ranges()
            assert all(any(a <= x and x + n <= b for a, b in ranges) for x, n in dead)
            for number in range(200, 208):
                store(tier, new_cell(number))
            assert all(holds(tier, new_cell(number)) for number in range(200, 208))
            if not fs.faults:
                assert fail_at > 20
                return
    pytest.fail("no run without a fault")


def troubled_life(world: World, fs: FaultyFileSystem) -> list[tuple[int, int]]:
    """Writers that are lost, sweeps and a death, on a file system that fails; what was retired."""
    dead: list[tuple[int, int]] = []
    for number in range(3):
        try:
            tier = world.restart(fs)
        except (OSError, StateError):
            assert fs.faults
            tier = world.restart(fs if not fs.sticky else FS)
        lost = [tier.reserve(new_cell(10 * number + i), tier.next_stamp()) for i in range(3)]
        slots = [slot for slot in lost if not isinstance(slot, Refusal)]
        dead += [place(tier, slot) for slot in slots]
        for slot in slots[:2]:
            tier.retire(slot)
        assert accounted_bytes(tier) <= PAGES * PAGE
        aborted = tier.reserve(new_cell(100 + number), tier.next_stamp())
        if not isinstance(aborted, Refusal):
            tier.abort(aborted)
        world.clock.advance(SWEEP_S)
        tier.tick()
    return dead


@pytest.mark.parametrize("sticky", [False, True])
def test_a_foreign_folder_is_replaced_sooner_or_later(sticky: bool) -> None:
    """Every operation of discarding another boot's arena and making one fails once."""
    for fail_at in range(1, 60):
        with shared_folder() as folder:
            clock = ManualClock()
            store(small_tier(FS, clock, folder, PAGES), new_cell(1))
            small_tier(FS, clock, folder, PAGES).table.header["boot_id"] = np.void(bytes(16))
            fs = FaultyFileSystem(FS, fail_at, sticky)
            with suppress(OSError, ConfigError):
                open_tier(fs, clock, folder, PAGES * PAGE, incarnation=2)
            tier = open_tier(FS, clock, folder, PAGES * PAGE, incarnation=3)
            assert not holds(tier, new_cell(1))
            store(tier, new_cell(2))
            assert accounted_bytes(tier) == PAGES * PAGE
            if not fs.faults:
                assert fail_at > 12
                return
    pytest.fail("no run without a fault")


@pytest.mark.parametrize("operation", [1, 2])
def test_a_retirement_that_fails_makes_the_tier_smaller_until_it_works(
    world: World, operation: int, caplog: pytest.LogCaptureFixture
) -> None:
    fs = FaultyFileSystem(FS)
    tier = world.restart(fs)
    keep = new_cell(50)
    store(tier, keep)
    slot = reserved(tier, 1)
    dead = place(tier, slot)
    fs.fail_at = fs.operations + operation
    with caplog.at_level(logging.WARNING):
        tier.retire(slot)
    assert fs.faults == 1
    tier.tick()
    (said,) = caplog.records
    assert f"{CELL} bytes smaller than configured: [Errno 28]" in said.message
    caplog.clear()
    assert accounted_bytes(tier) == PAGES * PAGE - CELL
    assert world.backed_bytes() <= PAGES * PAGE
    world.clock.advance(SWEEP_S)
    tier.tick()
    assert accounted_bytes(tier) == world.backed_bytes() == PAGES * PAGE
    assert [record.message for record in caplog.records] == [
        "the tier has its configured size again"
    ]
    for number in range(60, 67):
        offset, size = place(tier, store(tier, new_cell(number)))
        assert offset + size <= dead[0] or sum(dead) <= offset
    assert holds(tier, keep)


def test_a_tier_that_is_smaller_asks_for_its_memory_soon_and_then_ever_less_often(
    world: World,
) -> None:
    fs = FaultyFileSystem(FS, sticky=True)
    tier = world.restart(fs)
    store(tier, new_cell(50))
    slots = [reserved(tier, number) for number in range(PAGES // 2)]
    fs.fail_at = fs.operations + 1
    for slot in slots:
        tier.retire(slot)
    assert accounted_bytes(tier) == 0, "all of it was being written by somebody who was lost"
    asked_s = []
    for second in range(1, 200):
        operations = fs.operations
        world.clock.advance(1)
        tier.tick()
        if fs.operations > operations:
            asked_s.append(second)
    assert asked_s == [1, 3, 7, 15, 31, 63, 123, 183]
    fs.fail_at = 0
    world.clock.advance(SWEEP_S)
    tier.tick()
    assert accounted_bytes(tier) == world.backed_bytes() == PAGES * PAGE
    operations = fs.operations
    for _ in range(round(SWEEP_S) - 1):
        world.clock.advance(1)
        tier.tick()
    assert fs.operations == operations, "whole again"
    fs.fail_at = fs.operations + 1
    tier.retire(reserved(tier, 1))
    fs.fail_at = 0
    world.clock.advance(RETRY_S)
    tier.tick()
    assert accounted_bytes(tier) == world.backed_bytes() == PAGES * PAGE, "soon, the next time too"


def test_a_tier_has_records_for_many_small_cells() -> None:
    assert default_slots(1 << 20) == 1024
    assert default_slots(1 << 30) == 16384
    assert default_slots(1 << 50) == 1 << 22


def test_capacity_is_whole_pages(world: World) -> None:
    with shared_folder() as folder:
        tier = HostTier.create(FS, world.clock, folder, 10 * PAGE + 17, 8, 1)
        assert tier.stats.capacity_bytes == 10 * PAGE
        again = HostTier.adopt(FS, world.clock, folder, 10 * PAGE + 17, 2)
        assert again.stats.capacity_bytes == 10 * PAGE


def test_metadata_is_counted(world: World) -> None:
    tier = world.tier
    assert tier.metadata_bytes() >= tier.table.slots.nbytes + tier.table.entries.nbytes


def test_right_bytes_differ_by_name() -> None:
    names = [(new_cell(n).key, cell) for n in range(3) for cell in range(3)]
    assert len({right_payload(key, cell, 64).tobytes() for key, cell in names}) == 9
