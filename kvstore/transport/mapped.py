"""A node's folder as its engines and its byte-moving child see it: arena, table and uses, mapped.

Finds cells by their names, and the bytes of a slot for a descriptor that is still good. Does not
cover: copying and verifying (``local``, ``bulk``).
"""

import threading
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from kvstore.arena import Arena
from kvstore.block import HEADER_BYTES
from kvstore.fs import FileSystem, Mapped
from kvstore.key import Keys
from kvstore.table import Cells, Found, KeyTable, SlotState
from kvstore.uses import Uses

POPULATE_BYTES = 64 << 20
"""At a time: the process's other page faults wait for no more than this."""


class MappedNode:
    """The files of a node's folder. The table is only read."""

    def __init__(self, arena: Arena, table: KeyTable, uses: Uses) -> None:
        self._arena = arena
        self._table = table
        self._uses = uses

    @classmethod
    def map(cls, fs: FileSystem, folder: Path) -> Self:
        """Map a folder that its node has made; raises ``StateError`` if there is none."""
        table = KeyTable.map(fs, folder)
        return cls(Arena.map(fs, folder), table, Uses.map(fs, folder))

    def populate(self) -> None:
        """Fault all memory that is in use into this process, so that no transfer pays for it.

        Leaves retired offsets out: touching them would bring their memory back.
        """
        frontier = int(self._table.header["frontier"])
        position = 0
        for hole, stop in [*self._table.retired_ranges(), (frontier, frontier)]:
            for start in range(position, hole, POPULATE_BYTES):
                self._arena.populate(start, min(POPULATE_BYTES, hole - start))
            position = max(position, stop)

    def populate_in_background(self) -> None:
        """``populate``, without keeping anybody waiting."""
        threading.Thread(target=self.populate, name="samovar-populate", daemon=True).start()

    def find(self, keys: Keys, cells: Cells, wall_ms: int) -> Found:
        """Descriptors of the cells that are there: whole, visible, not past their expiry."""
        return self._table.find_living(keys, cells, wall_ms)

    def begin_read(self) -> int:
        """The number under which a read notes what it uses."""
        return self._uses.begin()

    def note_uses(self, found: Found, rows: npt.NDArray[np.bool_], read: int) -> None:
        """Those of the cells that were found are being read, or were."""
        self._uses.note(found.slots[rows], read)

    def found_bytes(self, found: Found, row: int, length: int) -> Mapped | None:
        """Header page and payload of a cell that was found; ``None`` if it is not so long.

        What is there by now may be another cell: only the digests tell.
        """
        if not found.held[row] or int(found.lengths[row]) != length:
            return None
        return self._view(int(found.offsets[row]), length)

    def slot_bytes(
        self, state: SlotState, slot: int, generation: int, cell: int, offset: int, length: int
    ) -> Mapped | None:
        """Header page and payload of a slot in ``state``, ``None`` if the descriptor is not good.

        The offset is the descriptor's own and only compared with the record: a record that is
        given to somebody else while we look at it cannot lead a writer astray.
        """
        if not self._table.is_current(slot, generation, state):
            return None
        record = self._table.slots[slot]
        known = (int(record["cell"]), int(record["offset"]), int(record["length"]))
        return self._view(offset, length) if known == (cell, offset, length) else None

    def _view(self, offset: int, length: int) -> Mapped | None:
        size_bytes = HEADER_BYTES + length
        if offset + size_bytes > self._arena.size_bytes:
            return None
        return self._arena.view(offset, size_bytes)


def write_header(slot_bytes: Mapped, packed: bytes) -> None:
    """Put a packed header into a slot's header page."""
    slot_bytes[: len(packed)] = bytearray(packed)
    slot_bytes[len(packed) : HEADER_BYTES] = 0
