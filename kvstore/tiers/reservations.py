"""Reservations: which cells are being written, in which slots.

A block that is deleted meanwhile *dooms* its reservations: the writer keeps its slot until it says
that it is done, but what it has written is nobody's, and somebody else may write the cell anew.

Does not cover: who writes (``kvstore.sessions``), the slots (``host``).
"""

from collections.abc import Set as AbstractSet

_DOOMED = b""


class Reservations:
    """All unfinished writes of an arena."""

    def __init__(self) -> None:
        self._slots: dict[tuple[bytes, int], int] = {}
        self._cells: dict[int, tuple[bytes, int]] = {}
        """Of each slot; without a key for a block that was deleted."""

    def __contains__(self, cell: tuple[bytes, int]) -> bool:
        return cell in self._slots

    def slots(self) -> list[int]:
        """All slots that somebody may be writing."""
        return list(self._cells)

    def begin(self, key: bytes, cell: int, slot: int) -> None:
        """Somebody writes a cell that nobody else writes."""
        self._slots[key, cell] = slot
        self._cells[slot] = key, cell

    def end(self, slot: int) -> bytes:
        """The writer is done, or given up; the key, empty if the block was deleted."""
        key, cell = self._cells.pop(slot)
        if key:
            del self._slots[key, cell]
        return key

    def doom(self, keys: AbstractSet[bytes]) -> None:
        """Blocks are deleted."""
        for slot, (key, cell) in self._cells.items():
            if key in keys:
                del self._slots[key, cell]
                self._cells[slot] = _DOOMED, cell
