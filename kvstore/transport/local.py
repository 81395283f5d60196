"""Cells of a node on this very host, through its mapped arena: no socket, no RPC.

    get   slot ──copy──> leaf, the copy hashed ──> next leaf ... ──> still found in that slot?
    put   leaf ──copy──> slot, the copy hashed ──> next leaf ... ──> header

A copy is hashed while it is in the cache (``kvstore.leaves``). Many cells are prepared at once;
then their leaves are moved some megabytes at a time, and the deadline is asked before each of these
steps. When there is enough to move, threads take turns at them, so that what has come at the
deadline is the front of a prompt.
"""

from collections import deque
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kvstore.block import HEADER_BYTES, FormatFault, Header, header_digest, leaf_seeds
from kvstore.clock import Deadline
from kvstore.fs import FileSystem, Mapped
from kvstore.leaves import Digests, Moving, Parcel, gathering, scattering
from kvstore.table import SlotState
from kvstore.transport.base import (
    CellRead,
    CellWrite,
    ReadOutcome,
    WriteOutcome,
    Written,
    names_of,
)
from kvstore.transport.mapped import MappedNode, write_header
from kvstore.transport.shares import hands, run_shares, runs
from kvstore.transport.verify import header_of

THREADS_MAX = 8
PARALLEL_BYTES = 4 << 20
"""Below this, starting a second thread costs more than it saves."""
STEP_BYTES = 4 << 20
"""Leaves are moved so many bytes at a time: a deadline that passes costs no more than that."""
PREPARED_BYTES = 512 << 20
"""Cells are prepared so many bytes at a time: the first copy need not wait for all of a prompt."""


class LocalTransport:
    """Copies between the mapped arena of a node on this host and an engine's leaves."""

    def __init__(self, node: MappedNode) -> None:
        self._node = node

    @classmethod
    def open(cls, fs: FileSystem, folder: Path) -> "LocalTransport":
        """Map a node's folder; raises ``StateError`` if no node has made one there."""
        node = MappedNode.map(fs, folder)
        node.populate_in_background()
        return cls(node)

    def read(self, cells: Sequence[CellRead], deadline: Deadline) -> list[ReadOutcome]:
        outcomes = [ReadOutcome.FAILED] * len(cells)
        number = self._node.begin_read()
        for part in runs([cell.length for cell in cells], PREPARED_BYTES):
            if not deadline.passed():
                outcomes[part] = self._read(cells[part], deadline, number)
        return outcomes

    def write(self, cells: Sequence[CellWrite], deadline: Deadline) -> list[Written]:
        answers = [Written(WriteOutcome.UNSENT)] * len(cells)
        for part in runs([cell.length for cell in cells], PREPARED_BYTES):
            if not deadline.passed():
                answers[part] = self._write(cells[part], deadline)
        return answers

    def close(self) -> None:
        """Nothing to do: the mapping goes with the last view of it."""

    def _read(
        self, cells: Sequence[CellRead], deadline: Deadline, number: int
    ) -> list[ReadOutcome]:
        outcomes = [ReadOutcome.GONE] * len(cells)
        headers: dict[int, Header] = {}
        parcels = []
        names = names_of(cells)
        found = self._node.find(*names, deadline.clock.wall_ms())
        for index, read in enumerate(cells):
            slot = self._node.found_bytes(found, index, read.length)
            if slot is None:
                continue
            outcomes[index] = ReadOutcome.CORRUPT
            header = header_of(read, slot[:HEADER_BYTES].data, int(found.header_digests[index]))
            if not isinstance(header, FormatFault):
                headers[index] = header
                seeds = leaf_seeds(read.key, read.cell, len(read.leaves))
                parcels.append(Parcel(slot[HEADER_BYTES:], read.leaves, seeds))
        moved = _moved(scattering(parcels), parcels, deadline)
        for (index, header), digests in zip(headers.items(), moved, strict=True):
            if digests is None:
                outcomes[index] = ReadOutcome.FAILED
            elif digests == header.leaf_digests:
                outcomes[index] = ReadOutcome.VERIFIED
        # What was freed meanwhile is gone, whether or not its bytes were still whole.
        again = self._node.find(*names, deadline.clock.wall_ms())
        is_same = again.held & (again.generations == found.generations)
        self._node.note_uses(found, is_same, number)
        for index in np.flatnonzero(~is_same).tolist():
            outcomes[index] = ReadOutcome.GONE
        return outcomes

    def _write(self, cells: Sequence[CellWrite], deadline: Deadline) -> list[Written]:
        answers = [Written(WriteOutcome.GONE)] * len(cells)
        slots: dict[int, Mapped] = {}
        parcels = []
        for index, write in enumerate(cells):
            found = self._node.slot_bytes(
                SlotState.RESERVED, write.slot, write.generation, write.cell, write.offset,
                write.length,
            )  # fmt: skip
            if found is not None:
                slots[index] = found
                leaves = write.leaves
                seeds = leaf_seeds(write.key, write.cell, len(leaves))
                parcels.append(Parcel(found[HEADER_BYTES:], leaves, seeds))
        moved = _moved(gathering(parcels), parcels, deadline)
        for (index, slot), digests in zip(slots.items(), moved, strict=True):
            if digests is None:
                answers[index] = Written(WriteOutcome.UNSENT)
                continue
            packed = cells[index].header(digests).pack()
            write_header(slot, packed)
            answers[index] = Written(WriteOutcome.FILLED, header_digest(packed))
        return answers


def _moved(moving: Moving, parcels: Sequence[Parcel], deadline: Deadline) -> list[Digests | None]:
    """Move leaves until the deadline, in as many threads as pay.

    Gives the digests of every parcel's leaves, ``None`` for one of which not all were moved.
    """
    sizes_bytes = moving.sizes.tolist()
    waiting = deque(runs(sizes_bytes, STEP_BYTES))
    arrived = np.zeros(len(sizes_bytes), np.bool_)

    def take_turns(_share: int) -> None:
        while not deadline.passed():
            try:
                step = waiting.popleft()
            except IndexError:
                return
            moving.move(step)
            arrived[step] = True

    parallel = sum(sizes_bytes) >= PARALLEL_BYTES
    run_shares(min(len(waiting), hands(THREADS_MAX)) if parallel else 1, take_turns, waiting.clear)
    return _by_parcel(parcels, moving.digests, arrived)


def _by_parcel(
    parcels: Sequence[Parcel], digests: npt.NDArray[np.uint64], arrived: npt.NDArray[np.bool_]
) -> list[Digests | None]:
    found, whole = tuple(digests.tolist()), bool(arrived.all())
    cut: list[Digests | None] = []
    start = 0
    for one in parcels:
        stop = start + len(one.leaves)
        cut.append(found[start:stop] if whole or arrived[start:stop].all() else None)
        start = stop
    return cut
