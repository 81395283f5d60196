"""The arena: the shared memory that cells live in.

    file "arena", in a tmpfs folder
    0                              capacity            frontier                      size
    |  backed by memory, pre-faulted  |  backed in place   |  sparse: never used so far  |
                                         of what was retired

The file is far larger than the memory it may use, because an offset that a client could write to
is given to somebody else only after that client itself said that it is done. When it never says
so, the offset is *retired*: its memory is given back, and the same amount is backed at fresh
offsets beyond the frontier.

Nodes, their byte-moving children and engines on the same host map the file. A fork inherits no
mapping. Does not cover: who holds which range (``kvstore.ranges``), what is in it
(``kvstore.table``).
"""

from pathlib import Path

from kvstore.errors import ConfigError
from kvstore.fs import FileSystem, Mapped

ARENA_FILE = "arena"
SPARSE_FACTOR = 64
"""How much larger than its capacity the file is: how often its whole memory may be retired."""


class Arena:
    """A mapped arena file. Reads and writes go through views; nothing here is synchronised."""

    def __init__(self, fs: FileSystem, folder: Path, mapped: Mapped) -> None:
        self._fs = fs
        self._path = folder / ARENA_FILE
        self._mapped = mapped

    @classmethod
    def create(cls, fs: FileSystem, folder: Path, capacity_bytes: int) -> "Arena":
        """Make the file, back ``capacity_bytes`` of it with memory and fault them in.

        Raises ``ConfigError`` when the shared memory has less room than that.
        """
        path = folder / ARENA_FILE
        fs.create(path, capacity_bytes * SPARSE_FACTOR)
        try:
            fs.allocate(path, 0, capacity_bytes)
        except OSError as fault:
            fs.remove(path)
            raise ConfigError(
                f"{folder} has no room for an arena of {capacity_bytes} bytes "
                f"({fs.free_bytes(folder)} free): lower arena_bytes or enlarge the shared memory"
            ) from fault
        arena = cls.map(fs, folder)
        fs.populate(arena._mapped, 0, capacity_bytes)
        return arena

    @classmethod
    def map(cls, fs: FileSystem, folder: Path, writable: bool = True) -> "Arena":
        """Map an arena that its node has made."""
        return cls(fs, folder, fs.map(folder / ARENA_FILE, writable))

    @property
    def size_bytes(self) -> int:
        """Length of the file, most of it sparse."""
        return len(self._mapped)

    def view(self, offset: int, length: int) -> Mapped:
        """Bytes ``[offset, offset + length)``, uint8, without copying."""
        assert 0 <= offset <= len(self._mapped) - length, "view outside the arena"
        return self._mapped[offset : offset + length]

    def populate(self, start: int, length: int) -> None:
        """Fault a range into this process's page table ahead of use."""
        self._fs.populate(self._mapped, start, length)

    def back(self, start: int, length: int) -> None:
        """Give fresh offsets memory; raises ``OSError`` when there is none left."""
        self._fs.allocate(self._path, start, length)

    def punch(self, start: int, length: int) -> None:
        """Give a range's memory back."""
        self._fs.punch(self._mapped, start, length)
