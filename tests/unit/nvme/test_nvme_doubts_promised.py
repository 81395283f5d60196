"""A node whose disk refuses to read what is promised, or wanted: kept, told gone, and stored again.

Does not cover: what the tier itself does with such a cell (``test_nvme_doubts``).
"""

import errno
import random
from collections.abc import Iterator

import numpy as np
import pytest

from kvstore.calls import CellOutcome, HoldOutcome
from kvstore.changes import Changes
from tests.life_world import TENANT, LifeWorld, keys_of
from tests.worlds import PAGE, cells_of, key_number, shared_folder


@pytest.fixture
def world() -> Iterator[LifeWorld]:
    with shared_folder() as folder:
        yield LifeWorld(folder, arena_pages=32, hold_bytes=8 * PAGE)


def refuse(world: LifeWorld, *numbers: int) -> None:
    """What only the disk has can't be read just now."""
    world.evict_all()
    world.disk.steps.faults["read"] = errno.EIO
    outcomes = world.acquire(*numbers).outcomes.tolist()
    assert outcomes == [CellOutcome.MISS] * len(numbers)


def heal(world: LifeWorld) -> None:
    world.disk.steps.faults.clear()


def flood(world: LifeWorld) -> None:
    """More than the arena and the disk have room for."""
    for number in range(100, 140):
        world.put(number)
        world.put(number)
        world.pass_time(0.2)
    world.pass_time(0.5)


def pins(world: LifeWorld) -> int:
    return int(world.host._pins.sum())


def kept_below(world: LifeWorld) -> int:
    shelf = world.nvme._open.shelf if world.nvme._open else None
    return 0 if shelf is None else int(shelf._pins.sum())


def is_leased(world: LifeWorld, number: int) -> bool:
    reply = world.acquire(number)
    world.node.release(world.session, reply.lease)
    return bool(reply.outcomes[0] == CellOutcome.FOUND)


def test_a_held_cell_outlives_a_disk_that_refuses_to_read_it(world: LifeWorld) -> None:
    world.put_twice(1)
    world.hold(1)
    refuse(world, 1)
    world.pass_time(5)
    assert world.found(1) == [False], "nobody is sent there in vain"
    flood(world)
    assert len(world.life.holds_of(TENANT)) == 1
    assert kept_below(world) == 1
    world.pass_time(60)
    assert len(world.life.holds_of(TENANT)) == 0, "its time is up"
    assert kept_below(world) == 0


def test_a_held_cell_is_there_again_when_the_disk_reads(world: LifeWorld) -> None:
    world.put_twice(1)
    world.hold(1, ttl_s=600)
    refuse(world, 1)
    flood(world)
    heal(world)
    world.pass_time(31)
    assert world.found(1) == [True]
    assert is_leased(world, 1)
    flood(world)
    assert is_leased(world, 1)
    assert world.life.release_hold(TENANT, "h")
    assert (pins(world), kept_below(world)) == (0, 0)


def test_what_is_put_again_is_kept_in_the_arena_until_the_disk_has_it_anew(
    world: LifeWorld,
) -> None:
    world.put_twice(1)
    world.hold(1, ttl_s=600)
    refuse(world, 1)
    world.disk.steps.faults["write"] = errno.EIO
    assert world.put(1) == [CellOutcome.STORED]
    world.pass_time(1.1)
    assert (pins(world), kept_below(world)) == (1, 0)
    flood(world)
    assert world.above(1)
    assert is_leased(world, 1)
    heal(world)
    world.disk.steps.faults["read"] = errno.EIO
    world.pass_time(7)
    assert world.below(1), "written anew"
    assert (pins(world), kept_below(world)) == (0, 1)
    heal(world)
    flood(world)
    assert not world.above(1)
    assert is_leased(world, 1)
    assert world.life.release_hold(TENANT, "h")
    assert (pins(world), kept_below(world)) == (0, 0)


def test_a_promise_of_what_is_in_doubt_keeps_the_copy_in_the_arena(world: LifeWorld) -> None:
    world.put_twice(1)
    refuse(world, 1)
    assert world.hold(1).outcome is HoldOutcome.NOT_HELD, "who knows whether it can be kept"
    assert world.put(1) == [CellOutcome.STORED]
    world.queue.is_eager = False
    assert world.hold(1).outcome is HoldOutcome.GRANTED
    assert (pins(world), kept_below(world)) == (1, 0)
    world.queue.is_eager = True
    world.pass_time(2)
    assert kept_below(world) == 1


def test_a_promise_that_ends_while_another_lasts(world: LifeWorld) -> None:
    """One counts on the disk, in doubt, one in the arena."""
    world.put_twice(1)
    world.hold(1, handle="a", ttl_s=600)
    refuse(world, 1)
    world.put(1)
    world.queue.is_eager = False
    world.hold(1, handle="b", ttl_s=600)
    for handle in ("a", "b"):
        assert pins(world) + kept_below(world) > 0
        assert world.life.release_hold(TENANT, handle)
    world.queue.is_eager = True
    world.pass_time(2)
    assert (pins(world), kept_below(world)) == (0, 0)


def test_a_held_cell_lives_on_behind_its_end_when_it_is_put_again(world: LifeWorld) -> None:
    world.put_twice(1, ttl_s=20)
    world.hold(1, ttl_s=100)
    refuse(world, 1)
    world.put(1, ttl_s=20)
    heal(world)
    world.pass_time(5)
    world.evict_all()
    world.pass_time(60)
    assert world.found(1) == [True]
    assert is_leased(world, 1)


def test_nor_does_it_expire_in_the_arena_while_the_disk_takes_nothing(world: LifeWorld) -> None:
    world.put_twice(1, ttl_s=20)
    world.hold(1, ttl_s=100)
    refuse(world, 1)
    world.disk.steps.faults["write"] = errno.EIO
    world.put(1, ttl_s=20)
    world.pass_time(60)
    assert is_leased(world, 1)


def test_the_arenas_copy_of_what_is_in_doubt_does_not_leave_first(world: LifeWorld) -> None:
    world.put_twice(1)
    refuse(world, 1)
    world.queue.is_eager = False
    world.put(1)
    slot = world.host.find(keys_of(1), cells_of(0)).slots
    world.host.expend(slot)
    assert not world.host._policy.is_below(int(slot[0]))
    for number in range(200, 216):
        world.put(number)
    world.queue.is_eager = True


def test_what_is_used_again_is_written_anew(world: LifeWorld) -> None:
    world.put_twice(1)
    refuse(world, 1)
    world.put_twice(1)
    heal(world)
    world.evict_all()
    assert is_leased(world, 1)
    assert world.nvme.stats.stored == 2


def test_the_node_tells_what_can_be_found_in_turns(world: LifeWorld) -> None:
    told: set[tuple[bytes, int]] = set()
    rng = random.Random(5)
    for _ in range(300):
        number = rng.randrange(20)
        if rng.random() < 0.5:
            world.put(number)
        else:
            world.node.release(world.session, world.acquire(number).lease)
        if rng.random() < 0.3:
            world.evict_all()
        if rng.random() < 0.2:
            heal(world)
        elif rng.random() < 0.2:
            world.disk.steps.faults["read"] = errno.EIO
        if rng.random() < 0.7:
            world.pass_time(rng.choice((0.1, 0.5, 3)))
        changes = world.node.drain_changes()
        for key, cell, added in zip(changes.keys, changes.cells, changes.added, strict=True):
            name = (key.tobytes(), int(cell))
            assert (name in told) != added
            (told.add if added else told.discard)(name)
        assert told == names(world.node.snapshot())
        assert {key_number(n) for n in range(20) if world.found(n)[0]} == {key for key, _ in told}
    assert world.nvme.stats.failed > 5
    assert world.nvme.stats.loaded > 5


def names(changes: Changes) -> set[tuple[bytes, int]]:
    keys = [key.tobytes() for key in changes.keys]
    return set(zip(keys, np.asarray(changes.cells).tolist(), strict=True))
