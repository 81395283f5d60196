"""A node's handle on its disk process (``worker`` is what runs in it).

Does not cover: what is asked of it (``tier``), how it is packed (``requests``).
"""

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvstore import child
from kvstore.tiers.nvme.disk_queue import Answer, Ended, Event
from kvstore.tiers.nvme.requests import (
    ANSWER,
    PREAMBLE,
    OpeningKind,
    Outcome,
    Request,
    opening_bytes,
    unpack_opening,
)

_RECEIVE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class DiskSettings:
    """Which files, of which shape, for which node and arena."""

    folder: Path
    arena_folder: Path
    node_id: str
    extent_bytes: int
    extents: int
    cells_max: int


class DiskProcess:
    """A ``DiskQueue`` whose work is done by a child. It ends with this process, however that
    ends."""

    def __init__(self, settings: DiskSettings) -> None:
        self._settings = settings
        self._process: child.Process | None = None
        self._socket: socket.socket | None = None
        self._received = bytearray()
        self._unsent = bytearray()
        self._is_open = False
        self._refusal = ""
        """Why the disk does not take us, if the child has said so."""

    def start(self) -> None:
        """Start the child; its stderr is this process's."""
        assert self._process is None, "started twice"
        settings = self._settings
        ours, theirs = socket.socketpair()
        with theirs:
            words = [
                "--folder", str(settings.folder), "--arena-folder", str(settings.arena_folder),
                "--node-id", settings.node_id, "--extent-bytes", str(settings.extent_bytes),
                "--extents", str(settings.extents), "--cells-max", str(settings.cells_max),
                "--socket", str(theirs.fileno()),
            ]  # fmt: skip
            self._process = child.start("kvstore.tiers.nvme.worker", words, theirs.fileno())
        ours.setblocking(False)
        self._socket = ours

    @property
    def pid(self) -> int:
        """Its process number."""
        assert self._process is not None, "not started"
        return self._process.pid

    def fileno(self) -> int:
        """Readable when ``poll`` has something to say."""
        assert self._socket is not None, "not started"
        return self._socket.fileno()

    def submit(self, requests: Sequence[Request]) -> None:
        """Send requests; what the socket does not take now goes with the next ``poll``."""
        self._unsent += b"".join(request.pack() for request in requests)
        self._send()

    def poll(self) -> list[Event]:
        """Everything that has arrived; an ``Ended`` is the last."""
        if self._socket is None:
            return []
        self._send()
        hung_up = self._receive()
        events = self._events()
        if hung_up:
            events.append(Ended(self._end()))
        return events

    def stop(self) -> None:
        """Kill it: what was answered is durable."""
        if self._process is not None:
            self._end()

    def _send(self) -> None:
        assert self._socket is not None, "not started"
        try:
            while self._unsent:
                del self._unsent[: self._socket.send(self._unsent)]
        except BlockingIOError:
            pass
        except OSError:
            self._unsent.clear()  # it is gone, which the next receive says

    def _receive(self) -> bool:
        """Take what has arrived; whether that was the last."""
        assert self._socket is not None, "not started"
        try:
            while piece := self._socket.recv(_RECEIVE_BYTES):
                self._received += piece
        except BlockingIOError:
            return False
        except OSError:
            return True
        return True

    def _events(self) -> list[Event]:
        events: list[Event] = []
        if not self._is_open:
            if len(self._received) < PREAMBLE.size:
                return []
            size_bytes = opening_bytes(self._received)
            if len(self._received) < size_bytes:
                return []
            opening = unpack_opening(bytes(self._received[:size_bytes]))
            if opening.kind is OpeningKind.FAILED:
                self._refusal = opening.text
            else:
                events.append(opening)
            del self._received[:size_bytes]
            self._is_open = True
        whole = len(self._received) - len(self._received) % ANSWER.size
        for ticket, outcome in ANSWER.iter_unpack(self._received[:whole]):
            events.append(Answer(ticket, Outcome(outcome)))
        del self._received[:whole]
        return events

    def _end(self) -> str:
        """Reap the child, so that none of its transfers goes on; why it ended."""
        assert self._process is not None, "not started"
        assert self._socket is not None, "not started"
        self._process.kill()
        code = self._process.wait()
        self._socket.close()
        self._process = self._socket = None
        self._is_open = False
        self._received.clear()
        self._unsent.clear()
        refusal, self._refusal = self._refusal, ""
        return refusal or f"the disk process ended with status {code}"
