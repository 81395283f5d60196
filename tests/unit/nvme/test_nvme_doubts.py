"""A disk that refuses to read a cell: it is kept, and a miss, until it is read or stored again.

For a moment, for a while, and for good. Does not cover: promises (``test_nvme_doubts_promised``).
"""

import errno
from collections.abc import Sequence

import numpy as np
import pytest

from kvstore.fs import Mapped
from kvstore.tiers.nvme import doubts
from kvstore.tiers.nvme.drive import Stage
from kvstore.tiers.nvme.record import slot_bytes_of
from kvstore.tiers.nvme.spill import Declined, Result
from kvstore.tiers.nvme.tier import RETRY_S, TOUCHES_S
from tests.nvme_world import SLOTS, Crash, NvmeWorld
from tests.worlds import key_number

CELLS = 5
HOUR_S = 3600
WRITING = (Stage.WRITE, Stage.COMMIT)


@pytest.fixture
def world() -> NvmeWorld:
    """A tier that holds ``CELLS`` cells."""
    return filled(NvmeWorld(seed=1))


def filled(world: NvmeWorld) -> NvmeWorld:
    world.start()
    for number in range(CELLS):
        assert stored(world, number)
    world.tier.drain_changes()
    return world


def stored(world: NvmeWorld, number: int, ttl_s: int = 0) -> bool:
    ticket = world.store(number, ttl_s=ttl_s)
    world.settle()
    return isinstance(ticket, int) and world.results[ticket] is Result.STORED


def loaded(world: NvmeWorld, number: int) -> Result | Declined:
    ticket = world.load(number)
    world.settle()
    return world.results[ticket] if isinstance(ticket, int) else ticket


def refuse(world: NvmeWorld, *numbers: int) -> None:
    """The disk refuses to read these just now."""
    world.steps.faults["read"] = errno.EIO
    assert [loaded(world, number) for number in numbers] == [Result.FAILED] * len(numbers)
    del world.steps.faults["read"]


def pass_time(world: NvmeWorld, seconds: float) -> None:
    for _ in range(round(seconds / RETRY_S)):
        world.clock.advance(RETRY_S)
        world.take(world.tier.tick())
        world.settle()


def is_kept(world: NvmeWorld, number: int) -> bool:
    return (key_number(number), 0) in world.held()


def record_of(world: NvmeWorld, number: int) -> np.void:
    records = world.tier.held_records()
    record: np.void = next(r for r in records if r["key"].tobytes() == key_number(number)).copy()
    return record


def told(world: NvmeWorld) -> list[tuple[bytes, bool]]:
    return [(change.key, change.added) for change in world.tier.drain_changes()]


class BadPlace:
    """A place of a world's disk that can be written, and never be read."""

    def __init__(self, world: NvmeWorld, number: int) -> None:
        self.reads = 0
        """Of that place."""
        self._offset = int(record_of(world, number)["offset"])
        self._read = world.disk.read
        world.disk.read = self.read  # type: ignore[method-assign]

    def read(self, buffers: Sequence[Mapped], offset: int) -> int:
        if offset == self._offset:
            self.reads += 1
            raise OSError(errno.EIO, "a bad sector")
        return self._read(buffers, offset)


def test_it_is_a_miss_and_kept(world: NvmeWorld) -> None:
    refuse(world, 3)
    assert loaded(world, 3) is Declined.GONE
    assert told(world) == [(key_number(3), False)]
    assert is_kept(world, 3)
    assert len(world.tier.sure_records()) == CELLS - 1
    world.check_accounting()
    world.restart()
    assert loaded(world, 3) is Result.LOADED, "a new life knows nothing of it"


def test_it_is_found_again_once_the_disk_has_read_it(world: NvmeWorld) -> None:
    refuse(world, 1, 3)
    told(world)
    world.steps.faults["read"] = errno.EIO
    pass_time(world, 60)
    assert told(world) == []
    del world.steps.faults["read"]
    pass_time(world, doubts.PAUSE_S[1] + 2)
    assert sorted(told(world)) == sorted([(key_number(1), True), (key_number(3), True)])
    assert [loaded(world, number) for number in range(CELLS)] == [Result.LOADED] * CELLS


def test_a_check_needs_no_place_in_the_arena(world: NvmeWorld) -> None:
    refuse(world, 3)
    arena = world.arena.copy()
    pass_time(world, 2)
    assert world.holds(3)
    assert (world.arena == arena).all()


def test_a_store_takes_its_place(world: NvmeWorld) -> None:
    refuse(world, 3)
    told(world)
    before, number = record_of(world, 3), int(world.tier.locate(*name(3)).slots[0])
    world.steps.faults["read"] = errno.EIO
    assert stored(world, 3), "it need not be read for that"
    del world.steps.faults["read"]
    assert told(world) == [(key_number(3), True)]
    assert record_of(world, 3)["offset"] != before["offset"]
    assert int(world.tier.locate(*name(3)).slots[0]) == number, "who keeps it goes on with it"
    assert loaded(world, 3) is Result.LOADED
    world.check_accounting()
    for more in range(CELLS, SLOTS):
        assert stored(world, more)
    assert len(world.held()) == SLOTS, "the slot of before is free"
    world.restart(power_lost=False)
    assert loaded(world, 3) is Result.LOADED
    world.catalog.damage = "made to be lost"
    world.restart(power_lost=False)
    assert len(world.held()) == SLOTS
    assert loaded(world, 3) is Result.LOADED


def name(number: int) -> tuple[np.ndarray, np.ndarray]:
    key = np.frombuffer(key_number(number), np.uint8).reshape(1, -1)
    return key, np.zeros(1, np.uint8)


@pytest.mark.parametrize("seed", range(3))
def test_wherever_the_power_fails_while_it_is_stored_again_it_is_there(seed: int) -> None:
    crash_at, crashed = 0, True
    first = None
    while crashed:
        world = filled(NvmeWorld(seed))
        refuse(world, 3)
        first = world.steps.taken if first is None else first
        crash_at += 1
        world.steps.crash_at = first + crash_at
        try:
            assert stored(world, 3)
            crashed = False
        except Crash:
            pass
        world.steps.crash_at = 0
        world.promised = {(key_number(number), 0) for number in range(CELLS)}
        del world.tier
        world.disk.crash()
        world.start()
        world.free_arena = list(range(20))
        assert world.promised <= world.held()
        world.check_all_load()
        assert world.promised <= world.held(), "a held cell could not be read"
        world.check_accounting()
    assert crash_at > 3


@pytest.mark.parametrize("is_written", [False, True])
def test_with_its_catalog_lost_a_write_that_was_torn_takes_no_place(is_written: bool) -> None:
    world = filled(NvmeWorld(1))
    refuse(world, 3)
    former = record_of(world, 3)
    world.queue.is_eager = False
    world.store(3)
    world.queue.work()
    world.disk.sync()
    (offset,) = {
        offset
        for offset in range(0, len(world.disk.image), 4096)
        if key_number(3) in bytes(world.disk.image[offset : offset + 4096])
    } - {int(former["offset"])}
    if not is_written:
        world.disk.image[offset + 4096 : offset + 8192] = bytes(4096)
    world.catalog.damage = "made to be lost"
    world.restart(power_lost=False)
    assert (record_of(world, 3)["offset"] != former["offset"]) == is_written
    assert loaded(world, 3) is Result.LOADED


@pytest.mark.parametrize("operation", ["write", "sync", "commit"])
def test_a_store_that_is_refused_takes_no_place(world: NvmeWorld, operation: str) -> None:
    refuse(world, 3)
    told(world)
    world.steps.faults[operation] = errno.EIO
    assert not stored(world, 3)
    world.steps.faults.clear()
    assert told(world) == []
    pass_time(world, 3)
    assert told(world) == [(key_number(3), True)]
    assert loaded(world, 3) is Result.LOADED
    pass_time(world, 5)
    assert stored(world, 10)
    world.check_accounting()


def test_whoever_still_reads_the_slot_of_before_gets_nothing(world: NvmeWorld) -> None:
    """And the slot is not written again under them."""
    world.queue.is_eager = False
    reads = [world.load(3), world.load(3)]
    world.steps.faults["read"] = errno.EIO
    work(world, Stage.READ)
    del world.steps.faults["read"]
    written = world.store(3)
    assert isinstance(written, int)
    while written not in world.results:
        work(world, *WRITING)
    world.queue.is_eager = True
    world.settle()
    results = [world.results[ticket] for ticket in reads if isinstance(ticket, int)]
    assert sorted(results, key=lambda one: one.name) == [Result.FAILED, Result.GONE]
    assert loaded(world, 3) is Result.LOADED
    for more in range(CELLS, SLOTS):
        assert stored(world, more)
    assert len(world.held()) == SLOTS


def test_one_that_is_read_while_it_is_stored_again_is_told_once(world: NvmeWorld) -> None:
    refuse(world, 3)
    told(world)
    offset = record_of(world, 3)["offset"]
    world.queue.is_eager = False
    ticket = world.store(3)
    world.clock.advance(RETRY_S)
    world.take(world.tier.tick())
    work(world, Stage.READ)
    assert world.holds(3)
    assert ticket not in world.results
    assert record_of(world, 3)["offset"] == offset
    world.queue.is_eager = True
    world.settle()
    assert told(world) == [(key_number(3), True)]
    assert record_of(world, 3)["offset"] != offset, "that is what its row says by now"
    world.restart(power_lost=False)
    assert loaded(world, 3) is Result.LOADED


def work(world: NvmeWorld, *stages: Stage) -> None:
    """A step of one of these stages."""
    queues = world.queue._queues
    others = {stage: queue for stage, queue in queues.items() if stage not in stages}
    world.queue._queues = queues | {stage: [] for stage in others}
    world.queue.work()
    for stage, queue in others.items():
        world.queue._queues[stage][:0] = queue
    world.take(world.tier.poll())


@pytest.mark.parametrize("is_stored_again", [False, True])
def test_it_can_be_deleted(world: NvmeWorld, is_stored_again: bool) -> None:
    refuse(world, 3)
    world.queue.is_eager = False
    pass_time(world, 0)
    world.clock.advance(RETRY_S)
    world.take(world.tier.tick())
    if is_stored_again:
        world.store(3)
    ticket = world.delete(3)
    world.queue.is_eager = True
    world.settle()
    assert world.results[ticket] is Result.DELETED
    assert not is_kept(world, 3)
    assert (key_number(3), 0) not in world.catalog.rows
    world.check_accounting()
    world.catalog.damage = "made to be lost"
    world.restart()
    assert not is_kept(world, 3)


def test_it_may_be_evicted_and_is_told_gone_once(world: NvmeWorld) -> None:
    refuse(world, 0)
    world.steps.faults["read"] = errno.EIO
    for more in range(CELLS, SLOTS + 1):
        assert stored(world, more)
    assert not is_kept(world, 0)
    assert told(world).count((key_number(0), False)) == 1
    assert stored(world, 0)


def test_a_store_does_not_make_room_for_itself_of_what_it_is_to_replace(world: NvmeWorld) -> None:
    for more in range(CELLS, SLOTS):
        assert stored(world, more)
    refuse(world, 3)
    others = np.array([n for n in range(SLOTS) if n != record_number(world, 3)], np.uint32)
    world.tier.keep(others)
    ticket = world.store(3)
    world.settle()
    assert isinstance(ticket, int)
    assert world.results[ticket] is Result.NO_ROOM
    assert is_kept(world, 3)
    world.tier.let_go(others[:1])
    assert stored(world, 3)
    assert loaded(world, 3) is Result.LOADED
    world.tier.let_go(others[1:])
    assert world.tier._open is not None
    assert not world.tier._open.shelf._pins.any(), "it was kept for both stores"
    world.check_accounting()


def record_number(world: NvmeWorld, number: int) -> int:
    return int(world.tier.locate(*name(number)).slots[0])


def test_what_takes_its_place_lives_as_long_as_either() -> None:
    world = NvmeWorld(1)
    world.start()
    assert stored(world, 0, ttl_s=HOUR_S)
    assert stored(world, 1, ttl_s=60)
    assert stored(world, 2)
    refuse(world, 0, 1, 2)
    for number, ttl_s in ((0, 60), (1, HOUR_S), (2, 60)):
        assert stored(world, number, ttl_s)
    pass_time(world, TOUCHES_S)
    world.restart(power_lost=False)
    world.clock.advance(HOUR_S - TOUCHES_S - 1)
    assert [world.holds(number) for number in range(3)] == [True, True, True]
    world.clock.advance(2)
    assert [world.holds(number) for number in range(3)] == [False, False, True]


def test_a_use_that_is_written_down_late_brings_no_former_slot_back(world: NvmeWorld) -> None:
    refuse(world, 3)
    world.queue.is_eager = False
    ticket = world.store(3)
    world.tier.set_expiry(np.array([record_number(world, 3)], np.uint32), np.zeros(1, np.uint64))
    world.queue.work()
    world.take(world.tier.poll())
    world.clock.advance(TOUCHES_S)
    world.take(world.tier.tick())
    world.queue.is_eager = True
    world.settle()
    assert isinstance(ticket, int)
    assert world.results[ticket] is Result.STORED
    world.restart(power_lost=False)
    assert loaded(world, 3) is Result.LOADED


def test_one_that_turns_out_damaged_is_dropped(world: NvmeWorld) -> None:
    refuse(world, 3)
    world.disk.flip((int(record_of(world, 3)["offset"]) + 5000) * 8)
    pass_time(world, 2)
    assert not is_kept(world, 3)
    assert world.tier.stats.damaged == 1
    assert told(world) == [(key_number(3), False)]


def test_a_disk_that_refuses_everything_for_a_day_loses_nothing(world: NvmeWorld) -> None:
    world.steps.faults["read"] = errno.EIO
    for number in range(CELLS):
        assert loaded(world, number) is Result.FAILED
    steps = world.steps.taken
    pass_time(world, 24 * HOUR_S)
    checks = world.steps.taken - steps
    assert CELLS < checks < CELLS * 24 * HOUR_S / doubts.PAUSE_S[1]
    del world.steps.faults["read"]
    pass_time(world, doubts.PAUSE_S[1] + 2)
    assert [loaded(world, number) for number in range(CELLS)] == [Result.LOADED] * CELLS


def test_a_place_that_is_bad_for_good_is_given_up(
    world: NvmeWorld, caplog: pytest.LogCaptureFixture
) -> None:
    bad = BadPlace(world, 3)
    assert loaded(world, 3) is Result.FAILED
    pass_time(world, HOUR_S)
    assert is_kept(world, 3), "nothing shows that the disk reads at all"
    reads = bad.reads
    assert reads < HOUR_S / doubts.PAUSE_S[1] + 10
    minutes = 0
    while is_kept(world, 3):
        assert loaded(world, 1) is Result.LOADED
        pass_time(world, 60)
        minutes += 1
    assert 10 <= minutes <= 60
    assert "never this one" in caplog.text
    assert world.tier.stats.damaged == 1
    assert told(world) == [(key_number(3), False)]
    assert stored(world, 3)
    world.check_accounting()


def test_a_bad_place_keeps_nobody_else_in_doubt(world: NvmeWorld) -> None:
    bad = BadPlace(world, 3)
    refuse(world, 0, 1, 2, 3, 4)
    pass_time(world, 4)
    assert [loaded(world, number) for number in (0, 1, 2, 4)] == [Result.LOADED] * 4
    assert not world.holds(3)
    assert bad.reads <= 4
    assert slot_bytes_of(int(record_of(world, 3)["length"])) * CELLS == world.tier.stats.held_bytes
