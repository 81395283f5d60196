"""Bursts of puts into a tiny arena, on a disk that has time for a part of them only.

Prompts of up to four blocks, an arena of eight, a disk that works when the test lets it. Whatever
the disk had time for: no put is refused or waits, memory stays within its bounds, a look-up finds
what either tier holds, what the node keeps of a prompt is its beginning, and what it lost was
counted.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.calls import CellOutcome
from kvstore.tiers import write_behind
from kvstore.tiers.tier import NewCell
from kvstore.tiers.write_behind import LOOK_S, LOW_WATER_SHARE, UNDER_WAY_SHARE
from tests import behind_world, nvme_world
from tests.behind_world import ARENA_PAGES, World, empty_world, new_world
from tests.worlds import PAGE, cells_of, key_number, new_cell, packed, shared_folder

BLOCKS_MAX = 4
PROMPTS = 24
CELL_PAGES = 2
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.integers(1, PROMPTS), st.integers(1, BLOCKS_MAX)),
        st.tuples(st.just("put"), st.integers(1, PROMPTS), st.just(BLOCKS_MAX)),
        st.tuples(st.just("use"), st.integers(1, PROMPTS), st.just(0)),
        st.tuples(st.just("disk"), st.integers(1, 5), st.just(0)),
        st.tuples(st.just("tick"), st.integers(1, 2), st.just(0)),
    ),
    max_size=60,
)


@contextmanager
def world_with_a_slow_disk() -> Iterator[World]:
    """Room on the disk for everything, and time for nothing before ``work``."""
    with shared_folder() as folder, pytest.MonkeyPatch.context() as patched:
        patched.setattr(nvme_world, "EXTENTS", PROMPTS * BLOCKS_MAX)
        for module in (nvme_world, behind_world):
            patched.setattr(module, "CELLS_MAX", PROMPTS * BLOCKS_MAX)
        world = empty_world(folder)
        world.queue.is_eager = False
        yield world


def blocks_of(prompt: int, count: int) -> list[NewCell]:
    return [new_cell(10 * prompt + depth, depth=depth) for depth in range(count)]


def work(world: World, steps: int) -> None:
    """The disk does something, and says so."""
    for _ in range(steps):
        if world.queue.has_work():
            world.queue.work()
        world.node.behind.poll()


def held(world: World, prompt: int) -> list[bool]:
    numbers = range(10 * prompt, 10 * prompt + BLOCKS_MAX)
    return [world.above(number) or world.below(number) for number in numbers]


def check(world: World, put: dict[int, int]) -> None:
    """What holds at any time; ``put`` says how many blocks of each prompt were put."""
    stats = world.host.stats
    assert stats.held_bytes <= ARENA_PAGES * PAGE
    pinned = int((world.host._pins > 0).sum())
    assert pinned <= max(1, UNDER_WAY_SHARE * ARENA_PAGES / CELL_PAGES)
    for prompt, count in put.items():
        here = held(world, prompt)
        length = sum(here)
        assert here == [True] * length + [False] * (BLOCKS_MAX - length), "a hole"
        keys = packed([new.key for new in blocks_of(prompt, count)])
        assert world.node.lookup(keys, 1) == length
    lost = sum(put.values()) - sum(sum(held(world, prompt)) for prompt in put)
    assert lost <= stats.dropped_unspilled <= stats.evicted


@settings(max_examples=60, deadline=None, derandomize=True)
@given(steps=STEPS)
def test_whatever_the_disk_has_time_for(steps: list[tuple[str, int, int]]) -> None:
    with world_with_a_slow_disk() as world:
        put: dict[int, int] = {}
        for what, number, count in steps:
            if what == "put":
                outcomes = world.put_cells(blocks_of(number, count))
                assert set(outcomes) <= {CellOutcome.STORED, CellOutcome.PRESENT}, "refused"
                put[number] = max(count, put.get(number, 0))
            elif what == "use":
                world.node.touch(packed([key_number(10 * number + d) for d in range(4)]), 1)
            elif what == "disk":
                work(world, number)
            else:
                world.pass_time(number / 10)
            check(world, put)


def test_a_disk_that_keeps_up_loses_nothing() -> None:
    with world_with_a_slow_disk() as world:
        world.queue.is_eager = True
        for prompt in range(PROMPTS):
            world.put_cells(blocks_of(prompt, 2))
            world.pass_time(0.3)
        assert world.host.stats.evicted >= 2 * PROMPTS - ARENA_PAGES // CELL_PAGES
        assert world.host.stats.dropped_unspilled == 0
        assert all(sum(held(world, prompt)) == 2 for prompt in range(PROMPTS))


def test_what_a_burst_finds_on_the_disk_goes_first_and_the_rest_is_counted() -> None:
    with world_with_a_slow_disk() as world:
        for prompt in range(2):
            world.put_cells(blocks_of(prompt, 4))
        world.pass_time(0.2)
        while world.queue.has_work():
            work(world, 1)
        spilled = [n for n in range(20) if world.below(n)]
        assert len(spilled) == LOW_WATER_SHARE * ARENA_PAGES / CELL_PAGES
        assert spilled == [0, 1], "the oldest, head first"
        world.put_cells(blocks_of(2, 2))
        assert world.host.stats.dropped_unspilled == 0
        assert not world.above(0)
        assert not world.above(1)
        world.put_cells(blocks_of(3, 1))
        assert world.host.stats.dropped_unspilled == 1
        assert not world.above(3), "the tail of the oldest"
        assert held(world, 0) == [True, True, True, False]


@pytest.mark.parametrize("steps_before", [0, 1, 99])
def test_what_is_used_before_a_burst_stays(steps_before: int) -> None:
    """While it waits for the disk, is read by it, or has been written."""
    with world_with_a_slow_disk() as world:
        for prompt in range(2):
            world.put_cells(blocks_of(prompt, 4))
        world.pass_time(0.2)
        work(world, steps_before)
        world.node.touch(packed([new.key for new in blocks_of(0, 4)]), 1)
        work(world, 99)
        world.put_cells(blocks_of(2, 2))
        assert all(world.above(number) for number in range(4))
        assert held(world, 1) == [True, True, False, False]
        assert world.host.stats.dropped_unspilled == 2


def test_a_put_sees_to_it_that_the_next_one_has_room() -> None:
    with world_with_a_slow_disk() as world:
        for prompt in range(2):
            world.put_cells(blocks_of(prompt, 4))
        assert not world.queue.has_work()
        world.clock.advance(LOOK_S)
        world.put_cells(blocks_of(0, 1))
        assert world.queue.has_work()


def test_what_waits_for_the_disk_waits_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write_behind, "LOW_WATER_SHARE", 0.5)
    with world_with_a_slow_disk() as world:
        for number in range(8):
            world.put_cells(blocks_of(number, 1))
            world.pass_time(0.1)
        waiting = [due.slot for due in world.node.behind._writes._next]
        assert len(waiting) == len(set(waiting)) == 3, "and one is under way"


def test_without_a_disk_nothing_was_to_be_spilled() -> None:
    with world_with_a_slow_disk() as world:
        world.host.lie_above(None)
        for prompt in range(6):
            world.put_cells(blocks_of(prompt, 4))
        assert world.host.stats.evicted > 0
        assert world.host.stats.dropped_unspilled == 0


def test_a_prompt_has_one_stamp_in_both_tiers() -> None:
    """So the disk, too, evicts it tail first, however many steps it came in."""
    with world_with_a_slow_disk() as world:
        world.host.go_on_after(1000)
        for prompt in range(2):
            world.put_cells(blocks_of(prompt, 4))
        world.queue.is_eager = True
        world.pass_time(1)
        assert [world.below(number) for number in range(4)] == [True, True, False, False]
        world.put_cells(blocks_of(0, 4))
        world.pass_time(1)
        assert all(world.below(number) for number in range(4))
        found = world.host.find(packed([new.key for new in blocks_of(0, 4)]), cells_of(*[0] * 4))
        stamps = set(world.host.table.slots["stamp"][found.slots].tolist())
        records = world.nvme.held_records()
        assert set(records["stamp"][records["span"] < 4].tolist()) == stamps
        assert len(stamps) == 1


def test_stamps_of_a_new_arena_are_newer_than_those_on_the_disk() -> None:
    with world_with_a_slow_disk() as world, shared_folder() as folder:
        world.queue.is_eager = True
        world.host.go_on_after(1000)
        for _ in range(2):
            world.put_cells(blocks_of(0, 4))
        world.pass_time(1)
        late = new_world(folder, world.clock, world.disk, world.catalog, incarnation=2)
        late.pass_time(0.2)
        assert late.nvme.stats.held_cells == 4
        assert late.host.next_stamp() > 1000
