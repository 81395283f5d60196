"""The shelf: which cells are where on the disk, and who leaves when there is no room.

    UNUSED ── place ──> WRITING ── publish ──> HELD ── drop ──> DROPPED ── release ──> UNUSED
                           ├────────────── drop ───────────────────┤
                           └── replace: HELD, and who was held ────┘

A record's *number* is its place in the index; numbers are used again after ``release``. Sizes get
their fair share by age: a size that has none of the oldest cells, and no room, is given the extent
whose latest use is the longest ago, with all that is in it.

Does not cover: disk work, and waiting for it (``tier``). All of it is memory, and packed.
"""

from array import array
from enum import IntEnum
from itertools import islice

import numpy as np
import numpy.typing as npt

from kvstore.eviction import TailFirstLru
from kvstore.key import Keys
from kvstore.table import Cells, Found, Slots
from kvstore.tiers.life import outlive, slide
from kvstore.tiers.nvme.extents import Extents, Place
from kvstore.tiers.nvme.identity import Identity
from kvstore.tiers.nvme.index import Index
from kvstore.tiers.nvme.record import Records, slot_bytes_of, slot_bytes_of_all
from kvstore.tiers.nvme.spill import Spill, packed_record

OLDEST_SEEN = 64
"""Among so many of the oldest cells, one of the wanted size is looked for first."""

_NEVER = np.uint64(np.iinfo(np.uint64).max)


class State(IntEnum):
    """What a record stands for."""

    UNUSED = 0
    WRITING = 1
    HELD = 2
    DROPPED = 3
    """Found no more; its slot is being read, or freed."""


class Shelf:
    """The cells of one slab."""

    def __init__(self, identity: Identity, cells_max: int) -> None:
        self.identity = identity
        self.held_cells = 0
        self.held_bytes = 0
        self._index = Index(cells_max)
        self.records: Records = self._index.records
        self.extents = Extents(identity)
        self._policy = TailFirstLru(cells_max)
        self._state = np.zeros(cells_max, np.uint8)
        self._pins = np.zeros(cells_max, np.uint16)
        self._dirty = np.zeros(cells_max, np.bool_)
        self._unused = array("I", range(cells_max - 1, -1, -1))
        self._cells = 1

    def enter(self, found: Records) -> list[int]:
        """Take over what an earlier life left; numbers of those that found no place."""
        numbers = np.arange(len(found), dtype=np.uint32)
        self.records[: len(found)] = found
        del self._unused[len(self._unused) - len(found) :]
        sizes = slot_bytes_of_all(found["length"])
        taken = self.extents.take_all(found["offset"], sizes)
        assert taken.all(), "two cells share a slot"
        self._state[: len(found)] = State.HELD
        self._policy.enter(numbers, found["depth"], found["stamp"])
        self.held_cells, self.held_bytes = len(found), int(sizes.sum())
        self._cells = 1 + int(found["cell"].max(initial=0))
        homeless: list[int] = self._index.insert_all(numbers).tolist()
        for number in homeless:
            self.drop(number)
        return homeless

    def find(self, keys: Keys, cells: Cells, wall_ms: int) -> Found:
        """Which cells are held and not expired; slots are record numbers, generations sequences."""
        held, numbers = self._index.find(keys, cells)
        rows = self.records[numbers]
        held &= (rows["expires_ms"] == 0) | (rows["expires_ms"] > np.uint64(wall_ms))
        return Found(
            held, numbers, rows["sequence"], rows["offset"], rows["length"], rows["header_digest"]
        )

    def numbers_of(self, keys: Keys) -> list[int]:
        """All held cells of these blocks."""
        cells = np.tile(np.arange(self._cells, dtype=np.uint8), len(keys))
        held, numbers = self._index.find(np.repeat(keys, self._cells, axis=0), cells)
        found: list[int] = np.unique(numbers[held]).tolist()
        return found

    def is_current(self, number: int, sequence: int) -> bool:
        """Whether a record still is the held cell that somebody found."""
        in_range = number < len(self.records) and self._state[number] == State.HELD
        return bool(in_range) and int(self.records[number]["sequence"]) == sequence

    def is_held(self, number: int) -> bool:
        """Whether the cell can be found."""
        return bool(self._state[number] == State.HELD)

    def are_held(self, numbers: Slots) -> npt.NDArray[np.bool_]:
        """Which of the cells can be found."""
        held: npt.NDArray[np.bool_] = self._state[numbers] == State.HELD
        return held

    def set_expiry(self, numbers: Slots, expires_ms: npt.NDArray[np.uint64]) -> None:
        """Say anew until when held cells live."""
        self.records["expires_ms"][numbers] = expires_ms
        self._dirty[numbers] = True

    def has_expired(self, number: int, wall_ms: int) -> bool:
        """Whether a cell's time is up."""
        expires_ms = int(self.records[number]["expires_ms"])
        return 0 < expires_ms <= wall_ms

    def next_stamp(self) -> int:
        """One stamp for one operation on one prompt."""
        return self._policy.next_stamp()

    def place(self, spill: Spill, sequence: int) -> tuple[int, Place] | None:
        """Give a cell a record and a slot, ``None`` if there is no free one."""
        if not self._unused:
            return None
        place = self.extents.allocate(slot_bytes_of(spill.length), sequence)
        if place is None:
            return None
        number = self._unused.pop()
        # The extent's page has the number that it was cut under; what is in it is younger.
        self.records[number] = packed_record(spill, place.offset, sequence + 1)
        self._state[number] = State.WRITING
        return number, place

    def publish(self, number: int) -> bool:
        """Let a written cell be found; ``False`` if the index has no place for it."""
        if not self._index.insert(number):
            return False
        record = self.records[number]
        self._state[number] = State.HELD
        self._cells = max(self._cells, 1 + int(record["cell"]))
        one = np.array([number], np.uint32)
        self._policy.touch(one, record["depth"].reshape(1), int(record["stamp"]))
        self.held_cells += 1
        self.held_bytes += self.slot_bytes(number)
        return True

    def replace(self, number: int, newer: int) -> None:
        """A written cell takes the place of the held one of its name, and its number.

        So whoever keeps that one keeps the new one from now on. The old slot is dropped, and has
        the other number.
        """
        former = self.records[number].copy()
        self.held_bytes += self.slot_bytes(newer) - self.slot_bytes(number)
        self.records[number] = self.records[newer]
        self.records[newer] = former
        self._state[newer] = State.DROPPED
        outlive(self.records, number, former)
        self._dirty[number] = True  # what was written knows nothing of the former one's life
        one = np.array([number], np.uint32)
        self._policy.touch(one, self.records["depth"][one], int(self.records["stamp"][number]))

    def drop(self, number: int) -> None:
        """Let a cell be found no more, or never."""
        if self._state[number] == State.HELD:
            self._index.remove(number)
            self._policy.remove(number)
            self.held_cells -= 1
            self.held_bytes -= self.slot_bytes(number)
        self._dirty[number] = False
        self._state[number] = State.DROPPED

    def release(self, number: int) -> None:
        """The slot of a dropped cell is free."""
        assert self._state[number] == State.DROPPED, "released before it was dropped"
        assert not self._pins[number], "released under a reader"
        self._state[number] = State.UNUSED
        self.extents.free(int(self.records[number]["offset"]))
        self._unused.append(number)

    def pin(self, number: int) -> None:
        """Keep a cell's slot as it is; counted."""
        self._pins[number] += 1

    def unpin(self, number: int) -> None:
        """Undo one ``pin``."""
        assert self._pins[number] > 0, "unpinned more often than pinned"
        self._pins[number] -= 1

    def is_pinned(self, number: int) -> bool:
        """Whether somebody is reading it."""
        return bool(self._pins[number])

    def slot_bytes(self, number: int) -> int:
        """What a cell takes of the capacity."""
        return slot_bytes_of(int(self.records[number]["length"]))

    def touch(self, numbers: Slots, stamp: int, wall_ms: int, ttl_s: int | None = None) -> None:
        """Move held cells to ``stamp`` and slide their expiry; never shortens a life.

        ``ttl_s`` is what a new put of them asks for, 0 for no expiry.
        """
        records = self.records
        self._policy.touch(numbers, records["depth"][numbers], stamp)
        slide(records, numbers, stamp, wall_ms, ttl_s)
        self._dirty[numbers] = True

    def take_dirty(self, count_max: int) -> list[int]:
        """Some of the cells that were touched since they were written down."""
        numbers = np.flatnonzero(self._dirty)[:count_max]
        self._dirty[numbers] = False
        found: list[int] = numbers.tolist()
        return found

    def expired(self, wall_ms: int, count_max: int) -> list[int]:
        """Some of the held cells that nobody may find any more, and nobody reads."""
        expires_ms = self.records["expires_ms"]
        past = (expires_ms != 0) & (expires_ms <= np.uint64(wall_ms))
        past &= (self._state == State.HELD) & (self._pins == 0)
        found: list[int] = np.flatnonzero(past)[:count_max].tolist()
        return found

    def room_for(self, slot_bytes: int) -> list[int]:
        """Which held cells should leave, so that a slot of that size gets free; none if none can.

        Nobody's who is reading.
        """
        victims = (n for n in self._policy.victims() if not self._pins[n])
        for number in islice(victims, OLDEST_SEEN):
            if not self._unused or self.slot_bytes(number) == slot_bytes:
                return [number]
        leaving = self._coldest_extent()
        if leaving and self.slot_bytes(leaving[0]) != slot_bytes:
            return leaving
        same = (n for n in self._policy.victims() if self.slot_bytes(n) == slot_bytes)
        return list(islice((n for n in same if not self._pins[n]), 1))

    def held(self) -> Slots:
        """All cells that can be found."""
        return np.flatnonzero(self._state == State.HELD).astype(np.uint32)

    def metadata_bytes(self) -> int:
        """Memory for bookkeeping."""
        arrays = (self._state, self._pins, self._dirty)
        packed = sum(int(one.nbytes) for one in arrays) + self._index.metadata_bytes()
        return packed + self._policy.metadata_bytes() + self._unused.itemsize * len(self._unused)

    def _coldest_extent(self) -> list[int]:
        """The cells of the extent whose latest use is the longest ago, and that nobody uses now."""
        there = np.flatnonzero(self._state != State.UNUSED)
        extents = self.identity.extents_of(self.records["offset"][there])
        is_held = self._state[there] == State.HELD
        is_busy = (is_held & (self._pins[there] != 0)) | (self._state[there] == State.WRITING)
        latest = np.full(self.identity.extents, _NEVER, np.uint64)
        latest[extents[is_held]] = 0
        np.maximum.at(latest, extents[is_held], self.records["stamp"][there[is_held]])
        latest[extents[is_busy]] = _NEVER
        coldest = int(latest.argmin())
        if latest[coldest] == _NEVER:
            return []
        leaving: list[int] = there[is_held & (extents == coldest)].tolist()
        return leaving
