"""What every tier must do, whatever it keeps cells in.

Nothing is visible before it is whole; what goes frees exactly what it took; what is over its time
is not found; a refusal costs nobody; a successor has what was whole and nothing else; damage is a
miss. See ``tests.property.tier_adapters`` for how a tier joins.
"""

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.block import HEADER_BYTES
from tests.property.tier_adapters import ADAPTERS, CELLS, TierAdapter
from tests.worlds import new_cell, shared_folder

REST_S = 1.0
"""Longer than anything that was freed rests."""


@pytest.fixture(params=ADAPTERS)
def kind(request: pytest.FixtureRequest) -> type[TierAdapter]:
    found: type[TierAdapter] = ADAPTERS[request.param]
    return found


@pytest.fixture
def tier(kind: type[TierAdapter]) -> Iterator[TierAdapter]:
    with shared_folder() as folder:
        yield kind(folder)


def store(tier: TierAdapter, *numbers: int, ttl_s: int = 0) -> None:
    for number in numbers:
        new = new_cell(number, ttl_s=ttl_s)
        assert tier.begin(new)
        tier.finish(new)


def held(tier: TierAdapter, numbers: range) -> list[int]:
    return [number for number in numbers if tier.holds(new_cell(number))]


def test_nothing_is_visible_before_it_is_whole(tier: TierAdapter) -> None:
    assert tier.begin(new_cell(1))
    assert not tier.holds(new_cell(1))
    tier.finish(new_cell(1))
    assert tier.holds(new_cell(1))


def test_what_its_writer_gives_up_leaves_nothing(tier: TierAdapter) -> None:
    empty = tier.accounted_bytes()
    tier.begin(new_cell(1))
    tier.give_up(new_cell(1))
    assert not tier.holds(new_cell(1))
    assert tier.accounted_bytes() == empty
    assert tier.changes() == []
    store(tier, 1)


def test_what_is_evicted_frees_what_it_took(tier: TierAdapter) -> None:
    empty = tier.accounted_bytes()
    store(tier, 1, 2)
    both = tier.accounted_bytes()
    assert both[0] > 0
    assert sum(both) == sum(empty)
    tier.evict(new_cell(1))
    assert held(tier, range(4)) == [2]
    tier.evict(new_cell(2))
    assert tier.accounted_bytes() == empty


def test_a_full_tier_evicts_the_oldest(tier: TierAdapter) -> None:
    store(tier, *range(CELLS + 3))
    assert held(tier, range(CELLS + 3)) == list(range(3, CELLS + 3))


def test_what_can_not_be_stored_costs_nobody(tier: TierAdapter) -> None:
    store(tier, 1, 2, 3)
    before = tier.accounted_bytes()
    assert not tier.begin(new_cell(9, pages=2 * CELLS))
    assert tier.accounted_bytes() == before
    assert held(tier, range(10)) == [1, 2, 3]


def test_what_is_over_its_time_is_not_found_and_makes_way(tier: TierAdapter) -> None:
    store(tier, 1, ttl_s=10)
    store(tier, 2)
    tier.pass_time(9.9)
    assert held(tier, range(3)) == [1, 2]
    tier.pass_time(0.1)
    assert held(tier, range(3)) == [2]
    store(tier, 1, *range(10, 10 + CELLS - 2))
    assert held(tier, range(3)) == [1, 2]


def test_a_successor_has_what_was_whole_and_nothing_else(tier: TierAdapter) -> None:
    store(tier, 1, 2)
    store(tier, 3, ttl_s=10)
    tier.evict(new_cell(2))
    tier.begin(new_cell(4))
    everything = sum(tier.accounted_bytes())
    tier.restart()
    assert held(tier, range(6)) == [1, 3]
    assert sum(tier.accounted_bytes()) >= everything, "what was not whole is replaced"
    tier.pass_time(10)
    assert held(tier, range(6)) == [1]
    store(tier, *range(10, 10 + CELLS))
    assert held(tier, range(10, 20)) == list(range(10, 10 + CELLS))


@pytest.mark.parametrize("restarts", [False, True])
@pytest.mark.parametrize("at", [0, 9, 40, 64, HEADER_BYTES, HEADER_BYTES + 77])
def test_damage_is_a_miss_and_the_next_put_repairs(
    tier: TierAdapter, at: int, restarts: bool
) -> None:
    store(tier, 1, 2)
    tier.damage(new_cell(1), at)
    if restarts:
        tier.restart()
    assert held(tier, range(3)) == [2]
    store(tier, 1)
    assert held(tier, range(3)) == [1, 2]


def test_changes_are_what_came_and_went(tier: TierAdapter) -> None:
    store(tier, 1, 2)
    tier.evict(new_cell(1))
    tier.begin(new_cell(3))
    changes = [(change.key, change.added) for change in tier.changes()]
    first, second = new_cell(1).key, new_cell(2).key
    assert changes == [(first, True), (second, True), (first, False)]


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["store", "store", "begin", "evict", "damage", "wait", "restart"]),
        st.integers(0, 5),
    ),
    max_size=30,
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(steps=STEPS)
@pytest.mark.parametrize("name", ADAPTERS)
def test_as_long_as_there_is_room_it_is_a_dict(name: str, steps: list[tuple[str, int]]) -> None:
    """Six names in a tier of eight cells: nothing is lost, nothing comes back."""
    with shared_folder() as folder:
        tier = ADAPTERS[name](folder)
        stored: set[int] = set()
        begun: int | None = None
        whole = sum(tier.accounted_bytes())
        for what, number in steps:
            new = new_cell(number)
            if what == "store" and number not in stored and number != begun:
                store(tier, number)
                stored.add(number)
            elif what == "begin" and begun is None and number not in stored:
                assert tier.begin(new)
                begun = number
            elif what in ("evict", "damage") and number in stored:
                tier.evict(new) if what == "evict" else tier.damage(new, HEADER_BYTES + number)
                stored.discard(number)
            elif what == "wait":
                tier.pass_time(REST_S)
            elif what == "restart":
                tier.restart()
                begun = None
            assert held(tier, range(6)) == sorted(stored)
        if begun is not None:
            tier.give_up(new_cell(begun))
        assert sum(tier.accounted_bytes()) == whole
