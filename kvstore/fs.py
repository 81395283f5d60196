"""The file-system operations that nodes use, in one place so that tests can make them fail.

Covers: files that are mapped as shared memory, what the machine says of its boot and pages, and
small files that must be there after a power failure. Does not cover: what is in the state folder
(see ``kvstore.state``).
"""

import ctypes
import mmap
import os
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

Mapped = npt.NDArray[np.uint8]
"""A mapped file, uint8 ``[length]``; unmapped when the last view of it is gone."""

FILE_MODE = 0o600
_MADV_POPULATE_WRITE = 23
_MAP_NORESERVE = 0x4000


class FileSystem(Protocol):
    """What the host tier needs from an operating system."""

    page_bytes: int

    def boot_id(self) -> bytes:
        """16 bytes that change when the machine boots."""
        ...

    def entropy(self, size_bytes: int) -> bytes:
        """Random bytes."""
        ...

    def make_folder(self, folder: Path) -> None:
        """Make a folder that only its owner may enter, and its parents."""
        ...

    def size_bytes(self, path: Path) -> int | None:
        """Size of a file, ``None`` if there is none."""
        ...

    def free_bytes(self, folder: Path) -> int:
        """Free space of the file system that ``folder`` is on."""
        ...

    def create(self, path: Path, size_bytes: int) -> None:
        """Make (or empty) a sparse file of ``size_bytes``."""
        ...

    def remove(self, path: Path) -> None:
        """Remove a file if it is there."""
        ...

    def allocate(self, path: Path, start: int, length: int) -> None:
        """Give the range real memory; raises ``OSError`` instead of a later SIGBUS."""
        ...

    def map(self, path: Path, writable: bool) -> Mapped:
        """Map the whole file, shared; forks do not inherit the mapping."""
        ...

    def populate(self, mapped: Mapped, start: int, length: int) -> None:
        """Enter the range into this process's page table, so that no copy pays for faults."""
        ...

    def punch(self, mapped: Mapped, start: int, length: int) -> None:
        """Give the range's memory back; it reads as zeros until somebody writes to it."""
        ...


class DurableFiles(Protocol):
    """Small files. What a call has written is there after a power failure when it returns."""

    def make_folder(self, folder: Path) -> None:
        """Make a folder that only its owner may enter, and its parents."""
        ...

    def names(self, folder: Path) -> list[str]:
        """Of the files in a folder, in order."""
        ...

    def read(self, path: Path) -> bytes | None:
        """A whole file, ``None`` if there is none."""
        ...

    def append(self, path: Path, data: bytes) -> None:
        """Write behind a file's end, made if need be; after ``OSError`` the end may be torn."""
        ...

    def replace(self, path: Path, data: bytes) -> None:
        """Write a file anew; whatever happens, it is the former one or this one, whole."""
        ...

    def remove(self, path: Path) -> None:
        """Remove a file if it is there; a power failure may bring it back."""
        ...


class LinuxFileSystem:
    """The real one."""

    page_bytes = mmap.PAGESIZE

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)

    def boot_id(self) -> bytes:
        text = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return bytes.fromhex(text.replace("-", ""))

    def entropy(self, size_bytes: int) -> bytes:
        return os.urandom(size_bytes)

    def make_folder(self, folder: Path) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def size_bytes(self, path: Path) -> int | None:
        try:
            return path.stat().st_size
        except FileNotFoundError:
            return None

    def free_bytes(self, folder: Path) -> int:
        found = os.statvfs(folder)
        return found.f_bavail * found.f_frsize

    def create(self, path: Path, size_bytes: int) -> None:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, FILE_MODE)
        try:
            os.ftruncate(descriptor, size_bytes)
        finally:
            os.close(descriptor)

    def remove(self, path: Path) -> None:
        path.unlink(missing_ok=True)

    def names(self, folder: Path) -> list[str]:
        return sorted(path.name for path in folder.iterdir() if path.is_file())

    def read(self, path: Path) -> bytes | None:
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return None

    def append(self, path: Path, data: bytes) -> None:
        is_new = not path.exists()
        with open(path, "ab", buffering=0, opener=_private) as stream:
            _write_through(stream.fileno(), data)
        if is_new:
            sync_folder(path.parent)

    def replace(self, path: Path, data: bytes) -> None:
        replace_file(path, data)

    def allocate(self, path: Path, start: int, length: int) -> None:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            os.posix_fallocate(descriptor, start, length)
        finally:
            os.close(descriptor)

    def map(self, path: Path, writable: bool) -> Mapped:
        access = os.O_RDWR if writable else os.O_RDONLY
        descriptor = os.open(path, access | os.O_CLOEXEC)
        try:
            protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
            flags = mmap.MAP_SHARED | _MAP_NORESERVE
            mapping = mmap.mmap(descriptor, 0, flags=flags, prot=protection)
        finally:
            os.close(descriptor)
        # A forked child must not write into slots that its parent reserved.
        mapping.madvise(mmap.MADV_DONTFORK)
        mapping.madvise(mmap.MADV_DONTDUMP)
        return np.frombuffer(mapping, np.uint8)

    def populate(self, mapped: Mapped, start: int, length: int) -> None:
        address = ctypes.c_void_p(mapped.ctypes.data + start)
        # Kernels before 5.14 do not know the advice: then the first copy pays for the faults.
        self._libc.madvise(address, ctypes.c_size_t(length), _MADV_POPULATE_WRITE)

    def punch(self, mapped: Mapped, start: int, length: int) -> None:
        address = ctypes.c_void_p(mapped.ctypes.data + start)
        if self._libc.madvise(address, ctypes.c_size_t(length), mmap.MADV_REMOVE):
            number = ctypes.get_errno()
            raise OSError(number, f"could not give back {length} bytes: {os.strerror(number)}")


def replace_file(path: Path, data: bytes) -> None:
    """Write a file that only its owner reads; any crash leaves the former or this one, whole."""
    fresh = path.with_name(f".{path.name}.new")
    with open(fresh, "wb", buffering=0, opener=_private) as stream:
        _write_through(stream.fileno(), data)
    fresh.rename(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make names durable that were given just now."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _private(path: str, flags: int) -> int:
    """Open as only its owner may."""
    return os.open(path, flags | os.O_CLOEXEC, FILE_MODE)


def _write_through(descriptor: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(descriptor, left) :]
    os.fdatasync(descriptor)


class MemoryFiles:
    """``DurableFiles`` that end with the process, for a node that is to leave nothing behind."""

    def __init__(self) -> None:
        self._files: dict[Path, bytearray] = {}

    def make_folder(self, folder: Path) -> None:
        return

    def names(self, folder: Path) -> list[str]:
        return sorted(path.name for path in self._files if path.parent == folder)

    def read(self, path: Path) -> bytes | None:
        found = self._files.get(path)
        return None if found is None else bytes(found)

    def append(self, path: Path, data: bytes) -> None:
        self._files.setdefault(path, bytearray()).extend(data)

    def replace(self, path: Path, data: bytes) -> None:
        self._files[path] = bytearray(data)

    def remove(self, path: Path) -> None:
        self._files.pop(path, None)
