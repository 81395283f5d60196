"""A node with an arena, a disk and a folder of its own, that is killed and comes back.

All of it is in one process: the disk and the catalog are simulated, the small files are in memory,
and can be made to fail. Cells are those of `tests.worlds`.
"""

import random
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kvstore.calls import HoldReply, HoldRequest, NodeIdentity
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
from tests.driven_node import DrivenNode
from tests.faults import FaultyFiles
from tests.nvme_world import CELLS_MAX, InlineQueue, MemoryCatalog, SimulatedDisk, Steps
from tests.worlds import PAGE, key_number, new_cell, packed

ARENA_PAGES = 16
"""Room for eight cells of two pages."""
FOLDER = Path("/node")
TENANT = tenant_digest("acme")


def keys_of(*numbers: int) -> Keys:
    return packed([key_number(number) for number in numbers])


@dataclass
class LifeWorld(DrivenNode):
    """What survives a kill, and the node that runs just now."""

    folder: Path
    has_disk: bool = True
    clock: ManualClock = field(default_factory=ManualClock)
    files: FaultyFiles = field(default_factory=FaultyFiles)
    arena_pages: int = ARENA_PAGES
    hold_bytes: int | None = None
    incarnation: int = 0
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

    def put(self, *numbers: int, ttl_s: int = 0, cell: int = 0) -> list[int]:
        """As a client does; the outcomes of reserving or else committing."""
        return self.put_cells([new_cell(number, cell=cell, ttl_s=ttl_s) for number in numbers])

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
        tenant_epoch: int = 0,
    ) -> HoldReply:
        ttl_ms, keys = round(1000 * ttl_s), keys_of(*numbers)
        request = HoldRequest(tenant, handle, keys, 1, ttl_ms, replicas, tenant_epoch)
        return self.life.hold(request)

    def found(self, *numbers: int) -> list[bool]:
        """Which blocks the node says that it has."""
        return [self.node.lookup(keys_of(number), 1) == 1 for number in numbers]

    def announced(self) -> npt.NDArray[np.uint8]:
        return self.node.snapshot().keys
