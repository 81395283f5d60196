"""Copying: cells of a node, as they are, to another node.

    Acquire (lease; from the own disk if need be) ──> out of the mapped arena, leaf by leaf verified
    ──> Reserve, with the newest deletes that the sender knows ──> the transport ──> Commit

The node that has the cells sends them: it has them mapped, knows of its deletes, and decides how
fast it sends. What was deleted at the other node, and the sender has not heard of that, is refused
there (``Refusal.BURIED``); a delete that comes while a cell is on its way dooms its reservation.
Of every leaf the copy made here is hashed, and what arrived there, and the header that
arrives is the one that was read. What is damaged here the node is told, as any reader does.

Does not cover: which cells, to whom (``kvstore.replication``), the process around it
(``kvstore.copier``).
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvstore.access import NodeAccess
from kvstore.block import HEADER_BYTES, FormatFault, Header, parse_header
from kvstore.burials import Ids
from kvstore.calls import (
    DAMAGED_PER_CALL_MAX,
    AcquireReply,
    CellOutcome,
    Damage,
    ReserveRequest,
)
from kvstore.clock import Deadline
from kvstore.key import Keys
from kvstore.leaf_sizes import LeafSizes, Sizes, Unmeasured
from kvstore.leaf_table import Leaves
from kvstore.reading import LEASE_MARGIN_S
from kvstore.table import Cells, KeyTable, SlotState
from kvstore.transport.base import CellWrite, Transport, WriteOutcome, Written
from kvstore.transport.mapped import MappedNode
from kvstore.writing import give_back

Payload = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Source:
    """The node that has the cells, on this host; ``sizes`` learns how long their leaves are."""

    access: NodeAccess
    mapped: MappedNode
    table: KeyTable
    sizes: LeafSizes


@dataclass(frozen=True, slots=True)
class Target:
    """The node that is to have them as well."""

    access: NodeAccess
    transport: Transport


@dataclass(frozen=True, slots=True, eq=False)
class _Cell:
    """A cell that was read and verified: its header, its bytes and leaves, how long it may live."""

    row: int
    header: Header
    payload: Payload
    sizes: Sizes
    header_digest: int
    ttl_s: int

    def leaves(self) -> Leaves:
        return Leaves.packed(self.payload, self.sizes)


def copy(
    keys: Keys, cells: Cells, burials: Ids, source: Source, target: Target, deadline: Deadline,
    operation: int,
) -> int:  # fmt: skip
    """Send cells; how many the other node has now. What it does not take is sent again, or not,
    by whoever asks it next.

    Raises ``UnavailableError`` when one of the two nodes does not answer.
    """
    arrived = 0
    session = source.access.session
    lease_ms = round(1000 * (deadline.remaining_s() + LEASE_MARGIN_S))
    reply = source.access.acquire(session, keys, cells, lease_ms)
    damaged: list[Damage] = []
    try:
        read = _read(source, reply, keys, cells, damaged)
    finally:
        if reply.lease:
            source.access.release(session, reply.lease)
    if damaged:
        source.access.discard(damaged[:DAMAGED_PER_CALL_MAX])
    for ttl_s in sorted({cell.ttl_s for cell in read}):
        alike = [cell for cell in read if cell.ttl_s == ttl_s]
        arrived += _send(alike, burials, target, deadline, operation)
    return arrived


def _read(
    source: Source, reply: AcquireReply, keys: Keys, cells: Cells, damaged: list[Damage]
) -> list[_Cell]:
    """What is leased, and verifies; what does not is added to ``damaged``."""
    found = []
    for row in np.flatnonzero(reply.outcomes == CellOutcome.FOUND).tolist():
        slot, generation = int(reply.slots[row]), int(reply.generations[row])
        leased = source.mapped.slot_bytes(
            SlotState.COMMITTED, slot, generation, int(cells[row]), int(reply.offsets[row]),
            int(reply.lengths[row]),
        )  # fmt: skip
        if leased is None:
            continue
        ttl_s, bytes_here = int(source.table.slots[slot]["ttl_s"]), leased.copy()
        digest = int(reply.header_digests[row])
        header = parse_header(bytes_here[:HEADER_BYTES].data, digest)
        payload = bytes_here[HEADER_BYTES:]
        key, cell = keys[row].tobytes(), int(cells[row])
        if isinstance(header, FormatFault):
            damaged.append(Damage(key, cell, (len(payload),)))
            continue
        sizes = source.sizes.of(header, payload)
        if sizes is Unmeasured.DAMAGED:
            # Whichever lengths the node tries: none are right.
            others = len(header.leaf_digests) - 1
            lengths = (len(payload) - others, *[1] * others)
            damaged.append(Damage(key, cell, lengths))
        elif not isinstance(sizes, Unmeasured):
            found.append(_Cell(row, header, payload, sizes, digest, ttl_s))
    return found


def _send(
    cells: list[_Cell], burials: Ids, target: Target, deadline: Deadline, operation: int
) -> int:
    """Reserve, fill and commit; how many are there then."""
    access = target.access
    session = access.session
    reply = access.reserve(_request(cells, burials, session, operation))
    reserved = np.flatnonzero(reply.outcomes == CellOutcome.RESERVED)
    present = int((reply.outcomes == CellOutcome.PRESENT).sum())
    if not len(reserved):
        return present
    # Unless the transport itself says otherwise, nobody knows whether it has stopped writing.
    written = [Written(WriteOutcome.UNCERTAIN)] * len(reserved)
    try:
        writes = [
            CellWrite(
                cells[row].header.key, cells[row].header.cell, int(reply.slots[row]),
                int(reply.generations[row]), int(reply.offsets[row]), cells[row].header.tokens,
                cells[row].header.depth, cells[row].header.span, cells[row].header.payload_bytes,
                cells[row].leaves(),
            )
            for row in reserved.tolist()
        ]  # fmt: skip
        written = target.transport.write(writes, deadline)
    finally:
        wanted = [cells[row].header_digest for row in reserved.tolist()]
        outcomes = np.array(
            [_as_read(one, digest) for one, digest in zip(written, wanted, strict=True)], np.uint8
        )
        give_back(access, session, reply, reserved, outcomes)
    filled = outcomes == WriteOutcome.FILLED
    rows = reserved[filled]
    if not len(rows):
        return present
    digests = np.array(wanted, np.uint64)[filled]
    codes = access.commit(session, reply.slots[rows], reply.generations[rows], digests)
    return present + int((codes == CellOutcome.STORED).sum())


def _as_read(written: Written, header_digest: int) -> WriteOutcome:
    """A cell that did not arrive as the one that was read is none."""
    is_other = written.outcome is WriteOutcome.FILLED and written.header_digest != header_digest
    return WriteOutcome.CORRUPT if is_other else written.outcome


def _request(cells: list[_Cell], burials: Ids, session: int, operation: int) -> ReserveRequest:
    headers = [cell.header for cell in cells]
    packed = np.frombuffer(b"".join(header.key for header in headers), np.uint8)
    return ReserveRequest(
        session=session,
        operation=operation,
        keys=packed.reshape(len(cells), -1),
        cells=np.array([header.cell for header in headers], np.uint8),
        lengths=np.array([header.payload_bytes for header in headers], np.uint32),
        tokens=np.array([header.tokens for header in headers], np.uint32),
        depths=np.array([header.depth for header in headers], np.uint32),
        spans=np.array([header.span for header in headers], np.uint64),
        ttl_s=cells[0].ttl_s,
        burials=burials[[cell.row for cell in cells]],
    )
