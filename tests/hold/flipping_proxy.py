"""A bulk port with a bad wire before it: one byte from the server arrives changed, once."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tests.unit.transport_world import accepting

PIECE_BYTES = 4096


class FlippingProxy:
    """Hands connections on to a bulk port; flips byte ``at`` of the first reply that is so long."""

    def __init__(self, target: str, at: int) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._at = at
        self.flipped = False

    def admit(self, client: socket.socket) -> None:
        server = socket.create_connection(self._target)
        for source, sink, flip in ((client, server, False), (server, client, True)):
            threading.Thread(target=self._carry, args=(source, sink, flip), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket, flip: bool) -> None:
        """Until either side hangs up; then both have."""
        carried = 0
        try:
            while piece := bytearray(source.recv(PIECE_BYTES)):
                at = self._at - carried
                if flip and not self.flipped and 0 <= at < len(piece):
                    piece[at] ^= 0x10
                    self.flipped = True
                carried += len(piece)
                sink.sendall(piece)
        except OSError:
            pass
        finally:
            for end in (source, sink):
                end.close()


@contextmanager
def flipping(target: str, at: int) -> Iterator[tuple[str, FlippingProxy]]:
    """The address to connect to instead of ``target``."""
    proxy = FlippingProxy(target, at)
    with accepting(proxy.admit) as address:
        yield address, proxy
