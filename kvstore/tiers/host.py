"""The host tier: cells in shared memory, from reservation to eviction.

    UNUSED ── reserve ──> RESERVED ── commit ──> COMMITTED ── free ──> QUARANTINED ──> UNUSED
                             ├── abort (the writer's own word) ──────────────┘
                             └── retire (any other end): its offsets for good ───────────┘

Only this class writes the key table. It is driven by one thread, reads the time through its
clock, and knows nothing of sessions, leases or the network (``kvstore.node``). A cell that cannot
be stored is refused with a reason; what was held before is still held then. What a successor makes
of the slots is said in ``kvstore.tiers.adoption``.
"""

import logging
from array import array
from collections import deque
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kvstore.arena import ARENA_FILE, Arena
from kvstore.block import HEADER_BYTES, FormatFault, parse_header
from kvstore.clock import Clock
from kvstore.errors import StateError
from kvstore.eviction import TailFirstLru
from kvstore.fs import FileSystem
from kvstore.key import Keys
from kvstore.table import (
    GENERATION_COUNTER_BITS,
    NO_ENTRY,
    TABLE_FILE,
    Cells,
    Found,
    KeyTable,
    Slots,
    SlotState,
)
from kvstore.tiers.adoption import take_over
from kvstore.tiers.inspection import is_whole
from kvstore.tiers.life import slide
from kvstore.tiers.space import Space
from kvstore.tiers.stats import HostStats
from kvstore.tiers.tier import CellChange, Commitment, NewCell, Refusal

log = logging.getLogger(__name__)

QUARANTINE_S = 0.2
"""How long a freed slot rests, unless its memory is needed: saves late readers a wasted copy."""
RETIRED_SWEEP_S = 60.0


class HostTier:
    """Cells in an arena, found through a key table, evicted by a policy."""

    def __init__(
        self, fs: FileSystem, clock: Clock, arena: Arena, table: KeyTable, incarnation: int
    ) -> None:
        self.table = table
        self.arena = arena
        self.incarnation = incarnation
        self.stats = HostStats(capacity_bytes=int(table.header["capacity_bytes"]))
        self._page_bytes = fs.page_bytes
        self._clock = clock
        self._space = Space(arena, table)
        self._policy = TailFirstLru(len(table.slots))
        self._pins = np.zeros(len(table.slots), np.uint32)
        self._unused = array("I", range(len(table.slots) - 1, -1, -1))
        self._writing: dict[tuple[bytes, int], int] = {}
        self._reserved_keys: dict[int, bytes] = {}
        self._quarantine: deque[tuple[float, int]] = deque()
        self._changes: list[CellChange] = []
        self._counter = 0
        self._swept_s = clock.monotonic_s()
        table.header["incarnation"] = incarnation

    @classmethod
    def create(
        cls,
        fs: FileSystem,
        clock: Clock,
        folder: Path,
        capacity_bytes: int,
        slots: int,
        incarnation: int,
    ) -> "HostTier":
        """An empty tier. Whatever the folder held is gone."""
        fs.make_folder(folder)
        fs.remove(folder / TABLE_FILE)
        fs.remove(folder / ARENA_FILE)
        capacity_bytes -= capacity_bytes % fs.page_bytes
        arena = Arena.create(fs, folder, capacity_bytes)
        table = KeyTable.create(fs, folder, slots, capacity_bytes, incarnation)
        tier = cls(fs, clock, arena, table, incarnation)
        tier._space.free(0, capacity_bytes)
        return tier

    @classmethod
    def adopt(
        cls, fs: FileSystem, clock: Clock, folder: Path, capacity_bytes: int, incarnation: int
    ) -> "HostTier":
        """Go on with what a predecessor of the same boot and size left.

        Whole, committed cells are held again; what was being written is retired. Raises
        ``StateError``, saying why, when there is nothing to adopt.
        """
        capacity_bytes -= capacity_bytes % fs.page_bytes
        left = take_over(fs, folder, capacity_bytes, incarnation)
        tier = cls(fs, clock, left.arena, left.table, incarnation)
        records = left.table.slots
        tier._space.take_over(left.free, tier._extents(left.unfinished))
        records["state"][left.unfinished] = SlotState.UNUSED
        tier._policy.enter(left.held, records["depth"][left.held], records["stamp"][left.held])
        unused = np.flatnonzero(records["state"] == SlotState.UNUSED)[::-1]
        tier._unused = array("I", unused.tolist())
        tier.stats.held_cells = tier.stats.adopted = len(left.held)
        tier.stats.held_bytes = int(records["size_bytes"][left.held].sum())
        tier.stats.retired_bytes = tier._space.retired_bytes
        return tier

    def find(self, keys: Keys, cells: Cells) -> Found:
        """Which cells are held and not expired. Neither pins nor touches."""
        found = self.table.find(keys, cells)
        found.held[:] &= ~self.table.expired(found.slots, self._clock.wall_ms())
        return found

    def find_for_writing(self, keys: Keys, cells: Cells) -> Found:
        """``find``, but expired cells that stand in the way of new ones are dropped."""
        found = self.table.find(keys, cells)
        expired = found.held & self.table.expired(found.slots, self._clock.wall_ms())
        for slot in dict.fromkeys(found.slots[expired].tolist()):
            if not self._pins[slot]:
                self._count_eviction(slot)
                self.evict(slot)
                found.held[found.slots == slot] = False
        return found

    def next_stamp(self) -> int:
        """One stamp for one operation on one prompt."""
        return self._policy.next_stamp()

    def touch(self, slots: Slots, stamp: int, ttl_s: int | None = None) -> None:
        """Move held cells to ``stamp`` and slide their expiry; never shortens a life.

        ``ttl_s`` is what a new put of them asks for, 0 for no expiry.
        """
        records = self.table.slots
        self._policy.touch(slots, records["depth"][slots], stamp)
        slide(records, slots, stamp, self._clock.wall_ms(), ttl_s)

    def is_writing(self, key: bytes, cell: int) -> bool:
        """Whether somebody has this cell reserved."""
        return (key, cell) in self._writing

    def reserve(self, new: NewCell, stamp: int) -> int | Refusal:
        """Give a cell that is neither held nor being written a slot; evicts to make room."""
        size = -(-(HEADER_BYTES + new.length) // self._page_bytes) * self._page_bytes
        if size > self.stats.capacity_bytes:
            return Refusal.TOO_LARGE
        offset = self._allocate(size)
        if isinstance(offset, Refusal):
            return offset
        slot = self._unused.pop()
        record = self.table.slots[slot]
        record["generation"] = self._next_generation()
        record["offset"] = offset
        record["size_bytes"] = size
        record["length"] = new.length
        record["entry"] = NO_ENTRY
        record["cell"] = new.cell
        record["tokens"] = new.tokens
        record["depth"] = new.depth
        record["span"] = new.span
        record["stamp"] = stamp
        record["ttl_s"] = new.ttl_s
        record["expires_ms"] = self._clock.wall_ms() + new.ttl_s * 1000 if new.ttl_s else 0
        record["state"] = SlotState.RESERVED
        self._writing[new.key, new.cell] = slot
        self._reserved_keys[slot] = new.key
        self.stats.reserved_cells += 1
        return slot

    def commit(self, slot: int, header_digest: int) -> Commitment:
        """Make a reserved slot visible if it holds the cell that was announced.

        Unless it is STORED, the slot is free again, because its writer has said that it is done.
        """
        key = self._end_reservation(slot)
        record = self.table.slots[slot]
        header = parse_header(self._header_page(slot), header_digest)
        agreed = not isinstance(header, FormatFault) and (
            (header.key, header.cell, header.tokens, header.payload_bytes)
            == (key, int(record["cell"]), int(record["tokens"]), int(record["length"]))
        )
        if not agreed or not self._publish(key, slot, header_digest):
            self._free(slot)
            self.stats.aborted += 1
            return Commitment.NO_ROOM if agreed else Commitment.DAMAGED
        one = np.array([slot], np.uint32)
        self._policy.touch(one, record["depth"].reshape(1), int(record["stamp"]))
        self.stats.held_cells += 1
        self.stats.held_bytes += int(record["size_bytes"])
        self.stats.stored += 1
        self._changes.append(CellChange(key, int(record["cell"]), int(record["span"]), added=True))
        return Commitment.STORED

    def abort(self, slot: int) -> None:
        """The writer itself says that it will not write any more: the slot is free."""
        self._end_reservation(slot)
        self._free(slot)
        self.stats.aborted += 1

    def retire(self, slot: int) -> None:
        """The writer may still write: its offsets are never used again."""
        self._end_reservation(slot)
        record = self.table.slots[slot]
        record["generation"] = self._next_generation()
        self._space.retire(int(record["offset"]), int(record["size_bytes"]))
        record["state"] = SlotState.UNUSED
        self._unused.append(slot)
        self.stats.retired += 1
        self.stats.retired_bytes = self._space.retired_bytes

    @property
    def free_bytes(self) -> int:
        """What could be handed out without evicting anything."""
        return self._space.free_bytes

    def next_victims(self, count: int) -> list[int]:
        """Some of the held cells, those first that would be evicted first."""
        seen = islice(self._policy.victims(), count)
        return [slot for slot in dict.fromkeys(seen) if not self._pins[slot]]

    def pin(self, slots: Sequence[int]) -> None:
        """Keep cells from being evicted; counted."""
        for slot in slots:
            self._pins[slot] += 1

    def unpin(self, slots: Sequence[int]) -> None:
        """Undo one ``pin``."""
        for slot in slots:
            assert self._pins[slot] > 0, "unpinned more often than pinned"
            self._pins[slot] -= 1

    def evict(self, slot: int) -> None:
        """Drop a held, unpinned cell."""
        assert self._pins[slot] == 0, "evicted while pinned"
        record = self.table.slots[slot]
        key = self.table.key_of(slot)
        self._changes.append(CellChange(key, int(record["cell"]), int(record["span"]), added=False))
        self.table.clear(slot)
        self._policy.remove(slot)
        self.stats.held_cells -= 1
        self.stats.held_bytes -= int(record["size_bytes"])
        self._free(slot)

    def discard(self, slot: int, leaf_bytes: Sequence[int]) -> bool:
        """Drop a held cell that is damaged; one that is whole, or pinned, stays."""
        if self._pins[slot] or is_whole(self.arena, self.table, slot, leaf_bytes):
            return False
        self.stats.damaged += 1
        self.evict(slot)
        return True

    def tick(self) -> None:
        """Let rested slots be used again, and take back memory behind retired offsets."""
        now_s = self._clock.monotonic_s()
        while self._quarantine and self._quarantine[0][0] <= now_s:
            self._release_oldest()
        if now_s - self._swept_s >= RETIRED_SWEEP_S:
            self._swept_s = now_s
            self._space.sweep()

    def drain_changes(self) -> list[CellChange]:
        """What came and went since the last call, in order."""
        changes, self._changes = self._changes, []
        return changes

    def held_slots(self) -> Slots:
        """All slots with a visible cell."""
        return np.flatnonzero(self.table.slots["state"] == SlotState.COMMITTED).astype(np.uint32)

    def metadata_bytes(self) -> int:
        """Memory for bookkeeping, payload and headers not counted."""
        table = self.table
        return (
            table.nbytes
            + int(self._pins.nbytes)
            + (self._policy.metadata_bytes() + self._unused.itemsize * len(self._unused))
        )

    def _allocate(self, size: int) -> int | Refusal:
        """A range of ``size`` bytes and a free slot record, evicting what it takes, or nothing."""
        while self._quarantine and (not self._unused or not self._space.has_room(size)):
            self._release_oldest()
        if self._unused and (offset := self._space.allocate(size)) is not None:
            return offset
        makes_room = False
        for slot in self._policy.victims():
            if self._pins[slot]:
                continue
            makes_room = makes_room or int(self.table.slots[slot]["size_bytes"]) >= size
            if not makes_room and self._space.longest_stretch(self._in_use()) < size:
                break
            makes_room = True
            self._count_eviction(slot)
            self.evict(slot)
            self._release_all()
            if (offset := self._space.allocate(size)) is not None:
                return offset
        return Refusal.SHRUNK if self._space.longest_stretch(()) < size else Refusal.NO_ROOM

    def _in_use(self) -> list[tuple[int, int]]:
        """Start and length of what can't be evicted now."""
        return self._extents(np.array([*self._reserved_keys, *np.flatnonzero(self._pins)], np.intp))

    def _extents(self, slots: npt.NDArray[np.integer]) -> list[tuple[int, int]]:
        """Start and length of each slot's range."""
        found = self.table.slots[slots]
        return list(zip(found["offset"].tolist(), found["size_bytes"].tolist(), strict=True))

    def _count_eviction(self, slot: int) -> None:
        expires = int(self.table.slots[slot]["expires_ms"])
        if expires and expires <= self._clock.wall_ms():
            self.stats.expired += 1
        else:
            self.stats.evicted += 1

    def _publish(self, key: bytes, slot: int, header_digest: int) -> bool:
        if self.table.insert(key, slot, header_digest):
            return True
        cell = int(self.table.slots[slot]["cell"])
        for rival in sorted(self.table.rivals(key, cell), key=self._age):
            if not self._pins[rival]:
                self._count_eviction(rival)
                self.evict(rival)
                return self.table.insert(key, slot, header_digest)
        return False

    def _age(self, slot: int) -> int:
        return int(self.table.slots[slot]["stamp"])

    def _end_reservation(self, slot: int) -> bytes:
        key = self._reserved_keys.pop(slot)
        del self._writing[key, int(self.table.slots[slot]["cell"])]
        self.stats.reserved_cells -= 1
        return key

    def _free(self, slot: int) -> None:
        record = self.table.slots[slot]
        record["generation"] = self._next_generation()
        record["state"] = SlotState.QUARANTINED
        self._quarantine.append((self._clock.monotonic_s() + QUARANTINE_S, slot))

    def _release_oldest(self) -> None:
        _, slot = self._quarantine.popleft()
        record = self.table.slots[slot]
        record["state"] = SlotState.UNUSED
        self._space.free(int(record["offset"]), int(record["size_bytes"]))
        self._unused.append(slot)

    def _release_all(self) -> None:
        while self._quarantine:
            self._release_oldest()

    def _next_generation(self) -> int:
        self._counter += 1
        return self.incarnation << GENERATION_COUNTER_BITS | self._counter

    def _header_page(self, slot: int) -> bytes:
        return self.arena.view(int(self.table.slots[slot]["offset"]), HEADER_BYTES).tobytes()


def default_slots(capacity_bytes: int) -> int:
    """How many cells a tier of this size has records for."""
    return int(np.clip(capacity_bytes // 65536, 1024, 1 << 22))


def open_tier(
    fs: FileSystem, clock: Clock, folder: Path, capacity_bytes: int, incarnation: int
) -> HostTier:
    """Adopt what is in ``folder``, or start empty and say why."""
    try:
        tier = HostTier.adopt(fs, clock, folder, capacity_bytes, incarnation)
    except StateError as reason:
        log.info("starting with an empty arena in %s: %s", folder, reason)
        slots = default_slots(capacity_bytes)
        return HostTier.create(fs, clock, folder, capacity_bytes, slots, incarnation)
    log.info("adopted %d cells in %s", tier.stats.adopted, folder)
    return tier
