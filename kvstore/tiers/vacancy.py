"""Vacancy: the slot records that nobody has, and freed slots at rest before they are used again.

    freed ──> at rest (QUARANTINED) ── time is up, or its memory is needed ──> vacant (UNUSED)

Every new use of a slot has a generation of its own. Does not cover: free ranges (``space``), who
frees slots, and why (``host``).
"""

from array import array
from collections import deque

import numpy as np

from kvstore.clock import Clock
from kvstore.table import GENERATION_COUNTER_BITS, Generations, KeyTable, SlotState
from kvstore.tiers.space import Space

QUARANTINE_S = 0.2
"""How long a freed slot rests, unless its memory is needed: saves late readers a wasted copy."""


class Vacancy:
    """Which slot records of a table may be taken, now or soon."""

    def __init__(self, table: KeyTable, space: Space, clock: Clock, incarnation: int) -> None:
        self._slots = table.slots
        self._space = space
        self._clock = clock
        self._generation = incarnation << GENERATION_COUNTER_BITS
        self._resting: deque[tuple[float, int]] = deque()
        unused = np.flatnonzero(table.slots["state"] == SlotState.UNUSED)[::-1]
        self._vacant = array("I", unused.astype(np.uint32).tobytes())

    @property
    def nbytes(self) -> int:
        """Memory for bookkeeping."""
        return self._vacant.itemsize * len(self._vacant)

    def next_generation(self) -> int:
        """One that no use of a slot has had."""
        self._generation += 1
        return self._generation

    def next_generations(self, count: int) -> Generations:
        """As many of them."""
        first, self._generation = self._generation + 1, self._generation + count
        return np.arange(first, first + count, dtype=np.uint64)

    def allocate(self, size_bytes: int) -> int | None:
        """The offset of a free range, with a record that may be taken for it; or neither."""
        while self._resting and not (self._vacant and self._space.has_room(size_bytes)):
            self._end_oldest_rest()
        return self._space.allocate(size_bytes) if self._vacant else None

    def take(self) -> int:
        """The record for what was allocated."""
        return self._vacant.pop()

    def add(self, slot: int) -> None:
        """A record without a range is vacant."""
        self._slots[slot]["state"] = SlotState.UNUSED
        self._vacant.append(slot)

    def rest(self, slot: int) -> None:
        """A slot is freed, with its range."""
        record = self._slots[slot]
        record["generation"] = self.next_generation()
        record["state"] = SlotState.QUARANTINED
        self._resting.append((self._clock.monotonic_s() + QUARANTINE_S, slot))

    def tick(self) -> None:
        """Let rested slots be used again."""
        now_s = self._clock.monotonic_s()
        while self._resting and self._resting[0][0] <= now_s:
            self._end_oldest_rest()

    def _end_oldest_rest(self) -> None:
        _, slot = self._resting.popleft()
        record = self._slots[slot]
        self._space.free(int(record["offset"]), int(record["size_bytes"]))
        self.add(slot)
