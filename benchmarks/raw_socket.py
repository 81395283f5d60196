"""The limit of ``cross_node_get``: bytes through plain Python sockets, over distinct memory.

    process of its own   memory ──sendall, piece by piece──> connection 0 ──recv_into──> memory
                         one thread per connection      ──> connection 1 ──recv_into──> memory

No keys, no leases, no digests. Pieces and socket buffers are those that were fastest in a trial
of each pattern at the start of the run.
"""

import multiprocessing
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection

import numpy as np
import numpy.typing as npt

from benchmarks.measure import timed
from benchmarks.prefix import random_bytes, zeros
from kvstore.transport.shares import hands
from kvstore.transport.tcp import CONNECTIONS_MAX

CONNECTIONS = hands(CONNECTIONS_MAX)
"""As many as a read gets."""
ORDER = struct.Struct("<QQQ")
START_S = 60.0


@dataclass(frozen=True, slots=True)
class Pattern:
    """One way to do it: bytes per call, and the sockets' buffers (0: the system's)."""

    piece_bytes: int
    buffer_bytes: int

    def __str__(self) -> str:
        buffers = f"{self.buffer_bytes >> 10} KiB" if self.buffer_bytes else "default"
        return f"pieces of {self.piece_bytes >> 10} KiB, {buffers} buffers"


PATTERNS = tuple(
    Pattern(piece, buffers) for piece in (256 << 10, 2 << 20) for buffers in (0, 1 << 20, 4 << 20)
)


class RawLink:
    """Receives ``size_bytes`` per call, in as many threads as there are connections."""

    def __init__(self, port: int, size_bytes: int) -> None:
        self._port = port
        self._target = zeros((size_bytes,))
        self._sockets: list[socket.socket] = []
        self.pattern = PATTERNS[0]

    def use(self, pattern: Pattern) -> None:
        """Connect anew, in this way."""
        self.close()
        self.pattern = pattern
        self._sockets = [self._connect() for _ in range(CONNECTIONS)]

    def __call__(self) -> float:
        return timed(self._receive_all)

    def close(self) -> None:
        """Hang up."""
        for one in self._sockets:
            one.close()

    def _connect(self) -> socket.socket:
        one = socket.socket()
        if self.pattern.buffer_bytes:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self.pattern.buffer_bytes)
        one.connect(("127.0.0.1", self._port))
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        one.sendall(ORDER.pack(self.pattern.buffer_bytes, 0, 0))
        return one

    def _receive_all(self) -> None:
        threads = [
            threading.Thread(target=self._receive, args=(share,)) for share in range(CONNECTIONS)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _receive(self, share: int) -> None:
        start, stop = (len(self._target) * at // CONNECTIONS for at in (share, share + 1))
        piece = self.pattern.piece_bytes
        self._sockets[share].sendall(ORDER.pack(start, stop, piece))
        for at in range(start, stop, piece):
            part = self._target[at : min(at + piece, stop)].data
            got = self._sockets[share].recv_into(part, len(part), socket.MSG_WAITALL)
            if got != len(part):
                raise ConnectionError("the sending process hung up")


@contextmanager
def raw_link(size_bytes: int) -> Iterator[RawLink]:
    """A link to a process that has the bytes, in the pattern that turned out fastest."""
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, size_bytes), daemon=True)
    process.start()
    theirs.close()
    link = None
    try:
        if not pipe.poll(START_S):
            raise ConnectionError("the sending process did not start")
        link = RawLink(pipe.recv(), size_bytes)
        trials = {}
        for pattern in PATTERNS:
            link.use(pattern)
            trials[pattern] = min(link() for _ in range(3))
        link.use(min(trials, key=lambda pattern: trials[pattern]))
        yield link
    finally:
        if link is not None:
            link.close()
        process.terminate()
        process.join()
        pipe.close()


def _serve(pipe: Connection, size_bytes: int) -> None:
    data = random_bytes(size_bytes)
    with socket.create_server(("127.0.0.1", 0)) as server:
        pipe.send(server.getsockname()[1])
        while True:
            connected, _ = server.accept()
            threading.Thread(target=_send, args=(connected, data), daemon=True).start()


def _send(connected: socket.socket, data: npt.NDArray[np.uint8]) -> None:
    """Answer orders "from, to, piece"; the first names the buffers."""
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    buffers, _, _ = ORDER.unpack(connected.recv(ORDER.size, socket.MSG_WAITALL))
    if buffers:
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffers)
    with connected:
        while len(order := connected.recv(ORDER.size, socket.MSG_WAITALL)) == ORDER.size:
            start, stop, piece = ORDER.unpack(order)
            for at in range(start, stop, piece):
                connected.sendall(data[at : min(at + piece, stop)].data)
