"""Departures: who leaves an arena next, and who must not just now.

    first    what is on the disk too and was not used since (``expendable``)
    then     the oldest, of a prompt the tail first (``kvstore.eviction``)
    never    what is pinned

Does not cover: leaving itself (``host``), who gets to the disk (``write_behind``).
"""

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kvstore.eviction import TailFirstLru
from kvstore.table import Slots
from kvstore.tiers.expendable import Expendable


class Below(Protocol):
    """The tier that has what leaves this one."""

    def holds(self, slot: int) -> bool:
        """Whether the cell of a held slot is there too, for good."""
        ...


class Departures(TailFirstLru):
    """The policy of a host tier. All slots that it knows are held."""

    def __init__(self, records: npt.NDArray[np.void]) -> None:
        super().__init__(len(records))
        self.pins = np.zeros(len(records), np.uint32)
        """How many need a cell where it is."""
        self.below: Below | None = None
        """Who has what leaves, if anybody."""
        self._expendable = Expendable(records)

    @property
    def expendable_bytes(self) -> int:
        """How much could leave without being lost."""
        self._expendable.prune()
        return self._expendable.size_bytes

    def expend(self, slots: Slots) -> None:
        """Cells are on the disk too: while nobody uses them, they leave before others do."""
        self._expendable.add(slots)

    def is_below(self, slot: int) -> bool:
        """Whether the cell is on the disk too."""
        return self.below is not None and self.below.holds(slot)

    def unpinned(self, stamp: int) -> Iterator[int]:
        """Slots to evict, first victim first; the caller may touch and remove between two.

        They make room for an operation with this stamp, which loses none of its own: a prompt
        that does not fit would else be eaten from the middle.
        """
        for slot in self._expendable.victims():
            if not self.pins[slot] and self.is_below(slot):
                yield slot
        for slot in self.victims():
            if self.stamp_of(slot) >= stamp:
                return
            if not self.pins[slot]:
                yield slot

    def staying(self, stamp: int) -> Slots:
        """Slots that are not among ``unpinned``."""
        own = self.used_since(stamp)
        own = own[~self._expendable.among(own)]
        return np.union1d(own, np.flatnonzero(self.pins).astype(np.uint32))

    def next_to_leave(self, count: int) -> Slots:
        """Of the ``count`` oldest those that may be written down, of a prompt the head first."""
        slots = self.heads_first(count)
        loose: Slots = slots[(self.pins[slots] == 0) & ~self._expendable.among(slots)]
        return loose

    def metadata_bytes(self) -> int:
        """Memory for bookkeeping."""
        return super().metadata_bytes() + self.pins.nbytes + self._expendable.nbytes
