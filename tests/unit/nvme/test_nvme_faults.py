"""What disk, catalog and clock may do to the NVMe tier: a miss, or a refusal in one sentence.

Whatever happened, no wrong byte is delivered (the world looks at each), and the next store repairs
what was lost. Does not cover: crashes (``test_nvme_crash``), real files (``test_nvme_process``).
"""

import errno
import random
from dataclasses import replace

import numpy as np
import pytest
from xxhash import xxh3_64_intdigest

from kvstore.errors import StateError
from kvstore.tiers.nvme.identity import IDENTITY_BYTES, Identity, parse_identity
from kvstore.tiers.nvme.open_slab import PAUSE_S, WAITING_MAX
from kvstore.tiers.nvme.record import PAGE_BYTES, slot_bytes_of, slot_bytes_of_all
from kvstore.tiers.nvme.recovery import Wanted, recover
from kvstore.tiers.nvme.shelf import Shelf
from kvstore.tiers.nvme.slab import Slab
from kvstore.tiers.nvme.spill import Declined, Phase, Result
from kvstore.tiers.nvme.tier import RETRY_S, TOUCHES_S
from kvstore.tiers.nvme.tombstones import TOMBSTONE_S
from tests.nvme_world import CELLS_MAX, EXTENT_BYTES, EXTENTS, SLOTS, NvmeWorld
from tests.worlds import key_number

CELLS = 5


@pytest.fixture
def world() -> NvmeWorld:
    """A tier that holds ``CELLS`` cells."""
    world = NvmeWorld(seed=1)
    world.start()
    for number in range(CELLS):
        assert stored(world, number)
    return world


def stored(world: NvmeWorld, number: int, pages: int = 1, ttl_s: int = 0) -> bool:
    ticket = world.store(number, pages=pages, ttl_s=ttl_s)
    world.settle()
    return isinstance(ticket, int) and world.results[ticket] is Result.STORED


def loaded(world: NvmeWorld, number: int) -> Result | Declined:
    ticket = world.load(number)
    world.settle()
    return world.results[ticket] if isinstance(ticket, int) else ticket


def restarted(world: NvmeWorld) -> NvmeWorld:
    world.restart(power_lost=False)
    return world


def check_repairs(world: NvmeWorld) -> None:
    """Every cell is held or can be stored again, and then all can be read."""
    for number in range(CELLS):
        result = loaded(world, number)
        assert result in (Result.LOADED, Result.DAMAGED, Result.FAILED, Declined.GONE)
        if result is not Result.LOADED:
            assert stored(world, number), f"the next store did not repair cell {number}"
            assert loaded(world, number) is Result.LOADED
    world.check_accounting()


# Disks that refuse


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize("operation", ["write", "sync", "commit"])
def test_a_refused_store_is_a_failure_and_nothing_else(
    world: NvmeWorld, operation: str, number: int
) -> None:
    held = world.held()
    world.steps.faults[operation] = number
    assert not stored(world, 10)
    assert world.held() == held
    assert [loaded(world, n) for n in range(CELLS)] == [Result.LOADED] * CELLS
    assert world.store(11) is Declined.CLOSED, "nothing is written for a while"
    world.steps.faults.clear()
    world.clock.advance(PAUSE_S)
    world.take(world.tier.tick())
    assert stored(world, 10)
    assert loaded(world, 10) is Result.LOADED
    world.settle()
    assert len(restarted(world).held()) == CELLS + 1


def test_a_slot_whose_freeing_failed_is_used_again_once_it_succeeds(world: NvmeWorld) -> None:
    world.steps.faults["write"] = errno.EIO
    for _ in range(3):
        world.clock.advance(PAUSE_S)
        assert not stored(world, 10)
    world.steps.faults.clear()
    world.clock.advance(PAUSE_S)
    world.take(world.tier.tick())
    world.settle()
    assert all(stored(world, n) for n in range(CELLS, SLOTS))
    assert len(world.held()) == SLOTS, "a slot is lost"
    assert world.tier.stats.evicted == 0


def test_a_cell_that_the_disk_refused_to_read_stands_in_no_stores_way(world: NvmeWorld) -> None:
    world.steps.faults["read"] = errno.EIO
    assert loaded(world, 3) is Result.FAILED
    world.steps.faults.clear()
    assert loaded(world, 3) is Declined.GONE
    check_repairs(world)


def test_a_delete_waits_for_a_disk_that_refuses(world: NvmeWorld) -> None:
    world.steps.faults["sync"] = errno.EIO
    ticket = world.delete(3)
    world.settle()
    assert not world.holds(3)
    assert ticket not in world.results, "acknowledged, and not durable"
    world.steps.faults.clear()
    world.clock.advance(RETRY_S)
    world.take(world.tier.tick())
    world.settle()
    assert world.results[ticket] is Result.DELETED


def test_a_disk_that_refuses_to_open_is_tried_again_later_each_time() -> None:
    world = NvmeWorld(seed=1)
    world.steps.faults["allocate"] = errno.ENOSPC
    world.start()
    waits = []
    for _ in range(8):
        assert world.tier.phase is Phase.OPENING
        assert "allocate" in world.tier.reason
        assert world.store(1) is Declined.CLOSED
        restarts, began_s = world.tier.stats.restarts, world.clock.now_s
        while world.tier.stats.restarts == restarts:
            world.clock.advance(0.5)
            world.take(world.tier.tick())
        waits.append(world.clock.now_s - began_s)
    assert waits == [0.5, 1, 2, 4, 8, 16, 30, 30]
    world.steps.faults.clear()
    world.clock.advance(30)
    world.take(world.tier.tick())
    assert stored(world, 1)


def test_short_reads_and_writes_are_completed(world: NvmeWorld) -> None:
    world.disk.is_short = True
    assert stored(world, 10, pages=5)
    assert loaded(world, 10) is Result.LOADED
    check_repairs(restarted(world))


# Damage


@pytest.mark.parametrize("seed", range(12))
def test_bits_that_flip_in_the_slab_cost_the_cells_that_they_are_in(seed: int) -> None:
    world = NvmeWorld(seed)
    world.start()
    for number in range(CELLS):
        assert stored(world, number)
    flips = random.Random(seed)
    for _ in range(12):
        world.disk.flip(flips.randrange(len(world.disk.image) * 8))
        lost = [n for n in range(CELLS) if loaded(world, n) is not Result.LOADED]
        assert len(lost) <= 1, "one bit cost several cells"
        check_repairs(world)
        if flips.random() < 0.5:
            world.catalog.damage = "its only copy was a spoon"
        check_repairs(restarted(world))


def test_every_bit_of_a_slots_header_page_matters(world: NvmeWorld) -> None:
    record = world.tier.held_records()[0]
    identity = parse_identity(world.catalog.identity, "the test's slab")
    assert identity is not None
    slab = Slab(world.disk, identity)
    offset = int(record["offset"])
    for byte in range(PAGE_BYTES):
        world.disk.flip((offset + byte) * 8 + byte % 8)
        assert slab.record_at(offset) is None, f"byte {byte} does not matter"
        world.disk.flip((offset + byte) * 8 + byte % 8)
    assert slab.record_at(offset) is not None


def test_a_slot_that_was_moved_or_is_of_an_earlier_write_is_none(world: NvmeWorld) -> None:
    first, second = (int(offset) for offset in world.tier.held_records()["offset"][:2])
    size = slot_bytes_of(PAGE_BYTES - 100)
    kept = bytes(world.disk.image[first : first + size])
    world.disk.image[second : second + size] = kept
    assert loaded(world, 1) is Result.DAMAGED
    for number in range(CELLS, SLOTS + 1):
        assert stored(world, number)
    world.delete(0)
    world.settle()
    assert stored(world, 0)
    assert first in world.tier.held_records()["offset"][world.tier.held_records()["stamp"] == 1]
    world.disk.image[first : first + size] = kept
    assert loaded(world, 0) is Result.DAMAGED, "an earlier write of the same cell"


@pytest.mark.parametrize("pages", [0, 1, 3, 4, 10, 20])
def test_a_truncated_slab_is_made_whole_and_costs_what_was_cut_off(
    world: NvmeWorld, pages: int
) -> None:
    full = len(world.disk.image)
    del world.disk.image[pages * PAGE_BYTES :]
    restarted(world)
    assert len(world.disk.image) == full
    held = world.held()
    check_repairs(world)
    assert len(held) <= CELLS
    assert (len(held) == 0) == (pages < 4)


def test_a_lost_catalog_is_made_anew_from_the_slab(world: NvmeWorld) -> None:
    world.delete(2)
    world.settle()
    world.catalog.damage = "a row does not match its checksum"
    restarted(world)
    assert {key for key, _ in world.held()} == {key_number(n) for n in (0, 1, 3, 4)}
    assert restarted(world).held() == world.promised


def test_a_rebuild_takes_the_newest_of_several_writes(world: NvmeWorld) -> None:
    """A slot of a disk that lies about its syncs: both writes of a cell are there."""
    record = world.tier.held_records()[0].copy()
    offset, size = int(record["offset"]), slot_bytes_of(int(record["length"]))
    kept = bytes(world.disk.image[offset : offset + size])
    world.delete(0)
    world.settle()
    assert stored(world, 20)  # takes the slot
    assert stored(world, 0)
    newest = max(int(r["sequence"]) for r in world.tier.held_records())
    world.delete(20)
    world.settle()
    world.disk.image[offset : offset + size] = kept
    world.catalog.damage = "gone"
    restarted(world)
    assert newest in world.tier.held_records()["sequence"]
    assert int(record["sequence"]) not in world.tier.held_records()["sequence"]
    assert loaded(world, 0) is Result.LOADED


def test_an_unreadable_first_page_is_written_anew_from_the_catalog(world: NvmeWorld) -> None:
    world.disk.image[:PAGE_BYTES] = bytes(PAGE_BYTES)
    assert restarted(world).held() == world.promised
    world.catalog.damage = "gone too, later"
    assert restarted(world).held() == world.promised


def test_with_neither_first_page_nor_catalog_it_starts_empty(world: NvmeWorld) -> None:
    world.disk.image[:PAGE_BYTES] = bytes(PAGE_BYTES)
    world.catalog.damage = "gone too"
    assert not restarted(world).held()
    check_repairs(world)


# Others' files


def test_files_of_another_version_are_refused_naming_both(world: NvmeWorld) -> None:
    image, rows = bytes(world.disk.image), dict(world.catalog.rows)
    newer = bytearray(world.catalog.identity)
    newer[16] = 9
    newer[8:16] = xxh3_64_intdigest(bytes(newer[16:])).to_bytes(8, "little")
    world.catalog.identity = bytes(newer)
    with pytest.raises(StateError, match=r"version 9, this is version 1"):
        recover(world.disk, world.catalog, wanted())
    world.disk.image[:IDENTITY_BYTES] = newer
    with pytest.raises(StateError, match=r"slab has format version 9"):
        recover(world.disk, world.catalog, wanted())
    assert bytes(world.disk.image[PAGE_BYTES:]) == image[PAGE_BYTES:]
    assert world.catalog.rows == rows


def test_files_of_another_node_are_refused_naming_both(world: NvmeWorld) -> None:
    with pytest.raises(StateError, match=r"of node node-a, this is node node-b"):
        recover(world.disk, world.catalog, wanted(node_id="node-b"))


def test_a_catalog_of_another_slab_is_refused_naming_both(world: NvmeWorld) -> None:
    other = NvmeWorld(seed=2)
    other.start()
    with pytest.raises(StateError, match=r"is of slab [0-9a-f]{32}, the slab beside it is"):
        recover(world.disk, other.catalog, wanted())


def wanted(node_id: str = "node-a", extents: int = EXTENTS) -> Wanted:
    return Wanted(node_id, EXTENT_BYTES, extents, CELLS_MAX, random.Random(3).randbytes)


@pytest.mark.parametrize("extents", [1, 2, 5])
def test_another_capacity_keeps_what_fits(world: NvmeWorld, extents: int) -> None:
    found = recover(world.disk, world.catalog, wanted(extents=extents))
    assert found.slab.identity.extents == extents
    assert len(world.disk.image) == found.slab.identity.slab_bytes
    assert len(found.records) == min(CELLS, 4 * extents)
    assert len(world.catalog.rows) == len(found.records)


# Time


@pytest.mark.parametrize("hours", [-5, 5])
def test_a_clock_that_was_moved_prolongs_no_life(hours: int) -> None:
    world = NvmeWorld(seed=1)
    world.start()
    assert stored(world, 1, ttl_s=3600)
    assert stored(world, 2)
    world.clock.wall_now_ms += hours * 3_600_000
    restarted(world)
    assert world.holds(2)
    assert world.holds(1) == (hours < 0)
    world.clock.advance(3600)
    assert not world.holds(1), "it outlives its class"
    world.take(world.tier.tick())
    world.settle()
    assert len(world.held()) == 1
    assert stored(world, 1, ttl_s=3600)


def test_a_touch_slides_an_expiry_and_survives_a_restart() -> None:
    world = NvmeWorld(seed=1)
    world.start()
    assert stored(world, 1, ttl_s=60)
    world.clock.advance(40)
    world.tier.touch(world.find(1).slots, world.tier.next_stamp())
    world.clock.advance(TOUCHES_S)
    world.take(world.tier.tick())
    world.settle()
    world.restart()
    world.clock.advance(50)
    assert world.holds(1)
    world.clock.advance(10)
    assert not world.holds(1)
    assert stored(world, 1), "what has expired stands in nobody's way"
    assert loaded(world, 1) is Result.LOADED


# Room


def test_a_size_that_has_no_slot_is_given_a_cold_extent(world: NvmeWorld) -> None:
    for number in range(CELLS, SLOTS):
        assert stored(world, number)
    world.tier.touch(world.find(0).slots, 1000)
    assert stored(world, 30, pages=5)
    assert world.holds(0), "the extent of a cell that was just used"
    assert world.tier.stats.evicted == 4
    assert all(stored(world, number, pages=5) for number in (31, 32, 33))
    world.check_accounting()
    check_repairs(restarted(world))


def test_what_is_read_is_not_evicted(world: NvmeWorld) -> None:
    for number in range(CELLS, SLOTS):
        assert stored(world, number)
    world.queue.is_eager = False
    reads = [world.load(number) for number in range(SLOTS)]
    ticket = world.store(30)
    world.take(world.tier.poll())
    assert isinstance(ticket, int)
    assert world.results[ticket] is Result.NO_ROOM
    world.queue.is_eager = True
    world.settle()
    assert [world.results[t] for t in reads if isinstance(t, int)] == [Result.LOADED] * SLOTS


def test_a_cell_that_is_deleted_while_it_is_read_or_written_is_gone(world: NvmeWorld) -> None:
    world.queue.is_eager = False
    read, written = world.load(1), world.store(10)
    deletes = [world.delete(1), world.delete(10)]
    world.queue.is_eager = True
    world.settle()
    assert isinstance(read, int)
    assert isinstance(written, int)
    assert [world.results[t] for t in (read, written)] == [Result.GONE] * 2
    assert [world.results[t] for t in deletes] == [Result.DELETED] * 2
    world.catalog.damage = "gone"
    restarted(world)
    assert not {key_number(1), key_number(10)} & {key for key, _ in world.held()}


def test_a_store_that_waits_for_room_does_not_outlive_its_delete(world: NvmeWorld) -> None:
    for number in range(CELLS, SLOTS):
        assert stored(world, number)
    world.queue.is_eager = False
    ticket = world.store(20)
    world.take(world.tier.poll())
    assert isinstance(ticket, int)
    assert ticket not in world.results, "somebody has to leave first"
    world.delete(20)
    world.queue.is_eager = True
    world.settle()
    assert world.results[ticket] is Result.GONE
    assert not world.holds(20)


def test_a_kept_cell_that_is_deleted_is_wiped_when_it_is_let_go(world: NvmeWorld) -> None:
    kept = world.find(1).slots
    for _ in range(2):
        world.tier.keep(kept)
    ticket = world.delete(1)
    world.settle()
    assert ticket not in world.results
    world.tier.let_go(kept)
    world.settle()
    assert ticket not in world.results, "kept twice"
    world.tier.let_go(kept)
    world.settle()
    assert world.results[ticket] is Result.DELETED
    for number in range(10, 10 + SLOTS):
        assert stored(world, number), "its slot is free"


def test_refusals_name_their_reason(world: NvmeWorld) -> None:
    world.queue.is_eager = False
    assert isinstance(world.store(10), int)
    assert world.store(10) is Declined.BUSY
    assert world.store(1) is Declined.HELD
    assert world.store(11, pages=7) is not Declined.TOO_LARGE
    spill, _ = next(iter(world.stores.values()))
    assert world.tier.store(replace(spill, key=b"k" * 32, length=EXTENT_BYTES)) is (
        Declined.TOO_LARGE
    )
    accepted = [world.tier.store(replace(spill, key=key_number(n))) for n in range(100, 400)]
    assert accepted[-1] is Declined.NO_ROOM
    assert WAITING_MAX <= sum(isinstance(one, int) for one in accepted) < 300


# What must not come back when the catalog is lost as well


def test_an_evicted_cell_that_is_deleted_later(world: NvmeWorld) -> None:
    """Its slot was wiped when it was freed, which no sync had made durable."""
    for number in range(CELLS, SLOTS + 1):
        assert stored(world, number, pages=1)
    evicted = [n for n in range(SLOTS + 1) if not world.holds(n)]
    assert evicted == [0]
    world.delete(SLOTS)  # leaves the slot free, that was the evicted cell's
    world.delete(0)
    world.settle()
    world.disk.lose()
    world.catalog.damage = "gone"
    restarted(world)
    assert {key for key, _ in world.held()} == {key_number(n) for n in range(1, SLOTS)}


def test_a_wipe_is_durable_when_a_later_delete_is_done(world: NvmeWorld) -> None:
    assert stored(world, 20, ttl_s=1)
    world.clock.advance(2)
    world.take(world.tier.tick())
    world.settle()  # it has expired: freed and wiped, not synced
    world.delete(20)
    world.settle()
    world.disk.lose()
    world.catalog.damage = "gone"
    world.clock.wall_now_ms -= 3000
    assert not restarted(world).holds(20)


def test_a_write_that_a_crash_cut_off_before_its_row(world: NvmeWorld) -> None:
    world.queue.is_eager = False
    world.store(20)
    world.queue.work()
    world.disk.sync()
    assert not restarted(world).holds(20)
    world.delete(20)
    world.settle()
    world.catalog.damage = "gone"
    assert not restarted(world).holds(20)


def test_a_touch_that_failed_is_not_written_down_later(world: NvmeWorld) -> None:
    world.tier.touch(world.find(1).slots, world.tier.next_stamp())
    world.steps.faults["commit"] = errno.EIO
    world.clock.advance(TOUCHES_S)
    world.take(world.tier.tick())
    world.settle()
    world.steps.faults.clear()
    world.delete(1)
    world.settle()
    world.clock.advance(RETRY_S)
    world.take(world.tier.tick())
    world.settle()
    assert set(world.catalog.rows) == world.held()


# Tombstones


def test_tombstones_are_kept_for_a_while_and_across_restarts(world: NvmeWorld) -> None:
    world.delete(1)
    world.settle()
    restarted(world)
    world.clock.advance(TOMBSTONE_S - 1)
    world.take(world.tier.tick())
    world.settle()
    assert set(world.catalog.buried) == {key_number(1)}
    world.clock.advance(1)
    world.take(world.tier.tick())
    world.settle()
    assert not world.catalog.buried


def test_a_delete_while_the_disk_is_away_is_done_when_it_is_back(world: NvmeWorld) -> None:
    world.queue.die()
    world.take(world.tier.poll())
    ticket = world.delete(1)
    world.clock.advance(1)
    world.take(world.tier.tick())
    assert not world.holds(1)
    world.settle()
    assert world.results[ticket] is Result.DELETED
    assert not restarted(world).holds(1)


# Packing


def test_slots_waste_little() -> None:
    lengths = np.array([*range(1, 200_000, 997), 2_949_120, 1 << 30], np.uint32)
    sizes = slot_bytes_of_all(lengths)
    assert sizes.tolist() == [slot_bytes_of(n) for n in lengths.tolist()]
    assert (sizes % PAGE_BYTES == 0).all()
    needed = lengths.astype(np.int64) + PAGE_BYTES
    assert (sizes >= needed).all()
    assert (sizes - needed <= needed / 16 + PAGE_BYTES).all()


def test_it_is_metadata_of_at_most_200_bytes_a_cell() -> None:
    shelf = Shelf(Identity(bytes(16), "n", 1 << 20, 8), 10_000)
    assert shelf.metadata_bytes() / 10_000 <= 200
