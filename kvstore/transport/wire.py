"""A connected socket of the bulk port, with a deadline on everything it does.

The socket stays in blocking mode and the deadline is given to the kernel: ``MSG_WAITALL`` then
fills what it is given in one call, outside of the interpreter lock, where Python's own timeouts
would poll around every fragment. All operations raise ``OSError`` (``TimeoutError`` past the
deadline); afterwards the connection is only good for closing. Leaves are received and hashed by
``kvstore.leaves``, which answers with the fault.
"""

import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from kvstore.block import Leaf, Seeds
from kvstore.clock import Deadline
from kvstore.leaf_table import Leaves
from kvstore.leaves import Arrived, receive

CONNECT_S = 0.25
"""A machine that is gone refuses nothing: a read must not wait for it until its own deadline."""
SEND_BUFFER_BYTES = 1 << 19
"""Between two hosts, what may be under way; on one host it should still be in a cache."""
ROOM_BYTES = 16 << 20
"""What may wait in the kernel until it is received; on systems with smaller limits, half of what
``net.ipv4.tcp_rmem`` allows."""
HOT_BYTES = 1 << 19
"""What is hashed at a time and sent then: enough for one system call to be worth its price, and
still in the cache."""
_REARM_S = 0.05
"""How stale the kernel's timeout may be, and thus how late an operation may end."""
_SEGMENTS_MAX = 1024
_TIMEVAL = struct.Struct("@ll")
_KEEPALIVE = (
    (socket.TCP_KEEPIDLE, 20),
    (socket.TCP_KEEPINTVL, 5),
    (socket.TCP_KEEPCNT, 3),
)


class Wire:
    """One connection. Used by one thread at a time; ``shut`` may be called by any."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._deadline: Deadline | None = None
        self._armed_s = 0.0
        self._has_room = False
        connected.settimeout(None)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        # A peer that vanished without a word must not hold its connection forever.
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE:
            connected.setsockopt(socket.IPPROTO_TCP, name, value)

    @classmethod
    def connect(cls, host: str, port: int, deadline: Deadline) -> "Wire":
        """Open a connection."""
        remaining_s = deadline.remaining_s()
        if remaining_s <= 0:
            raise TimeoutError("no time to connect")
        wire = cls(socket.create_connection((host, port), min(remaining_s, CONNECT_S)))
        wire.until(deadline)
        return wire

    def until(self, deadline: Deadline) -> None:
        """Let everything from now on end at ``deadline``."""
        self._deadline = deadline
        self._armed_s = float("-inf")

    def make_room(self) -> None:
        """Let the peer send far ahead of what is received; to be called before it is asked to.

        By itself the kernel makes room as it sees that much is received, and may be content with
        little: then either side waits for the other, over and over.
        """
        if self._has_room:
            return
        self._has_room = True
        # A set size would be kept to, and seldom may be as large. Who wants to be woken late is
        # given room for as much, and keeps that.
        with suppress(OSError):
            for wake_bytes in (ROOM_BYTES, 1):
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, wake_bytes)

    def send(self, *parts: bytes | memoryview) -> None:
        """Send all of ``parts``, each of them bytes, in order."""
        waiting: Sequence[memoryview] = [memoryview(part) for part in parts]
        while waiting:
            self._arm()
            with _no_more_time():
                sent = self._socket.sendmsg(waiting[:_SEGMENTS_MAX])
            waiting = _after(waiting, sent)

    def receive(self, size_bytes: int) -> bytes:
        """Exactly ``size_bytes``."""
        received = bytearray(size_bytes)
        if size_bytes:  # asking for nothing would wait for something
            self._fill([memoryview(received)])
        return bytes(received)

    def send_leaves(self, leaves: Sequence[Leaf]) -> None:
        """Send leaves one after the other, head by head."""
        self.send(*(segment for leaf in leaves for segment in _segments(leaf)))

    def receive_leaves(self, leaves: Leaves, seeds: Seeds) -> Arrived:
        """Fill leaves one after the other, and hash what comes."""
        return receive(self, leaves, seeds)

    def receive_into(self, leaf: Leaf) -> None:
        """Fill a leaf."""
        self._fill(_segments(leaf))

    def fileno(self) -> int:
        """The socket's descriptor."""
        return self._socket.fileno()

    def remaining_s(self) -> float:
        """Seconds until the deadline, never negative."""
        assert self._deadline is not None, "no deadline was set"
        return self._deadline.remaining_s()

    def wait(self) -> bool:
        """Wait without a deadline for something to arrive; ``False``: the peer has closed."""
        self._set_timeouts(0.0)
        self._armed_s = float("-inf")
        return bool(self._socket.recv(1, socket.MSG_PEEK))

    def is_quiet(self) -> bool:
        """Whether the connection is open and nothing has come that nobody asked for."""
        try:
            self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def shut(self) -> None:
        """Make whatever another thread does on this connection end now."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # it has ended already

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def _fill(self, segments: Sequence[memoryview]) -> None:
        while segments:
            self._arm()
            part = segments[:_SEGMENTS_MAX]
            with _no_more_time():
                received = self._socket.recvmsg_into(part, 0, socket.MSG_WAITALL)[0]
            if not received:
                raise ConnectionResetError("the other side closed the connection")
            segments = _after(segments, received)

    def _arm(self) -> None:
        assert self._deadline is not None, "no deadline was set"
        now_s = self._deadline.clock.monotonic_s()
        if now_s - self._armed_s < _REARM_S:
            return
        remaining_s = self._deadline.at_s - now_s
        if remaining_s <= 0:
            raise TimeoutError("the deadline has passed")
        self._set_timeouts(max(remaining_s, 0.001))
        self._armed_s = now_s

    def _set_timeouts(self, seconds: float) -> None:
        whole = int(seconds)
        packed = _TIMEVAL.pack(whole, int((seconds - whole) * 1_000_000))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, packed)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, packed)


@contextmanager
def _no_more_time() -> Iterator[None]:
    """What the kernel says when it has waited long enough, in words."""
    try:
        yield
    except BlockingIOError:
        raise TimeoutError("the deadline has passed") from None


def _segments(leaf: Leaf) -> list[memoryview]:
    """The contiguous pieces of a leaf."""
    if leaf.flags.c_contiguous:
        return [leaf.data]
    return [head.data for head in leaf]


def _after(parts: Sequence[memoryview], moved: int) -> Sequence[memoryview]:
    """What is left of ``parts`` when ``moved`` bytes of them are done."""
    for index, part in enumerate(parts):
        if moved < part.nbytes:
            return [part.cast("B")[moved:], *parts[index + 1 :]]
        moved -= part.nbytes
    return ()
