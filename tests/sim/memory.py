"""A machine's memory: files that are mapped, in plain arrays, and clocks that nobody agrees on.

Stands in for the file system and the clock of one simulated machine. A file that is removed lives
on in whoever has it mapped, as on Linux. A machine that dies loses all of it.
"""

import errno
import mmap
from pathlib import Path
from random import Random

import numpy as np

from kvstore.fs import Mapped
from tests.sim.scheduler import Scheduler

WALL_START_MS = 1_700_000_000_000


class MemoryFileSystem:
    """Implements ``kvstore.fs.FileSystem``; ``full`` makes it refuse memory."""

    page_bytes = mmap.PAGESIZE

    def __init__(self, random: Random) -> None:
        self.full = False
        self._random = random
        self._boot = random.randbytes(16)
        self._files: dict[Path, Mapped] = {}

    def boot_id(self) -> bytes:
        return self._boot

    def entropy(self, size_bytes: int) -> bytes:
        return self._random.randbytes(size_bytes)

    def make_folder(self, folder: Path) -> None:
        return

    def size_bytes(self, path: Path) -> int | None:
        found = self._files.get(path)
        return None if found is None else len(found)

    def free_bytes(self, folder: Path) -> int:
        return 0 if self.full else 1 << 40

    def create(self, path: Path, size_bytes: int) -> None:
        memory = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_NOHUGEPAGE)  # most of it is never touched
        self._files[path] = np.frombuffer(memory, np.uint8)

    def remove(self, path: Path) -> None:
        self._files.pop(path, None)

    def allocate(self, path: Path, start: int, length: int) -> None:
        if self.full:
            raise OSError(errno.ENOSPC, "no shared memory is left")

    def map(self, path: Path, writable: bool) -> Mapped:
        if path not in self._files:
            raise FileNotFoundError(errno.ENOENT, "no such file", str(path))
        view = self._files[path].view()
        view.flags.writeable = writable
        return view

    def populate(self, mapped: Mapped, start: int, length: int) -> None:
        return

    def punch(self, mapped: Mapped, start: int, length: int) -> None:
        mapped[start : start + length] = 0


class MachineClock:
    """One machine's clocks: started at another time than others, running a little off.

    The wall clock is set by hand now and then: ``wall_offset_ms`` jumps.
    """

    def __init__(self, scheduler: Scheduler, started_s: float, rate: float) -> None:
        self.wall_offset_ms = 0
        self._scheduler = scheduler
        self._started_s = started_s
        self._rate = rate

    def monotonic_s(self) -> float:
        return self._started_s + self._scheduler.now_s * self._rate

    def wall_ms(self) -> int:
        return WALL_START_MS + self.wall_offset_ms + round(self._scheduler.now_s * 1000)
