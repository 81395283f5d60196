"""Tail-first LRU: the order of victims, and that naming them ends."""

from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.eviction import BATCH_SLOTS, TailFirstLru


def as_slots(*slots: int) -> np.ndarray[tuple[int], np.dtype[np.uint32]]:
    return np.array(slots, np.uint32)


def taken(policy: TailFirstLru, pinned: frozenset[int] = frozenset()) -> list[int]:
    """All victims, each removed as it is named, as a tier does that needs more and more room."""
    order = []
    for slot in policy.victims():
        if slot not in pinned:
            policy.remove(slot)
            order.append(slot)
    return order


def test_a_chain_is_eaten_from_its_tail() -> None:
    policy = TailFirstLru(8)
    policy.touch(as_slots(0, 1, 2, 3), as_slots(0, 1, 2, 3), policy.next_stamp())
    assert taken(policy) == [3, 2, 1, 0]


def test_older_chains_go_first_and_shared_heads_last() -> None:
    policy = TailFirstLru(8)
    policy.touch(as_slots(0, 1, 2), as_slots(0, 1, 2), policy.next_stamp())
    policy.touch(as_slots(0, 3, 4), as_slots(0, 1, 2), policy.next_stamp())
    assert taken(policy) == [2, 1, 4, 3, 0]


def test_an_older_stamp_does_not_rejuvenate_nor_age() -> None:
    policy = TailFirstLru(4)
    early, late = policy.next_stamp(), policy.next_stamp()
    policy.touch(as_slots(0), as_slots(0), late)
    policy.touch(as_slots(0), as_slots(0), early)
    policy.touch(as_slots(1), as_slots(0), early)
    assert taken(policy) == [1, 0]


def test_stamps_go_on_after_those_that_were_taken_over() -> None:
    policy = TailFirstLru(4)
    policy.enter(as_slots(2, 0, 1), as_slots(0, 0, 1), np.array([9, 4, 4], np.uint64))
    assert policy.next_stamp() == 10
    assert taken(policy) == [1, 0, 2]


@pytest.mark.parametrize("held", [0, 1, 3, 4, BATCH_SLOTS, 3 * BATCH_SLOTS])
@pytest.mark.parametrize("empty", [0, 1, 100])
def test_naming_ends_when_nothing_can_be_taken(held: int, empty: int) -> None:
    if held + empty == 0:
        return
    policy = TailFirstLru(held + empty)
    policy.touch(np.arange(held, dtype=np.uint32), np.zeros(held, np.uint32), policy.next_stamp())
    named = list(islice(policy.victims(), 100_000))
    assert len(named) < 100_000, "goes on for ever"
    assert set(named) == set(range(held)), "every slot is offered"


def test_naming_ends_when_all_but_a_few_are_in_use() -> None:
    slots = 4 * BATCH_SLOTS
    policy = TailFirstLru(slots)
    for slot in range(slots):
        policy.touch(as_slots(slot), as_slots(0), policy.next_stamp())
    free = {5, 100, slots - 1}
    assert taken(policy, frozenset(range(slots)) - free) == sorted(free)


def test_what_came_after_the_oldest_were_queued_is_named_too() -> None:
    policy = TailFirstLru(8)
    policy.touch(as_slots(0), as_slots(0), policy.next_stamp())
    assert next(policy.victims()) == 0
    policy.touch(as_slots(1, 2), as_slots(0, 0), policy.next_stamp())
    assert taken(policy, frozenset({0})) == [1, 2]


def test_what_was_touched_after_naming_began_is_passed_over() -> None:
    policy = TailFirstLru(4)
    for slot in range(3):
        policy.touch(as_slots(slot), as_slots(0), policy.next_stamp())
    victims = policy.victims()
    assert next(victims) == 0
    policy.remove(0)
    policy.touch(as_slots(1), as_slots(0), policy.next_stamp())
    assert next(victims) == 2


def test_stamps_go_on_after_another_tiers() -> None:
    policy = TailFirstLru(4)
    policy.go_on_after(7)
    policy.go_on_after(3)
    assert policy.next_stamp() == 8


def test_heads_come_first_where_a_prompt_is_saved() -> None:
    policy = TailFirstLru(8)
    assert policy.heads_first(3).tolist() == []
    policy.touch(as_slots(4, 3, 2), as_slots(0, 1, 2), policy.next_stamp())
    policy.touch(as_slots(4, 1, 0), as_slots(0, 1, 2), policy.next_stamp())
    assert policy.heads_first(8).tolist() == [3, 2, 4, 1, 0]
    assert policy.heads_first(3).tolist() == [3, 2, 4]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_order_is_the_naive_one(data: st.DataObject) -> None:
    policy = TailFirstLru(150)
    naive: dict[int, tuple[int, int]] = {}
    for _ in range(data.draw(st.integers(0, 12))):
        chosen = data.draw(st.lists(st.integers(0, 149), unique=True, max_size=40))
        depths = [slot % 7 for slot in chosen]
        stamp = policy.next_stamp()
        policy.touch(np.array(chosen, np.uint32), np.array(depths, np.uint32), stamp)
        naive |= {slot: (stamp, -depth) for slot, depth in zip(chosen, depths, strict=True)}
        for slot in data.draw(st.lists(st.sampled_from(sorted(naive) or [0]), max_size=3)):
            policy.remove(slot)
            naive.pop(slot, None)
    pinned = frozenset(data.draw(st.lists(st.integers(0, 149), max_size=80)))
    order = taken(policy, pinned)
    assert sorted(order) == sorted(set(naive) - pinned)
    assert [naive[slot] for slot in order] == sorted(naive[slot] for slot in order)


def test_finding_the_oldest_is_shared_by_many_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = TailFirstLru(4 * BATCH_SLOTS)
    for slot in range(4 * BATCH_SLOTS):
        policy.touch(as_slots(slot), as_slots(0), policy.next_stamp())
    scans: list[int] = []
    scan = policy._oldest

    def counted(count: int) -> list[tuple[int, int]]:
        scans.append(count)
        return scan(count)

    monkeypatch.setattr(policy, "_oldest", counted)
    for expected in range(2 * BATCH_SLOTS):
        victim = next(policy.victims())
        assert victim == expected
        policy.remove(victim)
    assert len(scans) == 2
