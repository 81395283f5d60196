"""Cells of a node on another host, through its bulk port.

    connection 0   cells 0, 2, 4, ...     recv ──> buffer ──hash it──> leaves ──> more ...
    connection 1   cells 1, 3, 5, ...     likewise, in a thread of its own; more on large machines

Bytes go through a small buffer into the engine's leaves. Cells are dealt out in turn, so that
what has come when a deadline passes is the front of the prompt and not two halves of it. A fault
on a connection costs the cells that it had not delivered yet; the next call opens a new one.

Does not cover: the format (``frame``), leases, which node to ask.
"""

import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np

from kvstore.block import (
    FormatFault,
    Header,
    Seeds,
    header_digest,
    leaf_seeds,
    packed_bytes_of,
)
from kvstore.clock import Deadline
from kvstore.errors import UsageError
from kvstore.leaf_table import Leaves
from kvstore.leaves import digests
from kvstore.transport import frame
from kvstore.transport.base import (
    CellRead,
    CellWrite,
    ReadOutcome,
    WriteOutcome,
    Written,
)
from kvstore.transport.frame import BadFrame, Status, Verdict
from kvstore.transport.shares import hands, run_shares, runs
from kvstore.transport.verify import header_of
from kvstore.transport.wire import HOT_BYTES, Wire

log = logging.getLogger(__name__)

CONNECTIONS_MAX = 4
PARALLEL_BYTES = 1 << 20
"""With less for each of them, fewer connections are as fast."""


class TcpTransport:
    """A client of one bulk port, with a few connections that stay open between calls."""

    def __init__(
        self, address: str, token: bytes | None = None, connections: int | None = None
    ) -> None:
        """``connections`` is how many at most; else as many as suit this machine."""
        connections = hands(CONNECTIONS_MAX) if connections is None else connections
        self._peer = _Peer(address, token, connections)
        self._connections = connections

    def read(self, cells: Sequence[CellRead], deadline: Deadline) -> list[ReadOutcome]:
        outcomes = [ReadOutcome.FAILED] * len(cells)
        read = int.from_bytes(os.urandom(4), "little")

        def read_some(wire: Wire, indexes: Sequence[int]) -> None:
            asked = [cells[index] for index in indexes]
            wire.make_room()
            wire.send(frame.pack_read(asked, deadline, read))
            # For the usual answer, while the node looks: everything comes.
            places = _places(asked)
            coming = _receive_headers(wire, cells, indexes, outcomes)
            if 0 < len(coming) < len(asked):
                places = _places([cells[index] for index in coming])
            if coming:
                _receive_payloads(wire, places, cells, coming, outcomes)

        self._deal(len(cells), sum(cell.length for cell in cells), read_some, deadline)
        return outcomes

    def write(self, cells: Sequence[CellWrite], deadline: Deadline) -> list[Written]:
        answers = [Written(WriteOutcome.UNSENT)] * len(cells)

        def write_some(wire: Wire, indexes: Sequence[int]) -> None:
            wire.send(frame.pack_write([cells[index] for index in indexes], deadline))
            _write_cells(wire, cells, indexes, answers)

        self._deal(len(cells), sum(cell.length for cell in cells), write_some, deadline)
        return answers

    def close(self) -> None:
        """Close the connections; a call that is under way closes its own at its end."""
        self._peer.close()

    def _deal(
        self,
        count: int,
        size_bytes: int,
        move: Callable[[Wire, Sequence[int]], None],
        deadline: Deadline,
    ) -> None:
        """Move cells in turn over the connections; what a fault keeps from moving stays as is."""
        worth = max(1, size_bytes // PARALLEL_BYTES)
        shares = min(count, worth, self._connections)
        wires: list[Wire] = []

        def move_share(share: int) -> None:
            indexes = range(share, count, shares)
            try:
                with self._peer.connection(deadline) as wire:
                    wires.append(wire)
                    for start in range(0, len(indexes), frame.CELLS_PER_REQUEST_MAX):
                        move(wire, indexes[start : start + frame.CELLS_PER_REQUEST_MAX])
            except OSError as fault:
                log.debug("%s: %s", self._peer.address, fault)

        def interrupt() -> None:
            for wire in wires:
                wire.shut()

        if shares:
            run_shares(shares, move_share, interrupt)


class _Peer:
    """The open connections to one bulk port that nobody uses at the moment."""

    def __init__(self, address: str, token: bytes | None, idle_max: int) -> None:
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit():
            raise UsageError(f"{address!r} is no address: write it as host:port")
        self.address = address
        self._where = (host.strip("[]"), int(port))
        self._token = token
        self._idle_max = idle_max
        self._idle: list[Wire] = []
        self._lock = threading.Lock()
        self._closed = False
        self._said_refused = False

    @contextmanager
    def connection(self, deadline: Deadline) -> Iterator[Wire]:
        """A connection for one call. Kept for the next one unless the call raises."""
        wire = self._take_idle() or self._open(deadline)
        wire.until(deadline)
        try:
            yield wire
        except BaseException:
            wire.close()
            raise
        self._keep(wire)

    def close(self) -> None:
        """Close what is idle now and whatever comes back."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for wire in idle:
            wire.close()

    def _take_idle(self) -> Wire | None:
        while True:
            with self._lock:
                if not self._idle:
                    return None
                wire = self._idle.pop()
            if wire.is_quiet():
                return wire
            wire.close()  # the peer has ended since

    def _keep(self, wire: Wire) -> None:
        with self._lock:
            if not self._closed and len(self._idle) < self._idle_max:
                self._idle.append(wire)
                return
        wire.close()

    def _open(self, deadline: Deadline) -> Wire:
        wire = Wire.connect(*self._where, deadline)
        try:
            self._introduce(wire)
        except BaseException:
            wire.close()
            raise
        return wire

    def _introduce(self, wire: Wire) -> None:
        greeting = wire.receive(frame.GREETING.size)
        magic, version, _, challenge = frame.GREETING.unpack(greeting)
        if (magic, version) != (frame.MAGIC, frame.WIRE_VERSION):
            raise BadFrame(f"it speaks {magic!r} version {version}")
        wire.send(frame.proof(self._token, challenge) if self._token else bytes(frame.PROOF_BYTES))
        (verdict,) = frame.STATUS.unpack(wire.receive(frame.STATUS.size))
        if verdict == Verdict.WELCOME:
            self._said_refused = False
            return
        if not self._said_refused:
            self._said_refused = True
            log.warning("%s refused our token: nothing is read from there", self.address)
        raise ConnectionRefusedError("wrong token")


def _places(cells: Sequence[CellRead]) -> tuple[Leaves, Seeds]:
    """Where the leaves of all these go, and what their digests are seeded by."""
    seeds = [leaf_seeds(cell.key, cell.cell, len(cell.leaves)) for cell in cells]
    leaves = Leaves.joined([cell.leaves for cell in cells])
    assert leaves.sizes.sum() == sum(cell.length for cell in cells), "they take what is sent"
    return leaves, np.concatenate(seeds)


def _receive_headers(
    wire: Wire, cells: Sequence[CellRead], indexes: Sequence[int], outcomes: list[ReadOutcome]
) -> dict[int, Header | FormatFault]:
    """The headers of the cells whose payloads follow; what is gone is noted."""
    sizes = [frame.ANSWER.size + packed_bytes_of(len(cells[index].leaves)) for index in indexes]
    packed = memoryview(wire.receive(sum(sizes)))
    coming: dict[int, Header | FormatFault] = {}
    for index, size in zip(indexes, sizes, strict=True):
        status, digest = frame.unpack_answer(packed)
        if status is Status.GOOD:
            coming[index] = header_of(cells[index], packed[frame.ANSWER.size : size], digest)
        else:
            outcomes[index] = ReadOutcome.GONE
        packed = packed[size:]
    return coming


def _receive_payloads(
    wire: Wire,
    places: tuple[Leaves, Seeds],
    cells: Sequence[CellRead],
    coming: Mapping[int, Header | FormatFault],
    outcomes: list[ReadOutcome],
) -> None:
    """Receive the leaves of what is coming, and compare them with their headers."""
    arrived = wire.receive_leaves(*places)
    start = 0
    for index, header in coming.items():
        stop = start + len(cells[index].leaves)
        if stop <= len(arrived.digests):
            whole = (
                isinstance(header, Header) and arrived.digests[start:stop] == header.leaf_digests
            )
            outcomes[index] = ReadOutcome.VERIFIED if whole else ReadOutcome.CORRUPT
        start = stop
    if arrived.fault is not None:
        raise arrived.fault


def _write_cells(
    wire: Wire, cells: Sequence[CellWrite], indexes: Sequence[int], answers: list[Written]
) -> None:
    packed = wire.receive(frame.STATUS.size * len(indexes))
    sent: list[tuple[int, int]] = []
    for index, (status,) in zip(indexes, frame.STATUS.iter_unpack(packed), strict=True):
        if status != Status.GOOD:
            answers[index] = Written(WriteOutcome.GONE)
            continue
        answers[index] = Written(WriteOutcome.UNCERTAIN)
        sent.append((index, _send_cell(wire, cells[index])))
    for index, digest in sent:
        if frame.unpack_status(wire.receive(frame.STATUS.size)) is Status.GOOD:
            answers[index] = Written(WriteOutcome.FILLED, digest)
        else:
            answers[index] = Written(WriteOutcome.CORRUPT)


def _send_cell(wire: Wire, write: CellWrite) -> int:
    """Send payload, then header; returns the header's digest."""
    leaves, arrays = write.leaves, list(write.leaves)
    seeds = leaf_seeds(write.key, write.cell, len(leaves))
    found: list[int] = []
    for part in runs(leaves.sizes.tolist(), HOT_BYTES):
        found += digests(leaves[part], seeds[part])
        wire.send_leaves(arrays[part])
    packed = write.header(tuple(found)).pack()
    digest = header_digest(packed)
    wire.send(frame.HEADED.pack(len(packed), digest), packed)
    return digest
