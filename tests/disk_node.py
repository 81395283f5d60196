"""A node's arena with an NVMe tier beside it, whose disk work a real child does."""

import select
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from kvstore.clock import Deadline, ManualClock, SystemClock
from kvstore.fs import LinuxFileSystem
from kvstore.tiers.host import HostTier
from kvstore.tiers.nvme.disk_process import DiskProcess, DiskSettings
from kvstore.tiers.nvme.spill import Done, Phase, Result, Spill
from kvstore.tiers.nvme.tier import NvmeTier
from tests.nvme_world import cell_image, write_spill
from tests.worlds import cells_of, key_number, packed

ARENA_BYTES = 1 << 20
STEP_BYTES = 1 << 15


class Node:
    """An arena, and an NVMe tier beside it whose disk work a child does."""

    def __init__(self, arena_folder: Path, disk_folder: Path, node_id: str = "node-a") -> None:
        self.clock = ManualClock()
        fs = LinuxFileSystem()
        self.arena = HostTier.create(fs, self.clock, arena_folder, ARENA_BYTES, 16, 1).arena
        self.settings = DiskSettings(disk_folder, arena_folder, node_id, 1 << 18, 4, 64)
        self.results: dict[int, Result]
        self.incarnation = 0

    def start(self) -> None:
        self.begin()
        self.wait_for_phase()

    def begin(self) -> None:
        self.incarnation += 1
        self.results = {}
        self.process = DiskProcess(self.settings)
        self.tier = NvmeTier(self.process, self.clock, 64, self.incarnation)

    def wait_for_phase(self) -> None:
        """Until the tier is open or refused."""
        while self.tier.phase is Phase.OPENING:
            self.step()

    def step(self) -> list[Done]:
        """Wait for the child to say something, then take it."""
        select.select([self.process.fileno()], [], [], 30)
        return self.take(self.tier.tick())

    def take(self, done: list[Done]) -> list[Done]:
        self.results.update({one.ticket: one.result for one in done})
        return done

    def waiting_for(self, ticket: int) -> Iterator[None]:
        """Once and again, until the ticket is done."""
        deadline = Deadline.after(SystemClock(), 30)
        while ticket not in self.results:
            assert not deadline.passed(), "no answer"
            yield

    def result(self, ticket: object) -> Result:
        assert isinstance(ticket, int), ticket
        for _ in self.waiting_for(ticket):
            self.step()
        return self.results[ticket]

    def spill(self, number: int, pages: int = 3, at: int = 0) -> Spill:
        arena = self.arena.view(0, ARENA_BYTES)
        return write_spill(arena, at * STEP_BYTES, number, 0, pages, self.clock)

    def store(self, number: int, pages: int = 3) -> Result:
        return self.result(self.tier.store(self.spill(number, pages)))

    def load(self, number: int) -> Result:
        """Load a cell, far from where it was stored from; its bytes must be right."""
        found = self.tier.find(packed([key_number(number)]), cells_of(0))
        assert found.held[0]
        at = 8 * STEP_BYTES
        image, _ = cell_image(key_number(number), 0, int(found.lengths[0]))
        target = self.arena.view(at, len(image))
        target[:] = 0xEE
        ticket = self.tier.load(int(found.slots[0]), int(found.generations[0]), at)
        result = self.result(ticket)
        assert result is not Result.LOADED or np.array_equal(target, image)
        return result

    def holds(self, number: int) -> bool:
        return bool(self.tier.find(packed([key_number(number)]), cells_of(0)).held[0])
