"""Reading: from a plan to verified bytes in an engine's rows.

    plan ──> own cells:   local transport, no RPC
         ──> other nodes: Acquire (lease) ──> transport ──> Release, one node beside the other
         ──> own disk:    the same, and then the local transport
    every cell verified where it was delivered; the prefix ends before the first block that has a
    cell which did not come

A read never raises for what a node, disk or network does: it delivers less, and says why.
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

SOURCES = ("local", "remote", "nvme")

Delivered = npt.NDArray[np.uint8]
"""``ReadOutcome`` per (block, cell), uint8 ``[n, cells]``."""


@dataclass(frozen=True, slots=True)
class _Reading:
    """One read. ``delivered`` is filled by several threads, each its own cells."""

    plan: Plan
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
    reading = _Reading(plan, cut, routes, workers, deadline, delivered, loaded, afterwards=[])
    try:
        _deliver(reading)
        fetched = _fetched(reading)
        if fetched.by_source["local"]:
            # The whole chain: a prefix whose first blocks age alone loses them first.
            touch = _Calls(lambda: routes.access(OWN_NODE).touch(whole.keys, whole.mask))
            reading.afterwards.append(touch)
        return fetched
    finally:
        _make(reading.afterwards, workers)


def _deliver(reading: _Reading) -> None:
    """Read what is planned, from all nodes at once."""
    plan, routes, workers = reading.plan, reading.routes, reading.workers
    nodes = np.unique(plan.nodes).tolist()
    futures = [workers.submit(_read_from, reading, node) for node in nodes if node != OWN_NODE]
    try:
        if OWN_NODE in nodes:
            _read_own(reading)
    finally:
        wait(futures)  # whatever happens, nobody may write into the rows any more
    for future in futures:
        future.result()
    if is_erased(plan.namespace, routes):  # who delivered it had told that before
        reading.delivered[:] = ReadOutcome.GONE


def _read_own(reading: _Reading) -> None:
    plan, routes = reading.plan, reading.routes
    blocks, columns = np.nonzero(plan.nodes == OWN_NODE)
    known = (plan.slots, plan.generations, plan.offsets, plan.lengths, plan.header_digests)
    reads = _cell_reads(reading, blocks, columns, [each[blocks, columns] for each in known])
    with routes.guarding(OWN_NODE):
        outcomes = routes.transport(OWN_NODE).read(reads, reading.deadline)
        reading.delivered[blocks, columns] = outcomes
        damaged = _damaged(reads, outcomes)
        if damaged:
            access = routes.access(OWN_NODE)
            reading.afterwards.append(_Calls(lambda: access.discard(damaged)))


def _read_from(reading: _Reading, node: int) -> None:
    """Read everything that the plan wants of one other node, a lease for each call's worth.

    A node leases no more than part of its arena at a time: for the rest it is asked again, as long
    as each time brings something.
    """
    plan, routes = reading.plan, reading.routes
    blocks, columns = np.nonzero(plan.nodes == node)
    is_alone = bool(np.isin(plan.nodes, (node, OWN_NODE)).all())
    with routes.guarding(node):
        access, transport = routes.access(node), routes.transport(node)
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
                routes.refuted(node, keys, cells, spans)
            if (outcomes == CellOutcome.FOUND).any():
                waiting = np.concatenate([part[outcomes == CellOutcome.REFUSED], waiting])
        if (reading.delivered[blocks, columns] == ReadOutcome.FAILED).all():
            raise UnavailableError(f"node {node} delivered nothing in time")


def _read_leased(
    reading: _Reading,
    access: NodeAccess,
    transport: Transport,
    blocks: npt.NDArray[np.intp],
    columns: npt.NDArray[np.intp],
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
        leased = (
            reply.slots, reply.generations, reply.offsets, reply.lengths, reply.header_digests
        )  # fmt: skip
        descriptors = [each[found] for each in leased]
        reads = _cell_reads(reading, blocks[found], columns[found], descriptors)
        outcomes = transport.read(reads, reading.deadline)
        delivered[blocks[found], columns[found]] = outcomes
        damaged = _damaged(reads, outcomes)
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


def _damaged(reads: Sequence[CellRead], outcomes: Sequence[ReadOutcome]) -> list[Damage]:
    """What to tell a node that did not verify: it looks for itself, and drops what is damaged."""
    damaged = [
        Damage(read.key, read.cell, read.generation, tuple(read.leaves.sizes.tolist()))
        for read, outcome in zip(reads, outcomes, strict=True)
        if outcome is ReadOutcome.CORRUPT
    ]
    return damaged[:DAMAGED_PER_CALL_MAX]


def _cell_numbers(plan: Plan) -> npt.NDArray[np.uint8]:
    return np.array([cell.index for cell in plan.cells], np.uint8)


def _cell_reads(
    reading: _Reading,
    blocks: npt.NDArray[np.intp],
    columns: npt.NDArray[np.intp],
    descriptors: Sequence[npt.NDArray[np.unsignedinteger]],
) -> list[CellRead]:
    """What to read of these (block, column) pairs; ``descriptors`` are in ``CellRead``'s order."""
    plan, reads = reading.plan, []
    cells, stops = plan.cells, plan.stops.tolist()
    fields = [each.tolist() for each in (blocks, columns, *descriptors)]
    for block, column, slot, generation, offset, length, digest in zip(*fields, strict=True):
        key, cell = plan.keys[block].tobytes(), cells[column]
        leaves = reading.cut.leaves(cell, plan.start(block), stops[block])
        reads.append(CellRead(key, cell.index, slot, generation, offset, length, digest, leaves))
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
