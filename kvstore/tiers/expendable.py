"""Expendable: cells of an arena that its node would not lose, because they are on the disk too.

They leave the arena before others, in the order of eviction among themselves. Whoever uses a cell
takes it out of here by that: its order is another one then, and its entry is passed over.

Does not cover: who is on the disk (``write_behind``), the order of all others
(``kvstore.eviction``).
"""

from collections.abc import Iterator
from heapq import heappop, heappush

import numpy as np
import numpy.typing as npt

from kvstore.eviction import orders
from kvstore.table import Slots, SlotState

_SLOT_BITS = 32
_SLOT_MASK = (1 << _SLOT_BITS) - 1
_ENTRY_BYTES = 48
"""Of an entry: a number, and its place."""


class Expendable:
    """Some slots of a table, first victim first."""

    def __init__(self, records: npt.NDArray[np.void]) -> None:
        self.size_bytes = 0
        """What the cells take of the arena; some may have been used since the last ``prune``."""
        self._records = records
        self._heap: list[int] = []
        """Order, then slot."""
        self._order = np.zeros(len(records), np.uint64)
        """With which order a slot is here, 0 if it is not."""
        self._size_bytes = np.zeros(len(records), np.uint32)

    @property
    def nbytes(self) -> int:
        """Memory for bookkeeping."""
        return self._order.nbytes + self._size_bytes.nbytes + _ENTRY_BYTES * len(self._heap)

    def add(self, slots: Slots) -> None:
        """Held cells are on the disk, and next to leave."""
        now = self._orders(slots)
        new = now != self._order[slots]
        for slot, order in zip(slots[new].tolist(), now[new].tolist(), strict=True):
            self._leave(slot)
            self._order[slot] = order
            self._size_bytes[slot] = self._records["size_bytes"][slot]
            self.size_bytes += int(self._size_bytes[slot])
            heappush(self._heap, order << _SLOT_BITS | slot)

    def among(self, slots: Slots) -> npt.NDArray[np.bool_]:
        """Which of the slots are here, and were not used since they came."""
        here: npt.NDArray[np.bool_] = self._order[slots] == self._orders(slots)
        here &= self._records["state"][slots] == SlotState.COMMITTED
        return here

    def prune(self) -> None:
        """Forget those that were used, or have gone, since they came: up to the first victim."""
        while self._heap and not self._is_current(self._heap[0]):
            self._pop()

    def victims(self) -> Iterator[int]:
        """Slots to evict, first victim first. One that is kept is not expendable any more."""
        while self._heap:
            current = self._is_current(self._heap[0])
            slot = self._pop()
            if current:
                yield slot

    def _is_current(self, entry: int) -> bool:
        slot = np.array([entry & _SLOT_MASK], np.uint32)
        return bool(self._order[slot[0]] == entry >> _SLOT_BITS and self.among(slot)[0])

    def _pop(self) -> int:
        entry = heappop(self._heap)
        slot = entry & _SLOT_MASK
        if int(self._order[slot]) == entry >> _SLOT_BITS:
            self._leave(slot)
        return slot

    def _leave(self, slot: int) -> None:
        if self._order[slot]:
            self.size_bytes -= int(self._size_bytes[slot])
            self._order[slot] = 0

    def _orders(self, slots: Slots) -> npt.NDArray[np.uint64]:
        return orders(self._records["stamp"][slots], self._records["depth"][slots])
