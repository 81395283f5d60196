"""A storage node's own folder: whose it is, and how often the node has started.

    lock          locked (flock) by the one process that may use the folder, and says which that is
    incarnation   number of starts so far, decimal
    control_port  of the last start, decimal: clients look for the successor where the node was
    burials, holds/, tenants, company    what the node must not forget (``kvstore.lasting``)

The claim is taken before an arena, a table or a port is opened. The kernel drops it with the
process, so a successor finds the folder free; two cases need a closer look:

  * the former process is still on its way out (unmapping a large arena takes a while): wait;
  * it is dead, but a child that it forked keeps the lock open: the record says that the holder is
    dead (or a zombie), and the successor goes on with a lock file of its own.

Does not cover: what is in the arena (``kvstore.tiers.host``), records of a whole tier.
"""

import fcntl
import os
import threading
from dataclasses import dataclass
from pathlib import Path

from kvstore.clock import Clock, Deadline
from kvstore.cluster_map import INCARNATION_MAX
from kvstore.errors import StateError
from kvstore.fs import FILE_MODE, replace_file
from kvstore.process import start_ticks

LOCK_FILE = "lock"
INCARNATION_FILE = "incarnation"
CONTROL_PORT_FILE = "control_port"
_POLL_S = 0.05
_RECORD_BYTES_MAX = 256


@dataclass(frozen=True, slots=True)
class Holder:
    """A process, told apart from a later one of the same number by its start time.

    ``pid_namespace`` is there because a number from another container says nothing here.
    """

    pid: int
    start_ticks: int
    pid_namespace: str

    @classmethod
    def current(cls) -> "Holder":
        """This process."""
        ticks = start_ticks(os.getpid())
        assert ticks is not None, "/proc does not show this process"
        return cls(os.getpid(), ticks, _pid_namespace())

    @classmethod
    def parse(cls, record: bytes) -> "Holder | None":
        """What a lock file says, ``None`` for anything else than a record."""
        words = record.decode(errors="replace").split()
        if len(words) != 3 or not (words[0].isdigit() and words[1].isdigit()):
            return None
        return cls(int(words[0]), int(words[1]), words[2])

    def record(self) -> bytes:
        """For the lock file."""
        return f"{self.pid} {self.start_ticks} {self.pid_namespace}\n".encode()

    def is_dead(self) -> bool:
        """Whether the process has certainly ended; a zombie has."""
        return self.pid_namespace == _pid_namespace() and start_ticks(self.pid) != self.start_ticks


def holder_of(folder: Path) -> Holder | None:
    """Who has claimed a folder, dead or alive; ``None`` if its lock file does not say."""
    return Holder.parse((folder / LOCK_FILE).read_bytes()[:_RECORD_BYTES_MAX])


class NodeFolder:
    """A claimed folder. Nobody else has it until ``release`` or the end of this process."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock = lock

    @classmethod
    def claim(cls, path: Path, clock: Clock, patience_s: float) -> "NodeFolder":
        """Take the folder, made if need be; waits up to ``patience_s`` for a holder to end.

        Raises ``StateError`` naming the holder when it lives on.
        """
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        deadline = Deadline.after(clock, patience_s)
        pause = threading.Event()
        while True:
            lock = _try_lock(path / LOCK_FILE)
            if lock is not None:
                return cls(path, lock)
            if deadline.passed():
                return cls(path, _take_over(path / LOCK_FILE))
            pause.wait(min(_POLL_S, deadline.remaining_s()))

    def next_incarnation(self) -> int:
        """One more than at the last start, durable before it is used."""
        file = self.path / INCARNATION_FILE
        try:
            text = file.read_text().strip()
        except FileNotFoundError:
            text = "0"
        if not text.isdecimal() or int(text) >= INCARNATION_MAX:
            raise StateError(f"{file} holds no incarnation: remove {self.path} to start afresh")
        incarnation = int(text) + 1
        replace_file(file, f"{incarnation}\n".encode())
        return incarnation

    def former_control_port(self) -> int:
        """The control port of the last start, 0 where there is none to go by."""
        try:
            port = int((self.path / CONTROL_PORT_FILE).read_text())
        except (FileNotFoundError, ValueError):
            return 0
        return port if 0 < port < 1 << 16 else 0

    def keep_control_port(self, port: int) -> None:
        """For the next start."""
        (self.path / CONTROL_PORT_FILE).write_text(f"{port}\n")

    def release(self) -> None:
        """Give the folder up; the incarnation stays."""
        os.close(self._lock)


def _try_lock(path: Path) -> int | None:
    """Lock the file and write our record into it; ``None`` while somebody else has it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, FILE_MODE)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, Holder.current().record(), 0)
    # A successor of a dead holder may have put its own file here meanwhile: then this lock is on
    # a file that nobody looks at any more.
    if not _is_at(descriptor, path):
        os.close(descriptor)
        return None
    return descriptor


def _take_over(path: Path) -> int:
    """Replace the lock file of a holder that is dead; refuse if it may be alive."""
    holder = holder_of(path.parent)
    if holder is None or not holder.is_dead():
        who = "another process" if holder is None else f"process {holder.pid}"
        raise StateError(
            f"{path.parent} is in use by {who}: give this node another folder, or end that process"
        )
    fresh = path.with_name(f"{LOCK_FILE}.{os.getpid()}")
    lock = _try_lock(fresh)
    assert lock is not None, "a file named by our own process number is ours"
    fresh.rename(path)
    return lock


def _is_at(descriptor: int, path: Path) -> bool:
    ours = os.fstat(descriptor)
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    return (ours.st_dev, ours.st_ino) == (there.st_dev, there.st_ino)


def _pid_namespace() -> str:
    return os.readlink("/proc/self/ns/pid")
