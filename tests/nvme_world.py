"""Tiny worlds for the NVMe tier: a disk that crashes, a catalog in memory, an arena of cells.

The disk keeps writes that were not synced apart: a crash keeps, loses or tears each of them,
sector by sector. Every operation on disk and catalog is a step, and a world can be told at which
step to crash, or to fail. Payloads follow from their names, as in ``tests.worlds``, so whoever
loads a cell can say whether its bytes are right.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import numpy.typing as npt

from kvstore.block import HEADER_BYTES, Header, header_digest, leaf_digests
from kvstore.clock import Clock, ManualClock
from kvstore.errors import StateError
from kvstore.fs import Mapped
from kvstore.table import Found
from kvstore.tiers.nvme.catalog import CatalogDamage, Change, Content
from kvstore.tiers.nvme.disk import Disk, aligned_bytes
from kvstore.tiers.nvme.disk_queue import Answer, Ended, Event
from kvstore.tiers.nvme.drive import GROUPED, STAGES, Drive, Stage
from kvstore.tiers.nvme.identity import Identity
from kvstore.tiers.nvme.record import PAGE_BYTES, RECORD, TOMBSTONE, slot_bytes_of
from kvstore.tiers.nvme.recovery import CatalogPlace, Wanted, recover
from kvstore.tiers.nvme.requests import Opening, OpeningKind, Outcome, Request, no_opening
from kvstore.tiers.nvme.spill import Declined, Done, Phase, Result, Spill
from kvstore.tiers.nvme.tier import NvmeTier
from tests.worlds import cells_of, key_number, packed, right_payload

SECTOR_BYTES = 512
EXTENT_BYTES = 9 * PAGE_BYTES
"""A page for itself, and room for four slots of two pages, or two of four."""
EXTENTS = 3
SLOTS = 12
"""Of two pages, that the slab has room for."""
CELLS_MAX = 14
ARENA_SLOT_BYTES = 8 * PAGE_BYTES
ARENA_SLOTS = 20


class Crash(BaseException):
    """The machine lost power; nothing that catches errors catches this."""


class Steps:
    """Counts operations; crashes, or fails some of them, when told to."""

    def __init__(self, crash_at: int = 0) -> None:
        self.taken = 0
        self.crash_at = crash_at
        self.faults: dict[str, int] = {}
        """Which operations raise what, until it is taken out."""

    def take(self, name: str) -> None:
        self.taken += 1
        if self.taken == self.crash_at:
            raise Crash
        if name in self.faults:
            raise OSError(self.faults[name], f"made to fail: {name}")


class SimulatedDisk:
    """A file of pages on a disk with a volatile cache."""

    is_direct = True

    def __init__(self, steps: Steps, rng: random.Random) -> None:
        self.steps = steps
        self.image = bytearray()
        """What would be there after a crash now, at least."""
        self.is_short = False
        self._unsynced: list[tuple[int, bytes]] = []
        self._rng = rng

    def size_bytes(self) -> int:
        return len(self.image)

    def allocate(self, size_bytes: int) -> None:
        self.steps.take("allocate")
        del self.image[size_bytes:]
        self.image += bytes(size_bytes - len(self.image))

    def read(self, buffers: Sequence[Mapped], offset: int) -> int:
        self.steps.take("read")
        wanted = sum(len(buffer) for buffer in buffers)
        found = bytes(self._seen()[offset : offset + self._length(wanted)])
        self._spread(buffers, found)
        return len(found)

    def write(self, buffers: Sequence[Mapped], offset: int) -> int:
        whole = b"".join(buffer.tobytes() for buffer in buffers)
        gone = whole[: self._length(len(whole))]
        self._unsynced.append((offset, gone))
        # The crash may come in the middle of this write.
        self.steps.take("write")
        return len(gone)

    def sync(self) -> None:
        self.steps.take("sync")
        self.image = self._seen()
        self._unsynced = []

    def close(self) -> None:
        pass

    def crash(self) -> None:
        """Lose power: of what was not synced each sector is there or not."""
        for offset, data in self._unsynced:
            fate = self._rng.random()
            for start in range(0, len(data), SECTOR_BYTES):
                if fate < 0.3 or (fate < 0.6 and self._rng.random() < 0.5):
                    piece = data[start : start + SECTOR_BYTES]
                    self.image[offset + start : offset + start + len(piece)] = piece
        self._unsynced = []

    def lose(self) -> None:
        """Lose power at the worst moment: nothing that was not synced is there."""
        self._unsynced = []

    def flip(self, bit: int) -> None:
        """Damage the medium."""
        self.image = self._seen()
        self._unsynced = []
        self.image[bit // 8] ^= 1 << bit % 8

    def _seen(self) -> bytearray:
        image = bytearray(self.image)
        for offset, data in self._unsynced:
            image[offset : offset + len(data)] = data
        return image

    def _length(self, wanted: int) -> int:
        if self.is_short and wanted > PAGE_BYTES:
            return PAGE_BYTES * self._rng.randint(1, wanted // PAGE_BYTES)
        return wanted

    @staticmethod
    def _spread(buffers: Sequence[Mapped], found: bytes) -> None:
        at = 0
        for buffer in buffers:
            piece = np.frombuffer(found[at : at + len(buffer)], np.uint8)
            buffer[: len(piece)] = piece
            at += len(buffer)


class MemoryCatalog:
    """Both a catalog and its place: rows that a commit makes durable, all or none."""

    def __init__(self, steps: Steps, rng: random.Random) -> None:
        self.steps = steps
        self.identity = b""
        self.rows: dict[tuple[bytes, int], bytes] = {}
        self.buried: dict[bytes, bytes] = {}
        self.damage = ""
        """Why it can't be read, if so."""
        self._rng = rng

    def read(self) -> Content | None:
        if self.damage:
            raise CatalogDamage(self.damage)
        if not self.identity:
            return None
        records = np.frombuffer(b"".join(self.rows.values()), RECORD)
        tombstones = np.frombuffer(b"".join(self.buried.values()), TOMBSTONE)
        return Content(self.identity, records, tombstones)

    def discard(self) -> None:
        self.steps.take("discard")
        self.identity, self.damage = b"", ""
        self.rows, self.buried = {}, {}

    def open(self, identity: Identity, change: Change) -> "MemoryCatalog":
        self.steps.take("open")
        self.identity, self.rows, self.buried = identity.pack(), {}, {}
        self._apply(change)
        return self

    def commit(self, change: Change) -> None:
        is_durable = self._rng.random() < 0.5  # should we crash now
        try:
            self.steps.take("commit")
        except Crash:
            if is_durable:
                self._apply(change)
            raise
        self._apply(change)

    def close(self) -> None:
        pass

    def _apply(self, change: Change) -> None:
        for record in change.puts:
            self.rows[record["key"].tobytes(), int(record["cell"])] = record.tobytes()
        for record in change.removals:
            name = record["key"].tobytes(), int(record["cell"])
            row = np.frombuffer(self.rows[name], RECORD)[0] if name in self.rows else None
            if row is not None and int(row["sequence"]) == int(record["sequence"]):
                del self.rows[name]
        for tombstone in change.forgotten:
            self.buried.pop(tombstone["key"].tobytes(), None)
        for tombstone in change.tombstones:
            self.buried[tombstone["key"].tobytes()] = tombstone.tobytes()


class InlineQueue:
    """Does the disk work itself, in an order that only its seed knows.

    ``work`` does some of it; ``poll`` says what is done. With ``is_eager`` a poll does all.
    """

    def __init__(
        self,
        disk: Disk,
        place: CatalogPlace,
        arena: Mapped,
        rng: random.Random,
        owner: str = "node-a",
    ) -> None:
        self.is_eager = True
        self.owner = owner
        self._disk = disk
        self._place = place
        self._arena = arena
        self._rng = rng
        self._drive: Drive | None = None
        self._queues: dict[Stage, list[Request]] = {stage: [] for stage in Stage}
        self._events: list[Event] = []

    def start(self) -> None:
        try:
            wanted = Wanted(self.owner, EXTENT_BYTES, EXTENTS, CELLS_MAX, self._rng.randbytes)
            found = recover(self._disk, self._place, wanted)
        except StateError as refusal:
            self._events.append(no_opening(OpeningKind.REFUSED, str(refusal)))
            return
        except OSError as fault:
            self._events.append(Ended(str(fault)))
            return
        self._drive = Drive(found.slab, found.catalog, self._view)
        identity = found.slab.identity.pack()
        opened = OpeningKind.OPENED
        self._events.append(Opening(opened, found.note, identity, found.records, found.tombstones))

    def submit(self, requests: Sequence[Request]) -> None:
        assert self._drive is not None, "asked while away"
        for request in requests:
            self._queues[STAGES[request.kind][0]].append(request)

    def work(self) -> None:
        """One stage of one request, or of a group; transfers in any order, groups in theirs."""
        assert self._drive is not None, "asked while away"
        stage = self._rng.choice([stage for stage, queue in self._queues.items() if queue])
        queue = self._queues[stage]
        if stage in GROUPED:
            count = self._rng.randint(1, len(queue))
            group, self._queues[stage] = queue[:count], queue[count:]
        else:
            group = [queue.pop(self._rng.randrange(len(queue)))]
        for request, outcome in zip(group, self._drive.do(stage, group), strict=True):
            stages = STAGES[request.kind]
            if outcome is Outcome.DONE and stage is not stages[-1]:
                self._queues[stages[stages.index(stage) + 1]].append(request)
            else:
                self._events.append(Answer(request.ticket, outcome))

    def poll(self) -> list[Event]:
        while self.is_eager and self.has_work():
            self.work()
        events, self._events = self._events, []
        return events

    def has_work(self) -> bool:
        return any(self._queues.values())

    def is_idle(self) -> bool:
        return not (self.has_work() or self._events)

    def die(self) -> None:
        """The process ends; what it was asked is lost, what it wrote is not."""
        self.stop()
        self._events = [Ended("it was killed")]

    def stop(self) -> None:
        self._queues = {stage: [] for stage in Stage}
        self._events = []
        self._drive = None

    def _view(self, offset: int, length: int) -> Mapped:
        return self._arena[offset : offset + length]


@dataclass
class NvmeWorld:
    """One node's NVMe tier, and what its owner knows of it."""

    seed: int
    crash_at: int = 0
    clock: ManualClock = field(default_factory=ManualClock)
    incarnation: int = 0

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.steps = Steps(self.crash_at)
        self.disk = SimulatedDisk(self.steps, self.rng)
        self.catalog = MemoryCatalog(self.steps, self.rng)
        self.arena = aligned_bytes(ARENA_SLOTS * ARENA_SLOT_BYTES)
        self.offered: set[tuple[bytes, int]] = set()
        self.offers: dict[bytes, int] = {}
        """When a block was offered last, in calls."""
        self.calls = 0
        self.deleted: set[bytes] = set()
        """Blocks whose deletion was acknowledged, and that nobody has offered since."""
        self.stores: dict[int, tuple[Spill, int]] = {}
        self.loads: dict[int, tuple[np.void, int]] = {}
        self.deletes: dict[int, tuple[bytes, int]] = {}
        self.results: dict[int, Result] = {}
        self.free_arena = list(range(ARENA_SLOTS))
        self.promised: set[tuple[bytes, int]] = set()
        """What was held when the last life ended."""

    def start(self) -> None:
        """A node begins on what the disk has."""
        self.incarnation += 1
        self.queue = self.new_queue()
        self.tier = NvmeTier(self.queue, self.clock, CELLS_MAX, self.incarnation)
        self.take(self.tier.poll())

    def new_queue(self) -> InlineQueue:
        return InlineQueue(self.disk, self.catalog, self.arena, self.rng)

    def restart(self, power_lost: bool = True) -> None:
        """The node is gone, in the middle of whatever it did, and begins anew."""
        if hasattr(self, "tier"):
            self.promised = self.held()
            del self.tier
        if power_lost:
            self.disk.crash()
        self.stores, self.loads, self.deletes = {}, {}, {}
        self.free_arena = list(range(ARENA_SLOTS))
        self.start()

    def store(self, number: int, cell: int = 0, pages: int = 1, ttl_s: int = 0) -> int | Declined:
        """Put a cell into the arena and offer it."""
        slot = self.free_arena.pop()
        offset = slot * ARENA_SLOT_BYTES
        spill = write_spill(self.arena, offset, number, cell, pages, self.clock, ttl_s)
        ticket = self.tier.store(spill)
        if isinstance(ticket, Declined):
            self.free_arena.append(slot)
            return ticket
        self.stores[ticket] = (spill, slot)
        self.offered.add((spill.key, cell))
        self.calls += 1
        self.offers[spill.key] = self.calls
        self.deleted.discard(spill.key)
        return ticket

    def load(self, number: int, cell: int = 0) -> int | Declined:
        """Ask for a cell if it is found."""
        found = self.find(number, cell)
        if not found.held[0]:
            return Declined.GONE
        slot = self.free_arena.pop()
        record_number = int(found.slots[0])
        ticket = self.tier.load(record_number, int(found.generations[0]), slot * ARENA_SLOT_BYTES)
        assert isinstance(ticket, int), "found, and gone within one call"
        records = self.tier.held_records()
        record = records[records["sequence"] == found.generations[0]][0].copy()
        self.loads[ticket] = (record, slot)
        return ticket

    def delete(self, number: int) -> int:
        ticket = self.tier.delete(packed([key_number(number)]))
        self.calls += 1
        self.deletes[ticket] = (key_number(number), self.calls)
        for cell in range(2):
            assert not self.holds(number, cell), "visible after its delete"
        return ticket

    def find(self, number: int, cell: int = 0) -> Found:
        return self.tier.find(packed([key_number(number)]), cells_of(cell))

    def holds(self, number: int, cell: int = 0) -> bool:
        return bool(self.find(number, cell).held[0])

    def settle(self) -> None:
        """Everything that was asked is done."""
        self.take(self.tier.poll())
        while not self.queue.is_idle():
            self.take(self.tier.poll())

    def take(self, done: list[Done]) -> None:
        """Note results, and look at every cell that was delivered."""
        for one in done:
            self.results[one.ticket] = one.result
            if one.ticket in self.stores:
                _, slot = self.stores.pop(one.ticket)
                self.free_arena.append(slot)
            elif one.ticket in self.loads:
                record, slot = self.loads.pop(one.ticket)
                self.free_arena.append(slot)
                if one.result is Result.LOADED:
                    self.check_bytes(record, slot)
            elif one.ticket in self.deletes:
                key, asked = self.deletes.pop(one.ticket)
                if self.offers.get(key, 0) < asked:
                    self.deleted.add(key)

    def check_bytes(self, record: np.void, slot: int) -> None:
        """What was delivered is the cell, to the last bit."""
        start = slot * ARENA_SLOT_BYTES
        key, cell, length = record["key"].tobytes(), int(record["cell"]), int(record["length"])
        image, _ = cell_image(key, cell, length)
        assert (self.arena[start : start + len(image)] == image).all(), "wrong bytes"

    def held(self) -> set[tuple[bytes, int]]:
        """What can be found, whether expired or not."""
        return {(r["key"].tobytes(), int(r["cell"])) for r in self.tier.held_records()}

    def check_accounting(self) -> None:
        """The tier's sums are those of its records, and no two of them share a byte."""
        if self.tier.phase is not Phase.OPEN:
            return
        self.take(self.tier.poll())
        records = self.tier.held_records()
        sizes = [slot_bytes_of(int(r["length"])) for r in records]
        stats = self.tier.stats
        assert (stats.held_cells, stats.held_bytes) == (len(records), sum(sizes))
        assert stats.held_bytes <= stats.capacity_bytes
        spans = sorted(zip(records["offset"].tolist(), sizes, strict=True))
        ends = [start + size for start, size in spans]
        assert all(end <= start for end, (start, _) in zip(ends, spans[1:], strict=False))

    def check_after_start(self) -> None:
        """After a crash: what was promised is there, nothing else than was stored, all of it whole.

        Does not go on with the world's own tickets.
        """
        assert self.tier.phase is Phase.OPEN
        held = self.held()
        assert self.promised <= held, "a promised cell is gone"
        assert held <= self.offered, "a cell that nobody stored"
        assert not {key for key, _ in held} & self.deleted, "a deleted block came back"
        self.check_accounting()
        self.check_all_load()
        assert self.held() == held, "a held cell could not be read"

    def check_all_load(self) -> None:
        """Read everything that is held; wrong bytes fail in ``take``."""
        self.queue.is_eager = True
        for record in self.tier.held_records():
            found = self.tier.find(record["key"].view(np.uint8).reshape(1, -1),
                                   cells_of(int(record["cell"])))  # fmt: skip
            if found.held[0]:
                slot = self.free_arena.pop()
                ticket = self.tier.load(
                    int(found.slots[0]), int(found.generations[0]), slot * ARENA_SLOT_BYTES
                )
                assert isinstance(ticket, int)
                self.loads[ticket] = (record.copy(), slot)
                self.settle()


@cache
def cell_image(key: bytes, cell: int, length: int) -> tuple[npt.NDArray[np.uint8], int]:
    """Header page and payload of a cell of one leaf, and the header's digest."""
    payload = right_payload(key, cell, length)
    digests = tuple(leaf_digests(key, cell, [payload.reshape(1, 1, -1)]))
    header = Header(key, cell, 16, length, cell, 7, digests).pack()
    image = np.zeros(HEADER_BYTES + length, np.uint8)
    image[: len(header)] = np.frombuffer(header, np.uint8)
    image[HEADER_BYTES:] = payload
    return image, header_digest(header)


def write_spill(
    arena: npt.NDArray[np.uint8],
    offset: int,
    number: int,
    cell: int,
    pages: int,
    clock: Clock,
    ttl_s: int = 0,
) -> Spill:
    """Put a cell of so many payload pages into the arena; the offer of it."""
    key, length = key_number(number), pages * PAGE_BYTES - 100
    image, digest = cell_image(key, cell, length)
    arena[offset : offset + len(image)] = image
    return Spill(
        key=key, cell=cell, tokens=16, length=length, depth=cell, span=7,
        header_digest=digest, stamp=number + 1, ttl_s=ttl_s,
        expires_ms=clock.wall_ms() + ttl_s * 1000 if ttl_s else 0, arena_offset=offset,
    )  # fmt: skip
