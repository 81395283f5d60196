"""Cells of a node on this very host, through its mapped arena: no socket, no RPC.

    get   slot ──copy──> leaf ──hash the leaf──> next leaf ... ──> is the slot still the same?
    put   leaf ──copy──> slot ──hash the slot──> next leaf ... ──> header

A leaf is hashed right behind its copy, while it is in the cache. Cells go in batches: one call of
``kvstore.leaves`` for each, and the deadline is asked before each. When there is enough to move,
threads take batches in turns, so that what has come at the deadline is the front of a prompt.
"""

from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from kvstore.block import HEADER_BYTES, FormatFault, Header, header_digest, leaf_seeds
from kvstore.clock import Deadline
from kvstore.fs import FileSystem, Mapped
from kvstore.leaves import Parcel, gather, scatter
from kvstore.table import SlotState
from kvstore.transport.base import (
    CellRead,
    CellWrite,
    ReadOutcome,
    WriteOutcome,
    Written,
)
from kvstore.transport.mapped import MappedNode, write_header
from kvstore.transport.shares import hands, run_shares, runs
from kvstore.transport.verify import header_of, leaves_for

THREADS_MAX = 8
PARALLEL_BYTES = 4 << 20
"""Below this, starting a second thread costs more than it saves."""
BATCH_BYTES = 4 << 20
"""Cells are moved so many bytes at a time: few hand-overs of the interpreter lock, and a deadline
that passes costs no more than one batch."""


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

        def read_some(part: slice) -> None:
            outcomes[part] = self._read(cells[part])

        _share([cell.length for cell in cells], read_some, deadline)
        return outcomes

    def write(self, cells: Sequence[CellWrite], deadline: Deadline) -> list[Written]:
        answers = [Written(WriteOutcome.UNSENT)] * len(cells)

        def write_some(part: slice) -> None:
            answers[part] = self._write(cells[part])

        _share([cell.length for cell in cells], write_some, deadline)
        return answers

    def close(self) -> None:
        """Nothing to do: the mapping goes with the last view of it."""

    def _read(self, cells: Sequence[CellRead]) -> list[ReadOutcome]:
        outcomes = [ReadOutcome.GONE] * len(cells)
        headers: dict[int, Header] = {}
        parcels = []
        for index, read in enumerate(cells):
            found = self._node.slot_bytes(
                SlotState.COMMITTED, read.slot, read.generation, read.cell, read.offset, read.length
            )
            if found is None:
                continue
            outcomes[index] = ReadOutcome.CORRUPT
            header = header_of(read, found[:HEADER_BYTES].data)
            if isinstance(header, FormatFault):
                continue
            leaves = leaves_for(read, header)
            if not isinstance(leaves, FormatFault):
                headers[index] = header
                seeds = leaf_seeds(read.key, read.cell, len(leaves))
                parcels.append(Parcel(found[HEADER_BYTES:], leaves, seeds))
        for (index, header), digests in zip(headers.items(), scatter(parcels), strict=True):
            if digests == header.leaf_digests:
                outcomes[index] = ReadOutcome.VERIFIED
        is_sealed = self._node.is_sealed
        for index, read in enumerate(cells):
            # What was freed meanwhile is gone, whether or not its bytes were still whole.
            current = self._node.is_current(read.slot, read.generation, SlotState.COMMITTED)
            if is_sealed or not current:
                outcomes[index] = ReadOutcome.GONE
        return outcomes

    def _write(self, cells: Sequence[CellWrite]) -> list[Written]:
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
        for (index, slot), digests in zip(slots.items(), gather(parcels), strict=True):
            packed = cells[index].header(digests).pack()
            write_header(slot, packed)
            answers[index] = Written(WriteOutcome.FILLED, header_digest(packed))
        return answers


def _share(sizes_bytes: Sequence[int], move: Callable[[slice], None], deadline: Deadline) -> None:
    """Call ``move`` for every batch until the deadline, in as many threads as pay."""
    waiting = deque(runs(sizes_bytes, BATCH_BYTES))

    def take_turns(_share: int) -> None:
        while not deadline.passed():
            try:
                part = waiting.popleft()
            except IndexError:
                return
            move(part)

    parallel = sum(sizes_bytes) >= PARALLEL_BYTES
    threads = min(len(waiting), hands(THREADS_MAX)) if parallel else 1
    run_shares(threads, take_turns, waiting.clear)
