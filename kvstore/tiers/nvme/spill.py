"""What goes into the NVMe tier and what comes out: offers, refusals, results.

Does not cover: how either comes about (``tier``).
"""

from dataclasses import dataclass
from enum import Enum, auto

import numpy as np

from kvstore.tiers.nvme.record import RECORD


@dataclass(frozen=True, slots=True)
class Spill:
    """A cell in the arena that is to be stored. Whoever offers it keeps it there, pinned, until
    its ticket is done.

    ``flags`` belong to the caller: they are kept with the cell and given back.
    """

    key: bytes
    cell: int
    tokens: int
    length: int
    depth: int
    span: int
    header_digest: int
    stamp: int
    ttl_s: int
    expires_ms: int
    arena_offset: int
    flags: int = 0


class Declined(Enum):
    """Why there is no ticket."""

    HELD = auto()
    """It is held already, and was touched."""
    BUSY = auto()
    """It is being written."""
    TOO_LARGE = auto()
    """It is larger than any slot."""
    NO_ROOM = auto()
    """Too many stores wait for room."""
    CLOSED = auto()
    """The tier is not open, or takes no writes for a while because the disk refused one."""
    GONE = auto()
    """The cell is not held any more."""


class Result(Enum):
    """What became of a ticket."""

    STORED = auto()
    """Held, and there after any crash."""
    LOADED = auto()
    """In the arena, header and payload, and verified."""
    DELETED = auto()
    """Nothing on this disk can bring the blocks back."""
    GONE = auto()
    """The cell was deleted meanwhile; what is in the arena must not be used."""
    DAMAGED = auto()
    """The bytes are not the cell's: those on disk (dropped now), or those that were offered."""
    NO_ROOM = auto()
    """Nothing could be evicted for it."""
    FAILED = auto()
    """The disk refused, or its process ended. What it refused to read it still holds."""


@dataclass(frozen=True, slots=True)
class Done:
    """A ticket is done: the arena range that it named is the caller's again."""

    ticket: int
    result: Result


class Phase(Enum):
    """What the tier as a whole is about."""

    OPENING = auto()
    """Everything is a miss."""
    OPEN = auto()
    REFUSED = auto()
    """The files are another's, or of another version: a miss until somebody sees to it."""
    CLOSED = auto()


@dataclass(slots=True)
class NvmeStats:
    """Counters since start, and what is held now."""

    capacity_bytes: int = 0
    held_bytes: int = 0
    """With padding: what the cells take of the capacity."""
    held_cells: int = 0
    stored: int = 0
    stored_bytes: int = 0
    loaded: int = 0
    evicted: int = 0
    expired: int = 0
    deleted: int = 0
    damaged: int = 0
    failed: int = 0
    restarts: int = 0


def packed_record(spill: Spill, offset: int, sequence: int) -> np.void:
    """The record of a cell that is to be written there."""
    record = np.zeros(1, RECORD)
    record["key"] = np.frombuffer(spill.key, "<u8")
    record["offset"] = offset
    record["sequence"] = sequence
    for name in (
        "cell", "tokens", "length", "depth", "span", "header_digest", "stamp", "ttl_s",
        "expires_ms", "flags",
    ):  # fmt: skip
        record[name] = getattr(spill, name)
    packed: np.void = record[0]
    return packed
