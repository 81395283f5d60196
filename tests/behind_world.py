"""A node with an NVMe tier behind its host tier, both tiny, on a simulated disk."""

import random
from dataclasses import dataclass
from pathlib import Path

from kvstore.calls import AcquireReply, CellOutcome, NodeIdentity
from kvstore.clock import ManualClock
from kvstore.fs import LinuxFileSystem
from kvstore.node import Node
from kvstore.tiers.behind import Behind
from kvstore.tiers.host import HostTier
from kvstore.tiers.nvme.tier import NvmeTier
from tests.driven_node import DrivenNode
from tests.nvme_world import CELLS_MAX, InlineQueue, MemoryCatalog, SimulatedDisk, Steps
from tests.worlds import PAGE, new_cell, small_tier

ARENA_PAGES = 16
"""Room for eight cells of one page."""


@dataclass
class World(DrivenNode):
    clock: ManualClock
    host: HostTier
    queue: InlineQueue
    disk: SimulatedDisk
    catalog: MemoryCatalog
    nvme: NvmeTier
    node: Node

    def __post_init__(self) -> None:
        self.session = self.node.open_session()

    def fill(self, numbers: range, ttl_s: int = 0) -> None:
        """Put cells one by one, with time for each to be written behind."""
        for number in numbers:
            assert self.put_cells([new_cell(number, ttl_s=ttl_s)]) == [CellOutcome.STORED]
            self.pass_time()

    def release(self, reply: AcquireReply) -> None:
        self.node.release(self.session, reply.lease)


def empty_world(folder: Path) -> World:
    """A node on whose disk nothing ever was."""
    steps, rng = Steps(), random.Random(7)
    disk, catalog = SimulatedDisk(steps, rng), MemoryCatalog(steps, rng)
    return new_world(folder, ManualClock(), disk, catalog, incarnation=1)


def new_world(
    folder: Path, clock: ManualClock, disk: SimulatedDisk, catalog: MemoryCatalog, incarnation: int
) -> World:
    """A node with an empty arena, on whatever the disk has."""
    host = small_tier(LinuxFileSystem(), clock, folder, ARENA_PAGES, slots=32)
    arena = host.arena.view(0, ARENA_PAGES * PAGE)
    queue = InlineQueue(disk, catalog, arena, random.Random(7))
    nvme = NvmeTier(queue, clock, CELLS_MAX, incarnation)
    identity = NodeIdentity("node-a", incarnation, "h", str(folder))
    node = Node(identity, host, clock, behind=Behind(host, nvme, clock))
    node.behind.poll()
    return World(clock, host, queue, disk, catalog, nvme, node)
