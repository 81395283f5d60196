"""Extents: which slots of the slab are free, and what size the slots of an extent have.

    extent 0  | slot | slot | slot |     cut into slots of one size while any of them is in use
    extent 1  | s | s | s | s | s | s |
    extent 2  | free: may be cut into slots of any size |

An extent whose last slot is freed is free again, so space moves between sizes by itself as cells
leave; who has to leave for it is not decided here.

Does not cover: what is in the slots (``slab``), eviction (``tier``). Knows numbers, does no I/O.
"""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kvstore.tiers.nvme.identity import Identity


@dataclass(frozen=True, slots=True)
class Place:
    """A slot to write to. ``extent_sequence`` goes into the page of ``extent`` if it is new."""

    offset: int
    extent: int
    extent_sequence: int
    is_new_extent: bool


@dataclass(slots=True)
class _Extent:
    slot_bytes: int = 0
    sequence: int = 0
    used: int = 0
    is_written: bool = False
    """Whether its page is durable."""
    free: dict[int, None] = field(default_factory=dict)
    """Offsets, the one that is handed out next at the end."""


class Extents:
    """The free and the used slots of one slab."""

    def __init__(self, identity: Identity) -> None:
        self._identity = identity
        self._extents = [_Extent() for _ in range(identity.extents)]
        self._free = dict.fromkeys(range(identity.extents - 1, -1, -1))
        self._open: dict[int, dict[int, None]] = {}
        self.used_bytes = 0

    def allocate(self, slot_bytes: int, sequence: int) -> Place | None:
        """A free slot; a free extent is cut for it, under ``sequence``, if there is one.

        ``None`` if no slot of that size is free and no extent is.
        """
        number = next(iter(self._open.get(slot_bytes, ())), None)
        if number is None:
            if not self._free:
                return None
            number, _ = self._free.popitem()
            self._cut(number, slot_bytes, sequence, is_written=False)
        extent = self._extents[number]
        offset, _ = extent.free.popitem()
        extent.used += 1
        if not extent.free:
            del self._open[slot_bytes][number]
        self.used_bytes += slot_bytes
        return Place(offset, number, extent.sequence, not extent.is_written)

    def take_all(
        self, offsets: npt.NDArray[np.uint64], slot_bytes: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.bool_]:
        """Say at start, before anything else, which slots are in use.

        ``False`` for those that can't be: no such slot, taken already, or in an extent that is cut
        into slots of another size.
        """
        taken = self._identity.have_slots(offsets, slot_bytes)
        first = np.zeros(len(offsets), np.bool_)
        first[np.unique(offsets, return_index=True)[1]] = True
        rows = np.flatnonzero(taken & first)
        taken &= first
        numbers = self._identity.extents_of(offsets[rows])
        order = np.argsort(numbers, kind="stable")
        for part in np.split(order, np.flatnonzero(np.diff(numbers[order])) + 1):
            if len(part):
                same = slot_bytes[rows[part]] == slot_bytes[rows[part[0]]]
                taken[rows[part[~same]]] = False
                used = offsets[rows[part[same]]].tolist()
                self._take_extent(int(numbers[part[0]]), int(slot_bytes[rows[part[0]]]), used)
        return taken

    def free(self, offset: int) -> None:
        """Let a slot be handed out again."""
        number = self._identity.extent_of(offset)
        extent = self._extents[number]
        assert extent.used > 0, "freed a slot of an extent that is not in use"
        assert offset not in extent.free, "freed twice"
        extent.free[offset] = None
        extent.used -= 1
        self.used_bytes -= extent.slot_bytes
        if extent.used:
            self._open.setdefault(extent.slot_bytes, {})[number] = None
            return
        self._open.get(extent.slot_bytes, {}).pop(number, None)
        self._extents[number] = _Extent()
        self._free[number] = None

    def written(self, extent: int, sequence: int) -> None:
        """The page of an extent is durable."""
        if self._extents[extent].sequence == sequence:
            self._extents[extent].is_written = True

    def free_slots(self) -> list[int]:
        """Offsets of the free slots in extents that are in use."""
        return [offset for extent in self._extents for offset in extent.free]

    def free_extents(self) -> list[int]:
        """Extents that are cut into nothing."""
        return list(self._free)

    def _take_extent(self, number: int, slot_bytes: int, used: list[int]) -> None:
        """An extent is cut into slots of that size, and some of them are in use."""
        del self._free[number]
        self._cut(number, slot_bytes, 0, is_written=True)
        extent = self._extents[number]
        for offset in used:
            del extent.free[offset]
        extent.used = len(used)
        self.used_bytes += slot_bytes * len(used)
        if not extent.free:
            del self._open[slot_bytes][number]

    def _cut(self, number: int, slot_bytes: int, sequence: int, is_written: bool) -> None:
        free = dict.fromkeys(reversed(self._identity.slots_of(number, slot_bytes)))
        self._extents[number] = _Extent(slot_bytes, sequence, 0, is_written, free)
        self._open.setdefault(slot_bytes, {})[number] = None
