"""Cells of a node on this very host, through its mapped arena: no socket, no RPC.

    get   slot ──copy──> leaf ──hash the leaf──> next leaf ... ──> is the slot still the same?
    put   leaf ──copy──> slot ──hash the slot──> next leaf ... ──> header

A leaf is hashed right behind its copy, while it is in the cache. Cells are shared out among two
threads when there is enough to move and it is hashed in pieces long enough to be hashed outside of
the interpreter lock. With shorter pieces (few tokens per block, many heads) two threads are slower
than one, because they mostly wait for each other.
"""

from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from kvstore.block import (
    HEADER_BYTES,
    FormatFault,
    Header,
    Leaf,
    header_digest,
    leaf_digest,
    leaf_seeds,
    payload_leaves,
)
from kvstore.clock import Deadline
from kvstore.fs import FileSystem, Mapped
from kvstore.table import SlotState
from kvstore.transport.base import (
    CellRead,
    CellWrite,
    ReadOutcome,
    WriteOutcome,
    Written,
    check_leaves,
)
from kvstore.transport.mapped import MappedNode, write_header
from kvstore.transport.shares import run_shares
from kvstore.transport.verify import LeafChecks, header_of

THREADS = 2
PARALLEL_BYTES = 4 << 20
"""Below this, starting a second thread costs more than it saves."""
UNLOCKED_HASH_BYTES = 64 << 10
"""xxhash gives up the interpreter lock for pieces longer than this."""


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
        check_leaves(cells)
        outcomes = [ReadOutcome.FAILED] * len(cells)

        def read_one(index: int) -> None:
            outcomes[index] = self._read(cells[index])

        pieces = [_piece_bytes(leaf) for cell in cells[:1] for leaf in cell.leaves]
        _spread(len(cells), _shared_bytes(cells, pieces), read_one, deadline)
        return outcomes

    def write(self, cells: Sequence[CellWrite], deadline: Deadline) -> list[Written]:
        check_leaves(cells)
        answers = [Written(WriteOutcome.UNSENT)] * len(cells)

        def write_one(index: int) -> None:
            answers[index] = self._write(cells[index])

        # The slot is what is hashed, and there a leaf is in one piece.
        pieces = [leaf.nbytes for cell in cells[:1] for leaf in cell.leaves]
        _spread(len(cells), _shared_bytes(cells, pieces), write_one, deadline)
        return answers

    def close(self) -> None:
        """Nothing to do: the mapping goes with the last view of it."""

    def _read(self, read: CellRead) -> ReadOutcome:
        found = self._node.slot_bytes(
            SlotState.COMMITTED, read.slot, read.generation, read.cell, read.offset, read.length
        )
        if found is None:
            return ReadOutcome.GONE
        good = _deliver(read, found)
        # What was freed meanwhile is gone, whether or not its bytes were still whole.
        if not self._node.is_current(read.slot, read.generation, SlotState.COMMITTED):
            return ReadOutcome.GONE
        return ReadOutcome.VERIFIED if good else ReadOutcome.CORRUPT

    def _write(self, write: CellWrite) -> Written:
        length = write.length
        found = self._node.slot_bytes(
            SlotState.RESERVED, write.slot, write.generation, write.cell, write.offset, length
        )
        if found is None:
            return Written(WriteOutcome.GONE)
        seeds = leaf_seeds(write.key, write.cell, len(write.leaves))
        digests = []
        stored = payload_leaves(found[HEADER_BYTES:], [leaf.shape for leaf in write.leaves])
        for seed, source, target in zip(seeds, write.leaves, stored, strict=True):
            np.copyto(target, source)
            digests.append(leaf_digest(target, seed))
        header = Header(
            write.key, write.cell, write.tokens, length, write.depth, write.span, tuple(digests)
        )
        packed = header.pack()
        write_header(found, packed)
        return Written(WriteOutcome.FILLED, header_digest(packed))


def _deliver(read: CellRead, slot_bytes: Mapped) -> bool:
    """Copy a cell into its leaves; whether what they hold now is the cell."""
    header = header_of(read, slot_bytes[:HEADER_BYTES].data)
    if isinstance(header, FormatFault):
        return False
    checks = LeafChecks(header)
    stored = payload_leaves(slot_bytes[HEADER_BYTES:], [leaf.shape for leaf in read.leaves])
    for source, target in zip(stored, read.leaves, strict=True):
        np.copyto(target, source)
        if not checks.accept(target):
            return False
    return True


def _piece_bytes(leaf: Leaf) -> int:
    """How much of a leaf is hashed at once."""
    return leaf.nbytes if leaf.flags.c_contiguous else leaf.nbytes // len(leaf)


def _shared_bytes(cells: Sequence[CellRead] | Sequence[CellWrite], pieces: Sequence[int]) -> int:
    """How much there is to move that two threads could move side by side.

    ``pieces`` are those of the first cell: the others are like it, but for a tail at the end.
    """
    if min(pieces, default=0) <= UNLOCKED_HASH_BYTES:
        return 0
    return sum(cell.length for cell in cells)


def _spread(count: int, shared_bytes: int, move: Callable[[int], None], deadline: Deadline) -> None:
    """Call ``move`` for every index until the deadline, in as many threads as pay."""
    waiting = deque(range(count))

    def take_turns(_share: int) -> None:
        while not deadline.passed():
            try:
                index = waiting.popleft()
            except IndexError:
                return
            move(index)

    threads = min(count, THREADS) if shared_bytes >= PARALLEL_BYTES else 1
    run_shares(threads, take_turns, waiting.clear)
