"""The NVMe tier against a plain set of names, in a tiny world: stores, loads, deletes, crashes.

A crash keeps, loses or tears what was not synced; the catalog may be lost on top of it. The world
looks at every byte that is delivered. Now and then the disk refuses to read. Does not cover: a
crash within an operation of the disk (``tests/unit/nvme/test_nvme_crash.py``).
"""

import errno

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvstore.tiers.nvme.spill import Declined, Phase
from tests.nvme_world import NvmeWorld

NUMBERS = st.integers(0, 3)
CELLS = st.integers(0, 1)


class NvmeMachine(RuleBasedStateMachine):
    """``world.offered``, ``world.promised`` and ``world.deleted`` are the model."""

    @initialize(seed=st.integers(0, 1000))
    def begin(self, seed: int) -> None:
        self.world = NvmeWorld(seed)
        self.world.start()
        self.world.queue.is_eager = False

    @precondition(lambda self: len(self.world.free_arena) > 2)
    @rule(number=NUMBERS, cell=CELLS, pages=st.sampled_from((1, 3)), ttl_s=st.sampled_from((0, 60)))
    def store(self, number: int, cell: int, pages: int, ttl_s: int) -> None:
        held = self.world.holds(number, cell)
        answer = self.world.store(number, cell, pages, ttl_s)
        assert not held or answer is Declined.HELD

    @precondition(lambda self: len(self.world.free_arena) > 2)
    @rule(number=NUMBERS, cell=CELLS)
    def load(self, number: int, cell: int) -> None:
        held = self.world.holds(number, cell)
        assert isinstance(self.world.load(number, cell), int) == held

    @rule(number=NUMBERS)
    def delete(self, number: int) -> None:
        self.world.delete(number)

    @rule(number=NUMBERS, cell=CELLS)
    def touch(self, number: int, cell: int) -> None:
        found = self.world.find(number, cell)
        self.world.tier.touch(found.slots[found.held], self.world.tier.next_stamp())

    @rule(seconds=st.sampled_from((1, 30, 90)))
    def wait(self, seconds: int) -> None:
        self.world.clock.advance(seconds)
        self.world.take(self.world.tier.tick())

    @precondition(lambda self: self.world.queue.has_work())
    @rule(count=st.integers(1, 6))
    def work(self, count: int) -> None:
        for _ in range(count):
            if self.world.queue.has_work():
                self.world.queue.work()
        self.world.take(self.world.tier.poll())

    @rule(is_refusing=st.booleans())
    def refuse_reads(self, is_refusing: bool) -> None:
        self.world.steps.faults = {"read": errno.EIO} if is_refusing else {}

    @rule(power_lost=st.booleans(), catalog_lost=st.booleans())
    def crash(self, power_lost: bool, catalog_lost: bool) -> None:
        if catalog_lost:
            self.world.catalog.damage = "made to be lost"
        self.world.steps.faults = {}
        self.world.restart(power_lost)
        held = self.world.held()
        assert self.world.tier.phase is Phase.OPEN
        assert self.world.promised <= held, "a promised cell is gone"
        assert held <= self.world.offered, "a cell that nobody stored"
        assert not {key for key, _ in held} & self.world.deleted, "a deleted block came back"
        self.world.check_all_load()
        assert self.world.promised <= self.world.held() or catalog_lost
        self.world.queue.is_eager = False

    @invariant()
    def adds_up(self) -> None:
        if hasattr(self, "world"):
            self.world.check_accounting()
            tier = self.world.tier
            if tier._open is not None:
                in_doubt = len(tier.held_records()) - len(tier.sure_records())
                assert in_doubt == len(tier._open.doubts)

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.queue.is_eager = True
            self.world.settle()
            assert not self.world.stores
            assert not self.world.loads
            assert not self.world.deletes, "a delete was forgotten"
            assert self.world.tier._open is not None
            assert not self.world.tier._open.shelf._pins.any()
            rows = set(self.world.catalog.rows)
            assert rows == self.world.held(), "catalog and memory disagree"


TestNvme = NvmeMachine.TestCase
TestNvme.settings = settings(
    max_examples=30, stateful_step_count=40, deadline=None, derandomize=True
)
