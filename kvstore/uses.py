"""Uses: which cells of an arena were read, and in which order, as their readers note.

    a reader's process, or the one that sends        the node
    word of the slot := number of the read,    ───>  taken as a put or an Acquire begins, which may
    then a flag := 1                                 evict, and with every tick: read by read

A word for each slot, in a file of its own beside the table, which readers only read. So a read that
asks nobody counts as a use all the same, and costs no call. Reads are numbered by a counter, which
the file begins with. A note that is lost, or that comes late and meets the slot's next cell, or two
reads that get the same number, cost a little order in eviction and nothing else.

Does not cover: what follows from a use (``kvstore.node``).
"""

from pathlib import Path
from typing import Self

import numpy as np

from kvstore.fs import FileSystem, Mapped
from kvstore.table import Slots

USES_FILE = "uses"
_WORD = np.dtype("<u4")


class Uses:
    """The mapped file of a node. Anybody may ``begin`` and ``note``, the node takes."""

    def __init__(self, mapped: Mapped) -> None:
        words = mapped.view(_WORD)
        self._counter, self._is_any, self._noted = words[:1], words[1:2], words[2:]

    @classmethod
    def create(cls, fs: FileSystem, folder: Path, slots: int) -> Self:
        """Make an empty file. A former one stays, unlinked, for whoever has it mapped."""
        path, size_bytes = folder / USES_FILE, _WORD.itemsize * (2 + slots)
        fs.remove(path)
        fs.create(path, size_bytes)
        fs.allocate(path, 0, size_bytes)
        return cls.map(fs, folder)

    @classmethod
    def map(cls, fs: FileSystem, folder: Path) -> Self:
        """Map the file that a node has made; raises ``OSError`` if there is none."""
        return cls(fs.map(folder / USES_FILE, writable=True))

    @property
    def nbytes(self) -> int:
        """Memory for bookkeeping."""
        return self._noted.nbytes

    def begin(self) -> int:
        """The number of a read, larger than those of all before it."""
        self._counter += np.uint32(1)
        return int(self._counter[0]) or self.begin()

    def note(self, slots: Slots, read: int) -> None:
        """What is in these slots is read by that one."""
        self._noted[slots] = read
        self._is_any[0] = 1

    def take(self) -> list[Slots]:
        """The slots that were noted since the last call, whatever is in them by now, by reads."""
        if not self._is_any[0]:
            return []
        self._is_any[0] = 0  # first: what is noted from here on is not lost
        slots = np.flatnonzero(self._noted).astype(np.uint32)
        reads = self._noted[slots]
        self._noted[slots] = 0
        order = np.argsort(reads, kind="stable")
        cuts = np.flatnonzero(np.diff(reads[order])) + 1
        return np.split(slots[order], cuts) if len(slots) else []
