"""The disk: one file, read and written in whole pages past the page cache.

What the slab needs of an operating system, as one Protocol, so that tests can give it a disk that
loses, tears and refuses. O_DIRECT where the file system takes it; elsewhere buffered, which is
slower and correct, because nothing is promised before ``sync``. Operations may be short, as the
system's are; ``slab`` completes or refuses them.

The file is locked while it is open. A process that was killed lives on in its last transfer, for as
long as a slow disk takes for it: its successor must not read the file, or the catalog beside it,
before that has ended.

Does not cover: what is where in the file (``slab``), the catalog's files (LMDB has its own).
"""

import errno
import fcntl
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from kvstore.fs import FILE_MODE, Mapped
from kvstore.tiers.nvme.record import PAGE_BYTES


class Disk(Protocol):
    """One file. Every operation may raise ``OSError``; reads and writes from several threads."""

    is_direct: bool
    """Whether transfers bypass the page cache."""

    def size_bytes(self) -> int:
        """Length of the file, 0 for a new one."""
        ...

    def allocate(self, size_bytes: int) -> None:
        """Make the file exactly that long, and back it: no later write runs out of space."""
        ...

    def read(self, buffers: Sequence[Mapped], offset: int) -> int:
        """Read into page-aligned buffers, one after the other; how many bytes came."""
        ...

    def write(self, buffers: Sequence[Mapped], offset: int) -> int:
        """Write page-aligned buffers, one after the other; how many bytes went. Not durable."""
        ...

    def sync(self) -> None:
        """Make every write that has returned durable."""
        ...

    def close(self) -> None:
        """Let go of the file."""
        ...


class LinuxDisk:
    """The real one."""

    def __init__(self, descriptor: int, is_direct: bool) -> None:
        self.is_direct = is_direct
        self._descriptor = descriptor

    @classmethod
    def open(cls, path: Path) -> "LinuxDisk":
        """Open or make the file, once whoever has it open is gone.

        Falls back to buffered where O_DIRECT is refused.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        try:
            disk = cls(os.open(path, flags | os.O_DIRECT, FILE_MODE), is_direct=True)
        except OSError as fault:
            if fault.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            disk = cls(os.open(path, flags, FILE_MODE), is_direct=False)
        fcntl.flock(disk._descriptor, fcntl.LOCK_EX)
        return disk

    def size_bytes(self) -> int:
        return os.fstat(self._descriptor).st_size

    def allocate(self, size_bytes: int) -> None:
        if self.size_bytes() > size_bytes:
            os.ftruncate(self._descriptor, size_bytes)
        os.posix_fallocate(self._descriptor, 0, size_bytes)

    def read(self, buffers: Sequence[Mapped], offset: int) -> int:
        return os.preadv(self._descriptor, [buffer.data for buffer in buffers], offset)

    def write(self, buffers: Sequence[Mapped], offset: int) -> int:
        return os.pwritev(self._descriptor, [buffer.data for buffer in buffers], offset)

    def sync(self) -> None:
        os.fdatasync(self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)


def takes_direct(folder: Path) -> bool:
    """Whether files in a folder can be transferred past the page cache; leaves nothing there."""
    try:
        os.close(os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC, FILE_MODE))
    except OSError as fault:
        if fault.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            return False
        raise
    return True


def aligned_bytes(size_bytes: int) -> Mapped:
    """Zeroed memory that O_DIRECT takes, whole pages."""
    return np.frombuffer(mmap.mmap(-1, -(-size_bytes // PAGE_BYTES) * PAGE_BYTES), np.uint8)
