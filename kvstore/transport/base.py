"""What moves cells between a node's arena and an engine's buffers, whatever lies in between.

    reader                transport                        node's arena
    CellRead   ─────────> finds it in the key table ─────> header | payload
    leaves     <───────── delivered; what is hashed is what is delivered
    VERIFIED / GONE / CORRUPT / FAILED

A *leaf* is one layer of a cell as it lies in the engine's memory: uint8 ``[heads, tokens,
row_bytes]``, perhaps strided between heads, contiguous within one (``kvstore.leaf_table``). A
transport reads from one node, from several threads at a time. It never raises for what a node or a
network does. When a call returns, nothing of it goes on: no byte is written into a leaf any more.

Does not cover: which cells are where, leases, reservations (``kvstore.node``).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

import numpy as np

from kvstore.block import Header
from kvstore.clock import Deadline
from kvstore.key import Keys, as_keys
from kvstore.leaf_table import Leaves
from kvstore.table import Cells


@dataclass(frozen=True, slots=True)
class CellRead:
    """One cell to deliver, and where its leaves go. ``length`` is that of all leaves together.

    It is asked for by its name: a key says what the bytes must be, wherever in the arena they lie.
    """

    key: bytes
    cell: int
    length: int
    leaves: Leaves


class Named(Protocol):
    """What names a cell."""

    @property
    def key(self) -> bytes: ...

    @property
    def cell(self) -> int: ...


def names_of(several: Sequence[Named]) -> tuple[Keys, Cells]:
    """The names of cells as a key table takes them."""
    keys = as_keys(b"".join(one.key for one in several))
    return keys, np.array([one.cell for one in several], np.uint8)


@dataclass(frozen=True, slots=True)
class CellWrite:
    """One cell to put into a reserved slot: what its header says, and where its leaves are.

    ``length`` is that of the payload, all leaves together.
    """

    key: bytes
    cell: int
    slot: int
    generation: int
    offset: int
    tokens: int
    depth: int
    span: int
    length: int
    leaves: Leaves

    def header(self, leaf_digests: tuple[int, ...]) -> Header:
        """What stands before the payload."""
        return Header(
            self.key, self.cell, self.tokens, self.length, self.depth, self.span, leaf_digests
        )


class ReadOutcome(IntEnum):
    """What became of one read. Unless VERIFIED, what is in its leaves is undefined."""

    VERIFIED = 1
    GONE = 2
    """It is not in the arena, or was not any more when it had been copied."""
    CORRUPT = 3
    """The bytes that were delivered are not those of the cell: damaged, or of a slot that was given
    to another meanwhile, where no lease kept it."""
    FAILED = 4
    """The node did not deliver in time."""
    REFUSED = 5
    """The node did not lease it: it knows no such session, or the session has too much already."""


class WriteOutcome(IntEnum):
    """What became of one write."""

    FILLED = 1
    GONE = 2
    """The slot is not reserved for this writer any more. Nothing is written now or later."""
    CORRUPT = 3
    """Other bytes arrived than were sent. Nothing is written any more."""
    UNSENT = 4
    """There was no time or no connection to begin. Nothing is written now or later."""
    UNCERTAIN = 5
    """The connection was lost on the way: bytes may still arrive in the slot. The reservation
    must be abandoned (its memory is retired), never aborted, which would give it to another."""


@dataclass(frozen=True, slots=True)
class Written:
    """Answer to one write; ``header_digest`` is for the commit and means something if FILLED."""

    outcome: WriteOutcome
    header_digest: int = 0


class Transport(Protocol):
    """A way to one node's arena."""

    def read(self, cells: Sequence[CellRead], deadline: Deadline) -> list[ReadOutcome]:
        """Deliver cells into their leaves and verify them there; an outcome for each, in order.

        Blocks until everything is settled, at the latest shortly after the deadline.
        """
        ...

    def write(self, cells: Sequence[CellWrite], deadline: Deadline) -> list[Written]:
        """Fill reserved slots from leaves; an answer for each, in order. Blocks likewise."""
        ...

    def close(self) -> None:
        """Let go of mappings and connections; the transport is of no use afterwards."""
        ...
