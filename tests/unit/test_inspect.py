"""Inspect: what a node says of a block is what is there, how long it lives, and who wants it."""

from collections.abc import Iterator

import pytest

from kvstore.calls import INSPECT_KEYS_MAX, Inspection
from kvstore.errors import UsageError
from tests.life_world import LifeWorld, keys_of
from tests.worlds import key_number, new_cell, packed, shared_folder


@pytest.fixture
def world() -> Iterator[LifeWorld]:
    with shared_folder() as folder:
        yield LifeWorld(folder, arena_pages=32)


def inspect(world: LifeWorld, number: int) -> Inspection:
    (found,) = world.life.inspect(keys_of(number))
    assert found.key == key_number(number)
    return found


def test_nothing_is_known_of_what_was_never_there(world: LifeWorld) -> None:
    assert inspect(world, 1) == Inspection(key_number(1), 0, 0, 0, 0, 0, (), None, None)
    assert world.life.inspect(keys_of()) == []


def test_which_cells_are_where(world: LifeWorld) -> None:
    for cell in (0, 3, 63):
        world.put(1, cell=cell)
    found = inspect(world, 1)
    assert (found.arena_mask, found.disk_mask) == (1 | 1 << 3 | 1 << 63, 0)
    assert found.size_bytes == 3 * new_cell(1).length
    world.put(1)
    world.pass_time()
    found = inspect(world, 1)
    assert (found.arena_mask, found.disk_mask) == (1 | 1 << 3 | 1 << 63, 1)
    assert found.size_bytes == 4 * new_cell(1).length


def test_how_long_it_lives(world: LifeWorld) -> None:
    world.put(1, ttl_s=60)
    world.put(1, cell=1)
    world.pass_time(20)
    found = inspect(world, 1)
    assert (found.ttl_s, found.remaining_ms) == (60, 40_000), "of the cell that goes first"
    world.pass_time(40)
    found = inspect(world, 1)
    assert (found.arena_mask, found.ttl_s, found.remaining_ms) == (2, 0, 0)


def test_when_its_bytes_were_checked(world: LifeWorld) -> None:
    world.put_twice(1)
    world.pass_time(10)
    assert 9_000 <= (inspect(world, 1).verified_ms_ago or 0) <= 12_000
    world.evict_all()
    world.pass_time(10)
    world.acquire(1)
    assert (inspect(world, 1).verified_ms_ago or 0) <= 1_000, "the load read it"
    world.restart()
    assert inspect(world, 1).verified_ms_ago is None, "nobody has read the disk since"
    world.host.delete(keys_of(1))
    world.acquire(1)
    assert inspect(world, 1).verified_ms_ago is not None


def test_who_wants_it_and_that_it_was_deleted(world: LifeWorld) -> None:
    world.put(1, 2)
    world.hold(1, 2, handle="a", ttl_s=60)
    world.hold(1, handle="b", ttl_s=90)
    world.pass_time(10)
    marks = {mark.handle: mark.remaining_ms for mark in inspect(world, 1).holds}
    assert marks == {"a": 50_000, "b": 80_000}
    assert [mark.handle for mark in inspect(world, 2).holds] == ["a"]
    world.delete(1)
    world.pass_time(5)
    found = inspect(world, 1)
    assert (found.arena_mask, found.holds, found.buried_ms_ago) == (0, (), 5_000)


def test_a_sealed_node_says_what_it_has(world: LifeWorld) -> None:
    world.life.keep_company()
    world.put_twice(1)
    world.restart()
    assert world.life.is_sealed
    assert (inspect(world, 1).arena_mask, inspect(world, 1).disk_mask) == (1, 1)


def test_a_clock_that_was_set_back_makes_no_life_longer(world: LifeWorld) -> None:
    world.put_twice(1, ttl_s=60)
    world.put(2, ttl_s=60)
    world.clock.wall_now_ms -= 3_600_000
    world.restart()
    assert inspect(world, 1).disk_mask == 1
    assert inspect(world, 1).remaining_ms == 60_000
    assert inspect(world, 2).remaining_ms == 60_000


def test_too_many_keys_are_a_callers_bug(world: LifeWorld) -> None:
    with pytest.raises(UsageError, match="fewer"):
        world.life.inspect(packed([key_number(1)] * (INSPECT_KEYS_MAX + 1)))
