"""A node with an arena, a disk and a folder of its own, that is killed and comes back.

All of it is in one process: the disk and the catalog are simulated, the small files are in memory,
and can be made to fail. Cells are those of `tests.worlds`.
"""

import random
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kvstore.calls import (
    AcquireReply,
    CellOutcome,
    HoldReply,
    HoldRequest,
    NodeIdentity,
    ReserveReply,
)
from kvstore.clock import ManualClock
from kvstore.deletes import Deletion
from kvstore.fs import LinuxFileSystem
from kvstore.key import Keys
from kvstore.lasting import Lasting
from kvstore.node import Node
from kvstore.replication import DEFAULT_PACE, Pace
from kvstore.tenants import tenant_digest
from kvstore.tiers.behind import Behind
from kvstore.tiers.host import HostTier
from kvstore.tiers.nvme.spill import Phase
from kvstore.tiers.nvme.tier import NvmeTier
from kvstore.tiers.tier import NewCell
from tests.faults import FaultyFiles
from tests.nvme_world import CELLS_MAX, InlineQueue, MemoryCatalog, SimulatedDisk, Steps
from tests.worlds import (
    PAGE,
    cells_of,
    holds,
    key_number,
    new_cell,
    packed,
    request_for,
    write_cell,
)

ARENA_PAGES = 16
"""Room for eight cells of two pages."""
FOLDER = Path("/node")
LEASE_MS = 10_000
TENANT = tenant_digest("acme")


def keys_of(*numbers: int) -> Keys:
    return packed([key_number(number) for number in numbers])


@dataclass
class LifeWorld:
    """What survives a kill, and the node that runs just now."""

    folder: Path
    has_disk: bool = True
    clock: ManualClock = field(default_factory=ManualClock)
    files: FaultyFiles = field(default_factory=FaultyFiles)
    arena_pages: int = ARENA_PAGES
    hold_bytes: int | None = None
    incarnation: int = 0
    operation: int = 0
    had_disk: bool = False
    node_id: str = "node-a"
    pace: Pace = DEFAULT_PACE

    def __post_init__(self) -> None:
        self.rng = random.Random(7)
        steps = Steps()
        self.disk, self.catalog = SimulatedDisk(steps, self.rng), MemoryCatalog(steps, self.rng)
        self.start()

    def start(self, adopt: bool = False, is_refused: bool = False) -> None:
        """A node begins, on its predecessor's arena or on an empty one.

        With ``is_refused`` its disk says that it is another node's.
        """
        self.incarnation += 1
        self.fs, size_bytes = LinuxFileSystem(), self.arena_pages * PAGE
        if adopt:
            self.host = HostTier.adopt(
                self.fs, self.clock, self.folder, size_bytes, self.incarnation
            )
        else:
            self.host = HostTier.create(
                self.fs, self.clock, self.folder, size_bytes, 32, self.incarnation
            )
        arena = self.host.arena.view(0, size_bytes)
        owner = "node-b" if is_refused else "node-a"
        self.queue = InlineQueue(self.disk, self.catalog, arena, self.rng, owner)
        self.nvme = NvmeTier(self.queue, self.clock, CELLS_MAX, self.incarnation)
        behind = Behind(self.host, self.nvme, self.clock)
        if not self.has_disk:
            behind = Behind.nothing(self.host, self.clock, is_left=self.had_disk)
        self.had_disk |= self.has_disk
        identity = NodeIdentity(self.node_id, self.incarnation, "h", str(self.folder))
        lasting = Lasting(self.files, FOLDER)
        self.node = Node(
            identity,
            self.host,
            self.clock,
            behind=behind,
            lasting=lasting,
            hold_bytes=self.hold_bytes,
            pace=self.pace,
        )
        self.life = self.node.life
        if self.has_disk:
            self.node.behind.poll()
            assert self.nvme.phase is (Phase.REFUSED if is_refused else Phase.OPEN)
        self.session = self.node.open_session()

    def restart(self, adopt: bool = True, is_refused: bool = False) -> None:
        """Killed; with ``adopt`` the machine lives on, else it was switched off."""
        if not adopt:
            self.disk.lose()
        self.start(adopt, is_refused)

    def reserve(self, *cells: NewCell) -> ReserveReply:
        self.operation += 1
        return self.node.reserve(request_for(self.session, self.operation, cells))

    def commit(self, reply: ReserveReply, row: int, new: NewCell) -> int:
        digest = write_cell(self.host.arena, int(reply.offsets[row]), new)
        slots, generations = reply.slots[[row]], reply.generations[[row]]
        digests = np.array([digest], np.uint64)
        return int(self.node.commit(self.session, slots, generations, digests)[0])

    def put(self, *numbers: int, ttl_s: int = 0, cell: int = 0) -> list[int]:
        """As a client does; the outcomes of reserving or else committing."""
        cells = [new_cell(number, cell=cell, ttl_s=ttl_s) for number in numbers]
        reply = self.reserve(*cells)
        outcomes: list[int] = reply.outcomes.tolist()
        for row, new in enumerate(cells):
            if outcomes[row] == CellOutcome.RESERVED:
                outcomes[row] = self.commit(reply, row, new)
        return outcomes

    def put_twice(self, *numbers: int, ttl_s: int = 0) -> None:
        """Used again, so that it goes down to the disk."""
        for _ in range(2):
            for number in numbers:
                self.put(number, ttl_s=ttl_s)
        self.pass_time()
        assert all(self.below(number) for number in numbers)

    def evict_all(self) -> None:
        """What is in the arena, and not pinned, leaves it."""
        for slot in self.host.held_slots().tolist():
            if slot in self.host.next_to_leave(64).tolist() or not self.host._pins[slot]:
                self.host.evict(slot)

    def pass_time(self, seconds: float = 0.3) -> None:
        for _ in range(max(1, round(seconds * 10))):
            self.clock.advance(0.1)
            self.node.beat(self.session)
            self.node.tick()

    def acquire(self, *numbers: int) -> AcquireReply:
        """As the service does, with all the time that the disk wants."""
        keys, cells = keys_of(*numbers), cells_of(*[0] * len(numbers))
        promotion = self.node.begin_acquire(keys, cells)
        while not promotion.is_done:
            self.node.behind.poll()
        reply = self.node.acquire(self.session, keys, cells, LEASE_MS, promotion)
        self.node.end_acquire(promotion)
        return reply

    def delete(self, *numbers: int) -> Deletion:
        """Deleted, done and buried."""
        deletion = self.life.delete(keys_of(*numbers))
        while not deletion.is_done:
            self.node.behind.poll()
        assert self.life.bury(deletion)
        return deletion

    def hold(
        self,
        *numbers: int,
        handle: str = "h",
        ttl_s: float = 60,
        tenant: bytes = TENANT,
        replicas: int = 1,
    ) -> HoldReply:
        ttl_ms = round(1000 * ttl_s)
        request = HoldRequest(tenant, handle, keys_of(*numbers), 1, ttl_ms, replicas)
        return self.life.hold(request)

    def found(self, *numbers: int) -> list[bool]:
        """Which blocks the node says that it has."""
        return [self.node.lookup(keys_of(number), 1) == 1 for number in numbers]

    def above(self, number: int) -> bool:
        return holds(self.host, new_cell(number))

    def below(self, number: int) -> bool:
        return bool(self.nvme.find(keys_of(number), cells_of(0)).held[0])

    def announced(self) -> npt.NDArray[np.uint8]:
        return self.node.snapshot().keys
