"""What every eviction policy must do, in prompts that share prefixes, against a naive one.

A policy joins by a line in ``POLICIES``: its class, and the same order told by a dict. Whatever the
order, these hold of all: a touch never makes a slot go earlier; victims are named one by one while
the caller touches, removes and keeps some; naming ends; a block is never left without its parent;
a policy that takes over from another goes on with its order; memory is bounded by slots.
"""

from collections.abc import Iterator
from itertools import islice
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from kvstore.eviction import BATCH_SLOTS, TailFirstLru

SLOTS = 3 * BATCH_SLOTS
BYTES_PER_SLOT_MAX = 32


class Policy(Protocol):
    """What a tier needs of a policy."""

    def next_stamp(self) -> int: ...

    def go_on_after(self, stamp: int) -> None: ...

    def touch(
        self, slots: npt.NDArray[np.uint32], depths: npt.NDArray[np.uint32], stamp: int
    ) -> None: ...

    def enter(
        self,
        slots: npt.NDArray[np.uint32],
        depths: npt.NDArray[np.uint32],
        stamps: npt.NDArray[np.uint64],
    ) -> None: ...

    def remove(self, slot: int) -> None: ...

    def victims(self) -> Iterator[int]: ...

    def heads_first(self, count: int) -> npt.NDArray[np.uint32]: ...

    def metadata_bytes(self) -> int: ...


class NaiveTailFirstLru:
    """Oldest stamp first, among equals the deepest."""

    def __init__(self) -> None:
        self.stamps: dict[int, int] = {}
        self.depths: dict[int, int] = {}

    def touch(self, slots: list[int], depths: list[int], stamp: int) -> None:
        for slot, depth in zip(slots, depths, strict=True):
            self.stamps[slot] = max(self.stamps.get(slot, 0), stamp)
            self.depths[slot] = depth

    def remove(self, slot: int) -> None:
        del self.stamps[slot], self.depths[slot]

    def rank(self, slot: int) -> tuple[int, int]:
        """Smaller goes first."""
        return self.stamps[slot], -self.depths[slot]


POLICIES = {"tail-first LRU": (TailFirstLru, NaiveTailFirstLru)}


class PolicyMachine(RuleBasedStateMachine):
    """Blocks of prompts: slot, parent's slot, depth. A prompt's use touches the whole chain."""

    make: type[Policy]
    make_oracle: type[NaiveTailFirstLru]

    def __init__(self) -> None:
        super().__init__()
        self.policy = self.make(SLOTS)  # type: ignore[call-arg]
        self.oracle = self.make_oracle()
        self.parents: dict[int, int | None] = {}
        self.unused = list(range(SLOTS))
        self.stamps = [self.policy.next_stamp()]

    @precondition(lambda self: self.unused)
    @rule(data=st.data(), length=st.sampled_from([1, 3, 8, 100, BATCH_SLOTS]))
    def put(self, data: st.DataObject, length: int) -> None:
        """A prompt that goes on where one of those that are held ends, or is new."""
        chain = self.any_chain(data)
        for _ in range(min(length, len(self.unused))):
            slot = self.unused.pop()
            self.parents[slot] = chain[-1] if chain else None
            chain.append(slot)
        self.stamps.append(self.policy.next_stamp())
        assert self.stamps[-1] > max(self.stamps[:-1]), "a stamp must be newer than all before"
        self.touch(chain, self.stamps[-1])

    @precondition(lambda self: self.parents)
    @rule(data=st.data())
    def use(self, data: st.DataObject) -> None:
        self.stamps.append(self.policy.next_stamp())
        self.touch(self.any_chain(data), self.stamps[-1])

    @precondition(lambda self: self.parents)
    @rule(data=st.data())
    def use_late(self, data: st.DataObject) -> None:
        """A put that began long ago touches now: nobody gets older by that."""
        self.touch(self.any_chain(data), data.draw(st.sampled_from(self.stamps)))

    @precondition(lambda self: self.parents)
    @rule(count=st.sampled_from([1, 2, 10, BATCH_SLOTS + 1]))
    def evict(self, count: int) -> None:
        """What a tier does that needs room: take the first, ask again another time."""
        for _ in range(min(count, len(self.parents))):
            slot = next(self.policy.victims())
            assert self.rank(slot) == min(map(self.rank, self.parents)), "not the first"
            self.take(slot)

    @precondition(lambda self: self.parents)
    @rule(data=st.data(), steps=st.integers(1, 12))
    def evict_some(self, data: st.DataObject, steps: int) -> None:
        """One naming, between whose names slots are taken, used and kept."""
        unchanged = set(self.parents)
        for _, slot in zip(range(steps), self.policy.victims(), strict=False):
            assert slot in self.parents, "named a slot that is free"
            assert self.rank(slot) <= min(map(self.rank, unchanged), default=self.rank(slot))
            unchanged.discard(slot)
            action = data.draw(st.sampled_from(["take", "use", "use another", "keep"]))
            if action == "take" and self.is_leaf(slot):
                self.take(slot)
            elif action != "keep":
                chain = self.chain_to(slot) if action == "use" else self.any_chain(data)
                self.stamps.append(self.policy.next_stamp())
                self.touch(chain, self.stamps[-1])
                unchanged.difference_update(chain)

    @rule(count=st.sampled_from([1, 5, BATCH_SLOTS + 1, 10 * SLOTS]))
    def save(self, count: int) -> None:
        """Of the oldest, a block is saved before its children are."""
        saved = self.policy.heads_first(count).tolist()
        ranks = sorted((self.oracle.stamps[s], self.oracle.depths[s]) for s in self.parents)
        assert [(self.oracle.stamps[s], self.oracle.depths[s]) for s in saved] == ranks[:count]
        assert len(set(saved)) == len(saved)

    @rule()
    def name_all(self) -> None:
        """When everything is kept, everything is named, and then naming ends."""
        limit = 10 * SLOTS
        named = [slot for _, slot in zip(range(limit), self.policy.victims(), strict=False)]
        assert len(named) < limit, "goes on for ever"
        assert set(named) == set(self.parents)

    @precondition(lambda self: any(map(self.is_leaf, self.parents)))
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        """A damaged block, or one that is over its time."""
        leaves = [slot for slot in sorted(self.parents) if self.is_leaf(slot)]
        self.take(data.draw(st.sampled_from(leaves)))

    @rule()
    def restart(self) -> None:
        """Another process takes the slots over, with what their records say."""
        slots = sorted(self.parents)
        stamps = [self.oracle.stamps[slot] for slot in slots]
        self.policy = self.make(SLOTS)  # type: ignore[call-arg]
        self.policy.enter(
            np.array(slots, np.uint32), np.array(self.depths(slots), np.uint32),
            np.array(stamps, np.uint64),
        )  # fmt: skip
        self.stamps = [*stamps, self.policy.next_stamp()]
        assert self.stamps[-1] > max(stamps, default=0)

    @invariant()
    def the_next_victim_is_the_first(self) -> None:
        if self.parents:
            slot = next(self.policy.victims())
            assert self.rank(slot) == min(map(self.rank, self.parents)), "not the first"

    @invariant()
    def memory_is_bounded(self) -> None:
        assert self.policy.metadata_bytes() <= BYTES_PER_SLOT_MAX * SLOTS

    def touch(self, chain: list[int], stamp: int) -> None:
        depths = self.depths(chain)
        self.policy.touch(np.array(chain, np.uint32), np.array(depths, np.uint32), stamp)
        self.oracle.touch(chain, depths, stamp)

    def take(self, slot: int) -> None:
        assert self.is_leaf(slot), "a block was to go before its children"
        del self.parents[slot]
        self.policy.remove(slot)
        self.oracle.remove(slot)
        self.unused.append(slot)

    def any_chain(self, data: st.DataObject) -> list[int]:
        held = [None, *sorted(self.parents)]
        return self.chain_to(data.draw(st.sampled_from(held)))

    def chain_to(self, slot: int | None) -> list[int]:
        chain = []
        while slot is not None:
            chain.append(slot)
            slot = self.parents[slot]
        return chain[::-1]

    def depths(self, slots: list[int]) -> list[int]:
        known = self.oracle.depths
        return [known[s] if s in known else len(self.chain_to(s)) - 1 for s in slots]

    def is_leaf(self, slot: int) -> bool:
        return slot not in self.parents.values()

    def rank(self, slot: int) -> tuple[int, int]:
        return self.oracle.rank(slot)


def as_slots(*slots: int) -> npt.NDArray[np.uint32]:
    return np.array(slots, np.uint32)


def new_policy(name: str) -> Policy:
    policy: Policy = POLICIES[name][0](SLOTS)
    return policy


def named(policy: Policy) -> list[int]:
    """Every slot, in the order of its first naming; all are kept."""
    limit = 10 * SLOTS
    seen = list(islice(policy.victims(), limit))
    assert len(seen) < limit, "goes on for ever"
    return list(dict.fromkeys(seen))


@pytest.mark.parametrize("name", POLICIES)
def test_a_late_touch_makes_nobody_older(name: str) -> None:
    policy = new_policy(name)
    late = policy.next_stamp()
    for slot in range(3):
        policy.touch(as_slots(slot), as_slots(0), policy.next_stamp())
    assert next(policy.victims()) == 0
    policy.touch(as_slots(2, 3), as_slots(0, 1), late)
    assert named(policy) == [3, 0, 1, 2]


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("held", [1, BATCH_SLOTS, BATCH_SLOTS + 1])
def test_what_comes_after_a_naming_is_named_by_the_next(name: str, held: int) -> None:
    policy = new_policy(name)
    for slot in range(held):
        policy.touch(as_slots(slot), as_slots(0), policy.next_stamp())
    assert named(policy) == list(range(held))
    policy.touch(as_slots(held), as_slots(0), policy.next_stamp())
    assert named(policy) == list(range(held + 1))


@pytest.mark.parametrize("name", POLICIES)
def test_a_successor_goes_on_with_stamps_and_order(name: str) -> None:
    policy = new_policy(name)
    policy.enter(as_slots(0, 1, 2), as_slots(0, 0, 1), np.array([9, 7, 9], np.uint64))
    assert named(policy) == [1, 2, 0]
    assert next(policy.victims()) == 1
    policy.enter(as_slots(3, 4), as_slots(0, 0), np.array([8, 5], np.uint64))
    assert named(policy) == [4, 1, 3, 2, 0]
    assert policy.next_stamp() == 10
    policy.go_on_after(20)
    policy.go_on_after(15)
    assert policy.next_stamp() == 21
    policy.touch(as_slots(5), as_slots(0), 30)
    assert policy.next_stamp() == 31


@pytest.mark.parametrize("name", POLICIES)
def test_policy(name: str) -> None:
    policy, oracle = POLICIES[name]
    members: dict[str, Any] = {"make": policy, "make_oracle": oracle}
    machine = type(f"{policy.__name__}Machine", (PolicyMachine,), members)
    limits = settings(max_examples=25, stateful_step_count=25, deadline=None, derandomize=True)
    run_state_machine_as_test(machine, settings=limits)
