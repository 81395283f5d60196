"""A file system whose N-th operation fails, for sweeps: fail 1, 2, 3, ... until a run completes."""

import errno
from pathlib import Path

from kvstore.fs import FileSystem, Mapped, MemoryFiles


class FaultyFileSystem:
    """Passes everything on to ``real``; operation number ``fail_at`` (from 1) raises instead.

    ``faults`` says how many have failed: 0 after a run says that the sweep is over. With ``sticky``
    every later operation fails as well, as on a file system that has become full.
    """

    def __init__(self, real: FileSystem, fail_at: int = 0, sticky: bool = False) -> None:
        self.page_bytes = real.page_bytes
        self.fail_at = fail_at
        self.sticky = sticky
        self.operations = 0
        self.faults = 0
        self._real = real

    def boot_id(self) -> bytes:
        self._step("boot_id")
        return self._real.boot_id()

    def entropy(self, size_bytes: int) -> bytes:
        self._step("entropy")
        return self._real.entropy(size_bytes)

    def make_folder(self, folder: Path) -> None:
        self._step("make_folder")
        self._real.make_folder(folder)

    def size_bytes(self, path: Path) -> int | None:
        self._step("size_bytes")
        return self._real.size_bytes(path)

    def free_bytes(self, folder: Path) -> int:
        self._step("free_bytes")
        return self._real.free_bytes(folder)

    def create(self, path: Path, size_bytes: int) -> None:
        self._step("create")
        self._real.create(path, size_bytes)

    def remove(self, path: Path) -> None:
        self._step("remove")
        self._real.remove(path)

    def allocate(self, path: Path, start: int, length: int) -> None:
        self._step("allocate")
        self._real.allocate(path, start, length)

    def map(self, path: Path, writable: bool) -> Mapped:
        self._step("map")
        return self._real.map(path, writable)

    def populate(self, mapped: Mapped, start: int, length: int) -> None:
        self._step("populate")
        self._real.populate(mapped, start, length)

    def punch(self, mapped: Mapped, start: int, length: int) -> None:
        self._step("punch")
        self._real.punch(mapped, start, length)

    def _step(self, name: str) -> None:
        self.operations += 1
        beyond = self.operations - self.fail_at
        if self.fail_at and (beyond == 0 or (self.sticky and beyond > 0)):
            self.faults += 1
            raise OSError(errno.ENOSPC, f"made to fail: operation {self.operations}, {name}")


class FaultyFiles(MemoryFiles):
    """Small files in memory of which operation number ``fail_at`` (from 1) fails.

    What it was to write is there in part: appended to its middle, or not at all where it was to
    replace a file.
    """

    def __init__(self, fail_at: int = 0) -> None:
        super().__init__()
        self.fail_at = fail_at
        self.operations = 0
        self.faults = 0

    def names(self, folder: Path) -> list[str]:
        self._step("names")
        return super().names(folder)

    def read(self, path: Path) -> bytes | None:
        self._step("read")
        return super().read(path)

    def append(self, path: Path, data: bytes) -> None:
        try:
            self._step("append")
        except OSError:
            super().append(path, data[: len(data) // 2])
            raise
        super().append(path, data)

    def replace(self, path: Path, data: bytes) -> None:
        self._step("replace")
        super().replace(path, data)

    def remove(self, path: Path) -> None:
        self._step("remove")
        super().remove(path)

    def _step(self, name: str) -> None:
        self.operations += 1
        if self.operations == self.fail_at:
            self.faults += 1
            raise OSError(errno.EIO, f"made to fail: operation {self.operations}, {name}")

    def copy(self) -> "FaultyFiles":
        """The same files, of which none fails."""
        copied = FaultyFiles()
        copied._files = {path: bytearray(data) for path, data in self._files.items()}
        return copied


class UnreadableFiles(FaultyFiles):
    """Small files in memory of which the one that is called ``away`` can't be read."""

    away = ""

    def read(self, path: Path) -> bytes | None:
        if path.name == self.away:
            raise OSError(errno.EIO, "made to fail")
        return super().read(path)
