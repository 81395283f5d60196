"""Writing: from an engine's rows to cells that everybody can find.

    chain ──> Reserve ──> present: touched, not sent; busy: somebody else is sending it
                     └──> reserved: slot filled in place, digests ──> Commit ──> visible

A put never raises for what a node or network does: every block has an outcome. What was reserved
and could not be written is aborted by this very client, so that its memory is used again.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from kvstore.access import NodeAccess
from kvstore.calls import MAX_CELLS_PER_CALL, CellOutcome, ReserveReply, ReserveRequest
from kvstore.cell import Cell
from kvstore.clock import Deadline
from kvstore.errors import UnavailableError
from kvstore.key import BlockSpan, Chain, Keys
from kvstore.namespace import Namespace
from kvstore.plan import Stored
from kvstore.rows import CellRows, KVRows
from kvstore.tiers.tier import Refusal
from kvstore.transport.base import CellWrite, Transport, WriteOutcome, Written

_WORST_FIRST = (
    CellOutcome.LOST,
    CellOutcome.DAMAGED,
    CellOutcome.REFUSED,
    CellOutcome.BUSY,
    CellOutcome.STORED,
    CellOutcome.PRESENT,
)


@dataclass(frozen=True, slots=True)
class Put:
    """One put: which blocks of a prompt, to which node."""

    namespace: Namespace
    chain: Chain
    mask: int
    start: int
    operation: int
    ttl_s: int | None


@dataclass(slots=True)
class _Batch:
    """Blocks that go into one Reserve, cell by cell: row r is block ``r // len(cells)``."""

    spans: list[BlockSpan]
    keys: Keys
    cells: tuple[Cell, ...]
    outcomes: list[CellOutcome] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)

    def span(self, row: int) -> BlockSpan:
        return self.spans[row // len(self.cells)]

    def cell(self, row: int) -> Cell:
        return self.cells[row % len(self.cells)]

    def key(self, row: int) -> bytes:
        return bytes(self.keys[row // len(self.cells)])

    @property
    def tokens(self) -> range:
        return range(min(s.start for s in self.spans), max(s.stop for s in self.spans))


def write(
    put: Put, rows: KVRows, access: NodeAccess, transport: Transport, deadline: Deadline
) -> list[Stored]:
    """Store the blocks of a put that are not there yet; one answer per call's worth of blocks."""
    answers = []
    if put.start:
        _touch(put, access)
    for batch in _batches(put):
        cut = CellRows(put.namespace.grid, batch.cells, rows, batch.tokens)
        try:
            _write_batch(put, batch, cut, access, transport, deadline)
        except UnavailableError as fault:
            batch.reasons[str(fault)] += 1
        answers.append(_stored(batch))
    return answers


def _touch(put: Put, access: NodeAccess) -> None:
    """Keep the chain together: what is before ``start`` is part of no Reserve, and has their stamp.

    So it does not make way for what is behind it. Whoever has used it has said so.
    """
    with suppress(UnavailableError):  # one that is lost may cost a miss, nothing else
        access.touch(put.chain.keys, put.mask, access.session, put.operation)


def failed(put: Put, reason: str) -> Stored:
    """The answer to a put for which there is no node."""
    blocks = sum(len(batch.spans) for batch in _batches(put))
    return Stored(failed=blocks, reasons=MappingProxyType({reason: blocks}))


def refused(put: Put, reason: str) -> Stored:
    """The answer to a put that no node is to take."""
    blocks = sum(len(batch.spans) for batch in _batches(put))
    return Stored(refused=blocks, reasons=MappingProxyType({reason: blocks}))


def _batches(put: Put) -> Iterator[_Batch]:
    """Full blocks that end behind ``start``, and all tails, as many at a time as a call names."""
    chain = put.chain
    cells = put.namespace.grid.masked(put.mask)
    spans = [chain.block(index) for index in range(put.start // chain.block_tokens, chain.blocks)]
    keys = [chain.keys[span.index] for span in spans]
    # A tail before ``start`` may be missing although the full blocks around it are there.
    spans += [chain.tail(boundary) for boundary in chain.tails]
    keys += [np.frombuffer(key, np.uint8) for key in chain.tails.values()]
    each = max(1, MAX_CELLS_PER_CALL // len(cells))
    for at in range(0, len(spans), each):
        yield _Batch(spans[at : at + each], np.stack(keys[at : at + each]), cells)


def _write_batch(
    put: Put,
    batch: _Batch,
    cut: CellRows,
    access: NodeAccess,
    transport: Transport,
    deadline: Deadline,
) -> None:
    session = access.session
    reply = access.reserve(_request(put, batch, session))
    batch.outcomes = [CellOutcome(code) for code in reply.outcomes.tolist()]
    batch.reasons.update(Refusal(code).name for code in reply.refusals.tolist() if code)
    reserved = np.flatnonzero(reply.outcomes == CellOutcome.RESERVED)
    if not len(reserved):
        return
    written = [Written(WriteOutcome.UNSENT)] * len(reserved)
    try:
        # An engine that shows its rows wrongly says so here, before bytes move.
        writes = [_cell_write(batch, cut, reply, row, put) for row in reserved.tolist()]
        # Unless the transport itself says otherwise, nobody knows whether it has stopped writing.
        written = [Written(WriteOutcome.UNCERTAIN)] * len(reserved)
        written = transport.write(writes, deadline)
    finally:
        outcomes = np.array([one.outcome for one in written], np.uint8)
        give_back(access, session, reply, reserved, outcomes)
    for row, outcome in zip(reserved.tolist(), outcomes.tolist(), strict=True):
        if outcome != WriteOutcome.FILLED:
            batch.outcomes[row] = CellOutcome.LOST
            batch.reasons[WriteOutcome(outcome).name] += 1
    filled = reserved[outcomes == WriteOutcome.FILLED]
    if not len(filled):
        return
    digests = [one.header_digest for one in written if one.outcome is WriteOutcome.FILLED]
    packed = np.array(digests, np.uint64)
    codes = access.commit(session, reply.slots[filled], reply.generations[filled], packed)
    for row, code in zip(filled.tolist(), codes.tolist(), strict=True):
        batch.outcomes[row] = CellOutcome(code)
        if code == CellOutcome.REFUSED:
            batch.reasons[Refusal.NO_ROOM.name] += 1  # the only reason after the cell was written
        elif code != CellOutcome.STORED:
            batch.reasons[CellOutcome(code).name] += 1


def give_back(
    access: NodeAccess,
    session: int,
    reply: ReserveReply,
    reserved: npt.NDArray[np.intp],
    outcomes: npt.NDArray[np.uint8],
) -> None:
    """Abort what was surely not written, retire what may still be: each has its memory back."""
    uncertain = outcomes == WriteOutcome.UNCERTAIN
    unwritten = reserved[~uncertain & (outcomes != WriteOutcome.FILLED)]
    if len(unwritten):
        access.abort(session, reply.slots[unwritten], reply.generations[unwritten])
    if uncertain.any():
        lost = reserved[uncertain]
        access.abandon(session, reply.slots[lost], reply.generations[lost])


def _request(put: Put, batch: _Batch, session: int) -> ReserveRequest:
    grid = put.namespace.grid
    count = len(batch.spans) * len(batch.cells)
    tokens = [batch.span(row).stop - batch.span(row).start for row in range(count)]
    lengths = [grid.cell_bytes(batch.cell(row).index, tokens[row]) for row in range(count)]
    indexes = np.array([span.index for span in batch.spans], np.int64)
    each = len(batch.cells)
    return ReserveRequest(
        session=session,
        operation=put.operation,
        keys=np.repeat(batch.keys, each, axis=0),
        cells=np.tile(np.array([cell.index for cell in batch.cells], np.uint8), len(indexes)),
        lengths=np.array(lengths, np.uint32),
        tokens=np.array(tokens, np.uint32),
        depths=np.repeat(indexes.astype(np.uint32), each),
        spans=np.repeat(put.chain.spans(indexes), each),
        ttl_s=put.ttl_s,
    )


def _cell_write(batch: _Batch, cut: CellRows, reply: ReserveReply, row: int, put: Put) -> CellWrite:
    span, cell = batch.span(row), batch.cell(row)
    return CellWrite(
        key=batch.key(row),
        cell=cell.index,
        slot=int(reply.slots[row]),
        generation=int(reply.generations[row]),
        offset=int(reply.offsets[row]),
        tokens=span.stop - span.start,
        depth=span.index,
        span=put.chain.span(span.index),
        length=put.namespace.grid.cell_bytes(cell.index, span.stop - span.start),
        leaves=cut.leaves(cell, span.start, span.stop),
    )


def _stored(batch: _Batch) -> Stored:
    """A block is as well off as its worst cell; without an answer it failed."""
    each = len(batch.cells)
    tally: Counter[CellOutcome] = Counter()
    for block in range(len(batch.spans)):
        mine = set(batch.outcomes[block * each : (block + 1) * each]) or {CellOutcome.LOST}
        tally[next((bad for bad in _WORST_FIRST if bad in mine), CellOutcome.LOST)] += 1
    return Stored(
        stored=tally[CellOutcome.STORED],
        present=tally[CellOutcome.PRESENT],
        busy=tally[CellOutcome.BUSY],
        refused=tally[CellOutcome.REFUSED],
        failed=tally[CellOutcome.LOST] + tally[CellOutcome.DAMAGED],
        reasons=MappingProxyType(dict(batch.reasons)),
    )
