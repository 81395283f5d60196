"""Reading: from a plan to verified bytes in an engine's rows.

    plan ──> own cells:   local transport, no RPC
         ──> other nodes: transport, no RPC, one node beside the other
             │ what does not come so, takes long, or is on the own disk
             └─> Acquire (lease, from the disk if need be) ──> transport ──> Release
    every cell verified where it was delivered; the prefix ends before the first block that has a
    cell which did not come

A read without a lease may lose a cell that is evicted meanwhile: the digests tell, and the lease
comes then. A read never raises for what a node, disk or network does: it delivers less, and says
why.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, wait
from contextlib import suppress
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from kvstore.access import NodeAccess
from kvstore.calls import (
    DAMAGED_PER_CALL_MAX,
    MAX_CELLS_PER_CALL,
    CellOutcome,
    Damage,
    Outcomes,
)
from kvstore.clock import Deadline
from kvstore.errors import UnavailableError
from kvstore.plan import OWN_NODE, Fetched, Plan
from kvstore.routes import Routes, is_erased
from kvstore.rows import CellRows, KVRows
from kvstore.transport.base import CellRead, ReadOutcome, Transport

LEASE_MARGIN_S = 0.5
UNLEASED_BYTES_MAX = 256 << 20
"""What one node delivers so soon that little is evicted meanwhile. A lease costs a call before the
first byte, which what takes longer does not feel."""

SOURCES = ("local", "remote", "nvme")

Rows = npt.NDArray[np.intp]
"""Of a plan's blocks, or of its cells: which of them."""

Delivered = npt.NDArray[np.uint8]
"""``ReadOutcome`` per (block, cell), uint8 ``[n, cells]``."""


@dataclass(frozen=True, slots=True)
class _Reading:
    """One read. ``delivered`` is filled by several threads, each its own cells."""

    plan: Plan
    whole: Plan
    """``plan`` and the blocks before it, which the reader has itself."""
    cut: CellRows
    routes: Routes
    workers: Executor
    deadline: Deadline
    delivered: Delivered
    loaded: npt.NDArray[np.bool_]
    """Which cells had to be read from a disk first, as ``delivered``."""
    afterwards: "list[_Calls]"
    """What the reader need not wait for, and is not to be disturbed by either."""


def read(
    whole: Plan, rows: KVRows, routes: Routes, workers: Executor, deadline: Deadline, start: int = 0
) -> Fetched:
    """Deliver what ``whole`` promises behind ``start``, or the longest verified part of it."""
    plan = whole.behind(start)
    if not plan.blocks:
        return Fetched(0, MappingProxyType(dict.fromkeys(SOURCES, 0)), start=start)
    tokens = range(plan.start(0), int(plan.stops[-1]))
    cut = CellRows(plan.namespace.grid, plan.cells, rows, tokens)
    delivered = np.full(plan.nodes.shape, ReadOutcome.FAILED, np.uint8)
    loaded = np.zeros(plan.nodes.shape, np.bool_)
    reading = _Reading(plan, whole, cut, routes, workers, deadline, delivered, loaded, [])
    try:
        _deliver(reading)
        return _fetched(reading)
    finally:
        _make(reading.afterwards, workers)


def _deliver(reading: _Reading) -> None:
    """Read what is planned, from all nodes at once."""
    plan, routes = reading.plan, reading.routes
    # Another node, if there is one, from this very thread: it has the interpreter now, and leaves
    # it to the others while that node looks for what it was asked.
    *others, first = np.unique(plan.nodes).tolist()
    futures = [reading.workers.submit(_read_node, reading, node) for node in others]
    try:
        _read_node(reading, first)
    finally:
        wait(futures)  # whatever happens, nobody may write into the rows any more
    for future in futures:
        future.result()
    if is_erased(plan.namespace, routes):  # who delivered it had told that before
        reading.delivered[:] = ReadOutcome.GONE


def _read_node(reading: _Reading, node: int) -> None:
    if node == OWN_NODE:
        _read_own(reading)
    else:
        _read_from(reading, node)


def _read_own(reading: _Reading) -> None:
    routes = reading.routes
    blocks, columns = np.nonzero(reading.plan.nodes == OWN_NODE)
    with routes.guarding(OWN_NODE):
        access, whole = routes.access(OWN_NODE), reading.whole
        damaged = _read_here(reading, routes.transport(OWN_NODE), blocks, columns)
        if damaged:
            reading.afterwards.append(_Calls(lambda: access.discard(damaged)))
        if whole.blocks > reading.plan.blocks:
            # The whole chain was used: a prefix whose first blocks age alone loses them first.
            touch = _Calls(lambda: access.touch(whole.keys, whole.mask))
            reading.afterwards.append(touch)


def _read_from(reading: _Reading, node: int) -> None:
    """Read everything that the plan wants of one other node."""
    plan, routes, delivered = reading.plan, reading.routes, reading.delivered
    blocks, columns = np.nonzero(plan.nodes == node)
    with routes.guarding(node):
        access, transport = routes.access(node), routes.transport(node)
        left = np.ones(len(blocks), np.bool_)
        if _needs_no_lease(reading, node, blocks):
            _read_here(reading, transport, blocks, columns)
            left = np.isin(delivered[blocks, columns], (ReadOutcome.GONE, ReadOutcome.CORRUPT))
        _read_in_parts(reading, node, access, transport, blocks[left], columns[left])
        if (delivered[blocks, columns] == ReadOutcome.FAILED).all():
            raise UnavailableError(f"node {node} delivered nothing in time")


def _read_in_parts(
    reading: _Reading,
    node: int,
    access: NodeAccess,
    transport: Transport,
    blocks: Rows,
    columns: Rows,
) -> None:
    """Read (block, column) pairs of one node, a lease for each call's worth.

    A node leases no more than part of its arena at a time: for the rest it is asked again, as long
    as each time brings something.
    """
    plan = reading.plan
    is_alone = bool(np.isin(plan.nodes, (node, OWN_NODE)).all())
    waiting = np.arange(len(blocks))
    while len(waiting) and not reading.deadline.passed():
        part, waiting = waiting[:MAX_CELLS_PER_CALL], waiting[MAX_CELLS_PER_CALL:]
        rows, asked = blocks[part], columns[part]
        is_last = is_alone and not len(waiting)
        outcomes = _read_leased(reading, access, transport, rows, asked, is_last)
        missing = outcomes == CellOutcome.MISS
        if missing.any():
            cells = _cell_numbers(plan)[asked[missing]]
            keys, spans = plan.keys[rows[missing]], plan.spans[rows[missing]]
            reading.routes.refuted(node, keys, cells, spans)
        if (outcomes == CellOutcome.FOUND).any():
            waiting = np.concatenate([part[outcomes == CellOutcome.REFUSED], waiting])


def _read_leased(
    reading: _Reading,
    access: NodeAccess,
    transport: Transport,
    blocks: Rows,
    columns: Rows,
    is_last: bool,
) -> Outcomes:
    """Read these (block, column) pairs under one lease; answers what the node said to each.

    With the last of them the whole read is over: the lease is no shorter for being ended then.
    """
    plan, delivered = reading.plan, reading.delivered
    # The lease must outlive every read that we still believe in: the reader's clock starts first.
    lease_ms = round((reading.deadline.remaining_s() + LEASE_MARGIN_S) * 1000)
    session = access.session
    reply = access.acquire(session, plan.keys[blocks], _cell_numbers(plan)[columns], lease_ms)
    found = np.flatnonzero(reply.outcomes == CellOutcome.FOUND)
    refused = reply.outcomes == CellOutcome.REFUSED
    delivered[blocks, columns] = np.where(refused, ReadOutcome.REFUSED, ReadOutcome.GONE)
    reading.loaded[blocks, columns] = reply.loaded
    damaged: list[Damage] = []
    try:
        damaged = _read_here(reading, transport, blocks[found], columns[found])
    finally:
        if reply.lease:
            # In this order: the node drops nothing that is under a lease.
            end = _Calls(
                lambda: access.release(session, reply.lease),
                lambda: access.discard(damaged) if damaged else 0,
            )
            if refused.any():
                end()  # what was refused waits for the room
            elif is_last:
                reading.afterwards.append(end)
            else:
                _make([end], reading.workers)
    return reply.outcomes


def _read_here(
    reading: _Reading, transport: Transport, blocks: Rows, columns: Rows
) -> list[Damage]:
    """Read these (block, column) pairs as they are in a node's arena now.

    Answers what to tell the node that did not verify: it looks for itself, and drops what is
    damaged.
    """
    reads = _cell_reads(reading, blocks, columns)
    outcomes = transport.read(reads, reading.deadline)
    reading.delivered[blocks, columns] = outcomes
    damaged = [
        Damage(read.key, read.cell, tuple(read.leaves.sizes.tolist()))
        for read, outcome in zip(reads, outcomes, strict=True)
        if outcome is ReadOutcome.CORRUPT
    ]
    return damaged[:DAMAGED_PER_CALL_MAX]


def _needs_no_lease(reading: _Reading, node: int, blocks: Rows) -> bool:
    """Whether to try it without. What the own arena did not show can only be on the own disk."""
    grid = reading.plan.namespace.grid
    largest_bytes = max(
        grid.cell_bytes(cell.index, grid.block_tokens) for cell in reading.plan.cells
    )
    is_little = len(blocks) * largest_bytes <= UNLEASED_BYTES_MAX
    return is_little and not reading.routes.is_own(node)


class _Calls:
    """Calls whose loss costs little, one after the other."""

    def __init__(self, *calls: Callable[[], object]) -> None:
        self._calls = calls

    def __call__(self) -> None:
        for call in self._calls:
            with suppress(UnavailableError):
                call()


def _make(several: Sequence[_Calls], workers: Executor) -> None:
    """Make calls in the background."""
    with suppress(RuntimeError):  # the client is closing: what hangs on its session ends with it
        for calls in several:
            workers.submit(calls)


def _cell_numbers(plan: Plan) -> npt.NDArray[np.uint8]:
    return np.array([cell.index for cell in plan.cells], np.uint8)


def _cell_reads(reading: _Reading, blocks: Rows, columns: Rows) -> list[CellRead]:
    """What to read of these (block, column) pairs."""
    plan, reads = reading.plan, []
    cells, stops, grid = plan.cells, plan.stops.tolist(), plan.namespace.grid
    for block, column in zip(blocks.tolist(), columns.tolist(), strict=True):
        key, cell, start = plan.keys[block].tobytes(), cells[column], plan.start(block)
        leaves = reading.cut.leaves(cell, start, stops[block])
        length = grid.cell_bytes(cell.index, stops[block] - start)
        reads.append(CellRead(key, cell.index, length, leaves))
    return reads


def _fetched(reading: _Reading) -> Fetched:
    plan, delivered = reading.plan, reading.delivered
    good = (delivered == ReadOutcome.VERIFIED).all(axis=1)
    blocks = len(good) if bool(good.all()) else int(good.argmin())
    start = plan.start(0)
    stop = min(int(plan.stops[blocks - 1]), plan.tokens) if blocks else start
    starts = start + np.arange(blocks) * plan.namespace.grid.block_tokens
    sizes = np.minimum(plan.stops[:blocks], stop) - starts
    own = [node for node in np.unique(plan.nodes).tolist() if reading.routes.is_own(node)]
    from_disk = reading.loaded[:blocks].any(axis=1)
    elsewhere = ~np.isin(plan.nodes[:blocks], own).all(axis=1) & ~from_disk
    nvme, remote = int(sizes[from_disk].sum()), int(sizes[elsewhere].sum())
    codes, counts = np.unique(delivered, return_counts=True)
    failures = {
        ReadOutcome(code).name: count
        for code, count in zip(codes.tolist(), counts.tolist(), strict=True)
        if code != ReadOutcome.VERIFIED
    }
    return Fetched(
        tokens=stop - start,
        by_source=MappingProxyType(
            {"local": stop - start - remote - nvme, "remote": remote, "nvme": nvme}
        ),
        failures=MappingProxyType(failures),
        start=start,
    )
