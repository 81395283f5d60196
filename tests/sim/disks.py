"""A machine's disk, and the process that works on it, on simulated time.

    real NvmeTier ─> DiskWork ─> stage by stage, each taking its time ─> real Drive, recovery, slab
                                                            catalog twin, disk with a cache ─┘

Everything above a file's pages and a catalog's transaction is the code that ships. Replaced are the
disk process's threads and socket (``kvstore.tiers.nvme.worker``, ``disk_process``), LMDB (a twin in
memory, whose commits are durable, all or none), and the file, whose writes a power loss keeps,
loses or tears until they were synced (``tests.nvme_world``).

A disk is slow, refuses, comes short, rots, goes away and comes back. Its process dies alone or with
its node: what it was in the middle of may still reach the disk, later.
"""

import errno
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from random import Random

import numpy as np

from kvstore.fs import MemoryFiles
from kvstore.table import SlotState
from kvstore.tiers.nvme.catalog import CatalogBroken
from kvstore.tiers.nvme.disk_queue import Answer, Ended, Event
from kvstore.tiers.nvme.drive import GROUPED, STAGES, Drive, Stage
from kvstore.tiers.nvme.record import PAGE_BYTES, Records, stored_bytes_of
from kvstore.tiers.nvme.recovery import Wanted, recover
from kvstore.tiers.nvme.requests import (
    Opening,
    OpeningKind,
    Outcome,
    Request,
    RequestKind,
    unpack_opening,
    unpack_request,
)
from kvstore.tiers.nvme.spill import Phase
from kvstore.tiers.nvme.tier import NvmeTier
from kvstore.tiers.nvme.worker import GROUP_MAX, THREADS
from tests.nvme_world import EXTENT_BYTES, MemoryCatalog, SimulatedDisk, Steps
from tests.sim.edges import WatchedNode
from tests.sim.network import Network
from tests.sim.scheduler import Process

OPEN_S = 0.05
ANSWER_S = 0.0002
QUICK_S = (0.0001, 0.002)

COMPANY = "company"
"""The file without which a node says that it promises nothing."""

Name = tuple[bytes, int]
Flight = tuple[Stage, list[Request]]
"""Requests that a thread of that stage has taken."""


def name_of(record: np.void) -> Name:
    """Key and cell of a record."""
    return record["key"].tobytes(), int(record["cell"])


class Refusals(Steps):
    """Which operations of one disk fail just now; a catalog that fails may be broken by it."""

    def __init__(self, random: Random) -> None:
        super().__init__()
        self.share = 1.0
        """Of those operations."""
        self._random = random

    def take(self, name: str) -> None:
        if name in self.faults and self._random.random() < self.share:
            if name == "commit" and self._random.random() < 0.3:
                raise CatalogBroken("made to break")
            raise OSError(self.faults[name], f"made to fail: {name}")


class DiskFiles(MemoryFiles):
    """A node's small durable files; a write that is refused may be there in part."""

    def __init__(self, refusals: Refusals) -> None:
        super().__init__()
        self._refusals = refusals

    def read(self, path: Path) -> bytes | None:
        if path.name != COMPANY:
            self._refusals.take("file")
        return super().read(path)

    def append(self, path: Path, data: bytes) -> None:
        try:
            self._refusals.take("file")
        except OSError:
            super().append(path, data[: len(data) // 2])
            raise
        super().append(path, data)

    def replace(self, path: Path, data: bytes) -> None:
        if path.name != COMPANY:
            self._refusals.take("file")
        super().replace(path, data)


class MachineDisk:
    """What outlives every process of a machine, and its memory."""

    def __init__(self, random: Random, extents: int, cells_max: int) -> None:
        self.extents = extents
        self.cells_max = cells_max
        self.is_new = False
        """Since no node has started on it."""
        self.refusals = Refusals(random)
        self.files = DiskFiles(self.refusals)
        self.slab = SimulatedDisk(self.refusals, random)
        self.catalog = MemoryCatalog(self.refusals, random)
        self.took_s = QUICK_S
        """Shortest and longest time of an operation."""
        self.is_away = False
        self.promised: dict[Name, int] = {}
        """What was held when it was last worked on, with the sequences of the writes."""
        self.rotten: set[int] = set()
        """Writes, by sequence, that were damaged."""
        self.tainted: set[Name] = set()
        """Cells that were damaged in the arena, and may have been written so."""
        self.landing: list[Landing] = []
        """Operations of processes that are dead."""
        self._random = random

    def is_rotten(self, record: np.void) -> bool:
        """Whether the medium has damaged a cell."""
        return int(record["sequence"]) in self.rotten or name_of(record) in self.tainted

    def rot(self, record: np.void, bit: int) -> None:
        """Flip a bit of a cell that is held."""
        self.rotten.add(int(record["sequence"]))
        size_bytes = PAGE_BYTES + int(record["length"])
        self.slab.flip(8 * int(record["offset"]) + bit % (8 * size_bytes))

    def replace(self) -> None:
        """Another disk, empty."""
        self.is_new = True
        self.landing.clear()
        self.promised, self.rotten = {}, set()
        self.files = DiskFiles(self.refusals)
        self.slab = SimulatedDisk(self.refusals, self._random)
        self.catalog = MemoryCatalog(self.refusals, self._random)

    def lose_catalog(self) -> None:
        """At the next start it can't be read."""
        if self.catalog.identity:
            self.catalog.damage = "made to be lost"

    def heal(self) -> None:
        """It works, and is quick."""
        self.refusals.faults.clear()
        self.slab.is_short = self.is_away = False
        self.took_s = QUICK_S

    def lose_power(self) -> None:
        """What was not durable may be gone."""
        for landing in self.landing:
            if self._random.random() < 0.5:
                landing.land()
        self.landing.clear()
        self.slab.crash()


class Landing:
    """An operation that the kernel has begun: done once, now or later, whoever still wants it."""

    def __init__(self, disk: MachineDisk, work: Callable[[], object]) -> None:
        self._disk = disk
        self._work = work

    def land(self) -> None:
        self._work()

    def due(self) -> None:
        """Its time has come, if the power is still on."""
        if self in self._disk.landing:
            self._disk.landing.remove(self)
            self._work()


class DiskWork:
    """A ``DiskQueue``: one node's handle on its disk process, and that process."""

    def __init__(
        self,
        network: Network,
        node: Process,
        disk: MachineDisk,
        watched: WatchedNode,
        spawn: Callable[[], Process],
    ) -> None:
        self.nvme: NvmeTier
        """Whose queue it is; what that holds is promised once the process is gone."""
        self._network = network
        self._node = node
        self._disk = disk
        self._watched = watched
        self._spawn = spawn
        self._random = network.scheduler.random
        self._process: Process | None = None
        self._drive: Drive | None = None
        self._queues: dict[Stage, list[Request]] = {}
        self._busy: Counter[Stage] = Counter()
        self._under_way: list[Flight] = []
        self._rights: dict[int, int] = {}
        """By which reservation each read may write to the arena."""
        self._events: list[Event] = []
        node.at_death.append(self._orphan)

    @property
    def process(self) -> Process | None:
        """The disk process, if it lives."""
        return self._process

    # What the tier asks for.

    def start(self) -> None:
        assert self._process is None, "started twice"
        self._queues = {stage: [] for stage in Stage}
        self._busy = Counter()
        self._under_way = []
        process = self._process = self._spawn()
        process.at_death.append(lambda: self._died(process))
        process.call_later(OPEN_S + self._delay_s(), self._open, process)

    def submit(self, requests: Sequence[Request]) -> None:
        for request in requests:
            if request.kind is RequestKind.READ:
                self._rights[request.ticket] = self._right_to(request.arena_offset)
            sent = unpack_request(request.pack())
            self._queues[STAGES[sent.kind][0]].append(sent)
        self._pump_all()

    def poll(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
        self._events.clear()

    # What the process does.

    def _open(self, process: Process) -> None:
        disk = self._disk
        if disk.landing:
            # The real one is locked until the last transfer of its last user has ended.
            process.call_later(OPEN_S, self._open, process)
            return
        try:
            if disk.is_away:
                raise OSError(errno.ENODEV, "there is no disk")
            wanted = Wanted(
                process.machine, EXTENT_BYTES, disk.extents, disk.cells_max, self._random.randbytes
            )
            found = recover(disk.slab, disk.catalog, wanted)
        except OSError as fault:
            process.scheduler.say(process.name, f"does not open: {fault}")
            process.kill()
            return
        self._drive = Drive(found.slab, found.catalog, self._watched._arena.view)
        identity = found.slab.identity.pack()
        records, tombstones = found.records, found.tombstones
        self._check_promised(process, records)
        opening = Opening(OpeningKind.OPENED, found.note, identity, records, tombstones)
        self._events.append(unpack_opening(opening.pack()))
        process.scheduler.say(process.name, f"opens with {len(records)} cells {found.note}")

    def _pump_all(self) -> None:
        for stage in self._queues:
            self._pump(stage)

    def _pump(self, stage: Stage) -> None:
        """Give free threads of a stage what waits for it."""
        process, queue = self._process, self._queues[stage]
        while process is not None and queue and self._busy[stage] < THREADS[stage]:
            count = GROUP_MAX if stage in GROUPED else 1
            group = queue[:count]
            del queue[:count]
            self._busy[stage] += 1
            flight = stage, group
            self._under_way.append(flight)
            process.call_later(self._delay_s(), self._do, process, flight)

    def _do(self, process: Process, flight: Flight) -> None:
        assert self._drive is not None, "asked before it was open"
        stage, group = flight
        outcomes = self._transfer(self._drive, flight)
        self._under_way.remove(flight)
        self._busy[stage] -= 1
        for request, outcome in zip(group, outcomes, strict=True):
            stages = STAGES[request.kind]
            if outcome is Outcome.DONE and stage is not stages[-1]:
                following = stages[stages.index(stage) + 1]
                self._queues[following].append(request)
            else:
                answer = Answer(request.ticket, outcome)
                process.call_later(self._random.random() * ANSWER_S, self._tell, answer)
        if self._drive.is_broken:
            process.kill()
        else:
            self._pump_all()

    def _tell(self, event: Event) -> None:
        self._events.append(event)

    def _transfer(self, drive: Drive, flight: Flight) -> list[Outcome]:
        stage, group = flight
        if stage is Stage.READ:
            for request in (one for one in group if one.kind is RequestKind.READ):
                size_bytes = stored_bytes_of(int(request.record["length"]))
                self._watched.writing(
                    self._rights[request.ticket], request.arena_offset, size_bytes
                )
        return drive.do(stage, group)

    def _right_to(self, arena_offset: int) -> int:
        """The generation of the slot that was reserved there."""
        records = self._watched._table.slots
        mine = (records["offset"] == arena_offset) & (records["state"] == SlotState.RESERVED)
        return int(records["generation"][mine][0])

    def _died(self, process: Process) -> None:
        """Whatever it had begun goes on for as long as the kernel takes: while the node lives,
        until it has reaped the process."""
        if self._process is not process:
            return
        under_way, drive = self._under_way, self._drive
        self._process, self._drive, self._under_way = None, None, []
        for flight in under_way:
            if drive is None or self._random.random() < 0.4:
                continue
            landing = Landing(self._disk, partial(self._transfer, drive, flight))
            if self._node.alive:
                landing.land()
            else:
                self._disk.landing.append(landing)
                self._network.wire.call_later(self._delay_s(), landing.due)
        if self._node.alive:
            self._promise()
            self._events.append(Ended("the disk process has ended"))

    def _orphan(self) -> None:
        """The node is dead, and its disk process follows it."""
        self._promise()
        if self._process is not None:
            self._process.kill()

    def _promise(self) -> None:
        if self.nvme.phase is Phase.OPEN:
            held = self.nvme.held_records()
            self._disk.promised = {name_of(one): int(one["sequence"]) for one in held}

    def _check_promised(self, process: Process, found: Records) -> None:
        """What was held when the last process ended is there, unless the medium has eaten it."""
        names = {name_of(one) for one in found}
        gone = [n for n, s in self._disk.promised.items() if s not in self._disk.rotten]
        gone = [name for name in gone if name not in names]
        if gone:
            process.scheduler.fault(f"{process.name}: {len(gone)} promised cells are gone")

    def _delay_s(self) -> float:
        return self._random.uniform(*self._disk.took_s)
