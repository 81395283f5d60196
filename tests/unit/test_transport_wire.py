"""A connection's room: how far ahead of its reader a peer may send."""

import os
import socket
from pathlib import Path

from kvstore.transport.wire import ROOM_BYTES
from tests.unit.transport_world import joined

QUIET_S = 5.0
"""Nothing more goes out when it has not for so long."""
MOST_BYTES = int(Path("/proc/sys/net/ipv4/tcp_rmem").read_text().split()[-1])
"""What this machine's kernel lets wait on any connection."""


def can_send_ahead(sender: socket.socket, size_bytes: int) -> bool:
    """Whether so much goes out while nobody reads."""
    sender.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
    sender.settimeout(QUIET_S)
    try:
        sender.sendall(bytes(size_bytes))
    except TimeoutError:
        return False
    return True


def test_a_peer_may_send_far_ahead_where_room_was_made() -> None:
    with joined() as (sender, wire):
        wire.make_room()
        assert can_send_ahead(sender, min(ROOM_BYTES, MOST_BYTES // 2) // 2)


def test_with_room_a_reader_is_still_woken_by_the_first_byte() -> None:
    with joined() as (_, wire):
        wire.make_room()
        with socket.socket(fileno=os.dup(wire.fileno())) as same:
            assert same.getsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT) == 1
