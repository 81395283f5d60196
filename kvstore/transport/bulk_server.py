"""Serving one node's cells to clients over sockets (``frame`` has the protocol).

A thread for each connection, straight between the socket and the mapped arena. Knows no authority:
what the node's table shows may be read, and a descriptor to write to is good if the table says so.
The reader verifies what it gets, so a slot that is given to somebody else under a running read
costs that read and nothing more. What a client writes is hashed in the slot and compared with the
digests that the client took of its source.

Does not cover: the process around it (``bulk``).
"""

import hmac
import logging
import os
import socket
import threading
from contextlib import suppress

from kvstore.block import (
    HEADER_BYTES,
    FormatFault,
    Header,
    leaf_seeds,
    packed_bytes_of,
    parse_header,
)
from kvstore.clock import Clock, Deadline
from kvstore.fs import Mapped
from kvstore.leaf_table import Leaves
from kvstore.leaves import Digests
from kvstore.table import SlotState
from kvstore.transport import frame
from kvstore.transport.base import names_of
from kvstore.transport.frame import Asked, BadFrame, Kind, Offered, Status, Verdict
from kvstore.transport.mapped import MappedNode, write_header
from kvstore.transport.wire import Wire

log = logging.getLogger(__name__)

CONNECTIONS_MAX = 512
"""Of all clients together; each keeps up to four."""
READS_MAX = 256
"""Reads that may be under way at a time and still be one use each."""
HANDSHAKE_S = 5.0


class BulkServer:
    """Answers read and write requests for the slots of one node."""

    def __init__(self, node: MappedNode, clock: Clock, token: bytes | None) -> None:
        self._node = node
        self._clock = clock
        self._token = token
        self._seats = threading.Semaphore(CONNECTIONS_MAX)
        self._said_refused = False
        self._numbers: dict[int, int] = {}
        """Of reads, by what their clients call them, the one that was heard of last at the end."""
        self._numbering = threading.Lock()

    def admit(self, connected: socket.socket) -> None:
        """Serve a connection in a thread of its own; one too many is closed at once."""
        if not self._seats.acquire(blocking=False):
            connected.close()
            return
        name = "samovar-bulk-connection"
        threading.Thread(target=self._serve, args=(connected,), name=name, daemon=True).start()

    def _serve(self, connected: socket.socket) -> None:
        try:
            # A peer that leaves or talks nonsense ends its connection and nothing else.
            with connected, suppress(OSError):
                wire = Wire(connected)
                if self._welcome(wire):
                    while wire.wait():
                        self._answer(wire)
        finally:
            self._seats.release()

    def _welcome(self, wire: Wire) -> bool:
        """Exchange greetings; whether the client may stay."""
        wire.until(Deadline.after(self._clock, HANDSHAKE_S))
        challenge = os.urandom(frame.CHALLENGE_BYTES)
        wanted = self._token is not None
        wire.send(frame.GREETING.pack(frame.MAGIC, frame.WIRE_VERSION, wanted, challenge))
        given = wire.receive(frame.PROOF_BYTES)
        good = self._token is None or hmac.compare_digest(
            given, frame.proof(self._token, challenge)
        )
        wire.send(frame.STATUS.pack(Verdict.WELCOME if good else Verdict.REFUSED))
        if not good and not self._said_refused:
            self._said_refused = True
            log.warning("refused a client with a wrong token; further ones are not reported")
        return good

    def _answer(self, wire: Wire) -> None:
        """Serve one request."""
        wire.until(Deadline.after(self._clock, HANDSHAKE_S))
        head = wire.receive(frame.REQUEST.size)
        kind, cells, remaining_s, read = frame.unpack_request(head)
        wire.until(Deadline.after(self._clock, remaining_s))
        if kind is Kind.READ:
            asked = frame.unpack_asked(wire.receive(cells * frame.ASKED.size))
            self._send_cells(wire, asked, self._number_of(read))
        else:
            self._receive_cells(wire, [_receive_offer(wire) for _ in range(cells)])

    def _number_of(self, read: int) -> int:
        """The number of a client's read, of which other connections may have brought requests."""
        with self._numbering:
            number = self._numbers.pop(read, None) or self._node.begin_read()
            self._numbers[read] = number
            if len(self._numbers) > READS_MAX:
                self._numbers.pop(next(iter(self._numbers)))
            return number

    def _send_cells(self, wire: Wire, asked: list[Asked], read: int) -> None:
        answers, payloads = [], []
        found = self._node.find(*names_of(asked), self._clock.wall_ms())
        self._node.note_uses(found, found.held, read)
        for row, one in enumerate(asked):
            slot = self._node.found_bytes(found, row, one.length)
            header_bytes = packed_bytes_of(one.leaves)
            if slot is None:
                answers += [frame.ANSWER.pack(Status.GONE, 0), bytes(header_bytes)]
                continue
            digest = int(found.header_digests[row])
            answers += [frame.ANSWER.pack(Status.GOOD, digest), slot[:header_bytes].tobytes()]
            payloads.append(slot[HEADER_BYTES:].data)
        wire.send(b"".join(answers))
        for payload in payloads:
            wire.send(payload)

    def _receive_cells(self, wire: Wire, offers: list[Offered]) -> None:
        good = [self._reserved(offer) is not None for offer in offers]
        wire.make_room()
        wire.send(b"".join(frame.STATUS.pack(Status.GOOD if g else Status.GONE) for g in good))
        for offer, wanted in zip(offers, good, strict=True):
            if wanted:
                wire.send(frame.STATUS.pack(self._receive_cell(wire, offer)))

    def _receive_cell(self, wire: Wire, offer: Offered) -> Status:
        """Fill a slot from the socket; its header is written only if every leaf arrived whole."""
        slot = self._reserved(offer)
        if slot is None:
            raise BadFrame("the reservation ended while its cell was on the way")
        leaves = Leaves.packed(slot[HEADER_BYTES:], offer.leaf_bytes)
        seeds = leaf_seeds(offer.key, offer.cell, len(leaves))
        arrived = wire.receive_leaves(leaves, seeds)
        if arrived.fault is not None:
            raise arrived.fault
        header_bytes, digest = frame.unpack_headed(wire.receive(frame.HEADED.size))
        packed = wire.receive(header_bytes)
        if not _describes(parse_header(packed, digest), offer, arrived.digests):
            return Status.CORRUPT
        write_header(slot, packed)
        return Status.GOOD

    def _reserved(self, offer: Offered) -> Mapped | None:
        return self._node.slot_bytes(
            SlotState.RESERVED, offer.slot, offer.generation, offer.cell, offer.offset,
            offer.length,
        )  # fmt: skip


def _receive_offer(wire: Wire) -> Offered:
    packed = wire.receive(frame.OFFERED.size)
    sizes = wire.receive(4 * frame.leaves_offered(packed))
    return frame.unpack_offered(packed, sizes)


def _describes(header: Header | FormatFault, offer: Offered, arrived: Digests) -> bool:
    if isinstance(header, FormatFault):
        return False
    said = (header.key, header.cell, header.payload_bytes, header.leaf_digests)
    return said == (offer.key, offer.cell, offer.length, arrived)
