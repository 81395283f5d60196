"""A node with an NVMe tier behind its host tier, both tiny, on a simulated disk and a still clock.

Whatever the node says that it holds is read, and must be right.
"""

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvstore.calls import AcquireReply, CellOutcome, NodeIdentity
from kvstore.clock import ManualClock
from kvstore.fs import LinuxFileSystem
from kvstore.node import Node
from kvstore.tiers.behind import Behind
from kvstore.tiers.host import HostTier
from kvstore.tiers.nvme.tier import NvmeTier
from kvstore.tiers.tier import NewCell
from tests.nvme_world import CELLS_MAX, InlineQueue, MemoryCatalog, SimulatedDisk
from tests.worlds import (
    PAGE,
    cells_of,
    holds,
    key_number,
    new_cell,
    packed,
    read_verified,
    request_for,
    small_tier,
    write_cell,
)

ARENA_PAGES = 16
"""Room for eight cells of one page."""
LEASE_MS = 10_000


@dataclass
class World:
    clock: ManualClock
    host: HostTier
    queue: InlineQueue
    disk: SimulatedDisk
    catalog: MemoryCatalog
    nvme: NvmeTier
    node: Node
    session: int = 0
    operation: int = 0

    def __post_init__(self) -> None:
        self.session = self.node.open_session()

    def put(self, cells: list[NewCell]) -> list[int]:
        """As a client does; the outcomes of reserving or else committing."""
        self.operation += 1
        reply = self.node.reserve(request_for(self.session, self.operation, cells))
        outcomes: list[int] = reply.outcomes.tolist()
        for row, new in enumerate(cells):
            if outcomes[row] == CellOutcome.RESERVED:
                digest = write_cell(self.host.arena, int(reply.offsets[row]), new)
                outcomes[row] = int(
                    self.node.commit(
                        self.session, reply.slots[[row]], reply.generations[[row]],
                        np.array([digest], np.uint64),
                    )[0]
                )  # fmt: skip
        return outcomes

    def fill(self, numbers: range, ttl_s: int = 0) -> None:
        """Put cells one by one, with time for each to be written behind."""
        for number in numbers:
            assert self.put([new_cell(number, ttl_s=ttl_s)]) == [CellOutcome.STORED]
            self.pass_time()

    def pass_time(self, seconds: float = 0.2) -> None:
        for _ in range(max(1, round(seconds * 10))):
            self.clock.advance(0.1)
            self.node.beat(self.session)
            self.node.tick()

    def acquire(self, *numbers: int) -> AcquireReply:
        """As the service does, with all the time that the disk wants."""
        keys, cells = packed([key_number(n) for n in numbers]), cells_of(*[0] * len(numbers))
        promotion = self.node.begin_acquire(keys, cells)
        while not promotion.is_done:
            self.node.behind.poll()
        reply = self.node.acquire(self.session, keys, cells, LEASE_MS, promotion)
        self.node.end_acquire(promotion)
        for row in np.flatnonzero(reply.outcomes == CellOutcome.FOUND).tolist():
            header = read_verified(
                self.host.arena, int(reply.offsets[row]), int(reply.lengths[row]),
                int(reply.header_digests[row]),
            )  # fmt: skip
            assert header is not None, "an acquired cell does not verify"
            assert header.key == key_number(numbers[row])
        return reply

    def release(self, reply: AcquireReply) -> None:
        self.node.release(self.session, reply.lease)

    def above(self, number: int) -> bool:
        return holds(self.host, new_cell(number))

    def below(self, number: int) -> bool:
        return bool(self.nvme.find(packed([key_number(number)]), cells_of(0)).held[0])


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
