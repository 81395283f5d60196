"""What every eviction policy must do, in prompts that share prefixes, against a naive one.

A policy joins by a line in ``POLICIES``: its class, and the same order told by a dict. Whatever the
order, these hold of all: a touch never makes a slot go earlier; victims are named one by one while
the caller touches, removes and keeps some; naming ends; a block is never left without its parent;
a policy that takes over from another goes on with its order; memory is bounded by slots.
"""

from collections.abc import Iterator
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


@pytest.mark.parametrize("name", POLICIES)
def test_policy(name: str) -> None:
    policy, oracle = POLICIES[name]
    members: dict[str, Any] = {"make": policy, "make_oracle": oracle}
    machine = type(f"{policy.__name__}Machine", (PolicyMachine,), members)
    limits = settings(max_examples=25, stateful_step_count=25, deadline=None, derandomize=True)
    run_state_machine_as_test(machine, settings=limits)
