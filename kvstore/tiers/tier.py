"""What all tiers say: cells that are offered, cells that came and went, why one was refused.

Does not cover: how a tier keeps them (``kvstore.tiers.host``).
"""

from dataclasses import dataclass
from enum import Enum, IntEnum, auto


class Refusal(IntEnum):
    """Why a cell was not stored."""

    NONE = 0
    NO_ROOM = 1
    """Everything that could make room is being read or written."""
    TOO_LARGE = 2
    """The cell is larger than the whole tier."""
    QUOTA = 3
    """The client has too many unfinished reservations."""
    BAD_REQUEST = 4
    """Fields that no cell can have."""
    SESSION = 5
    """The session is unknown: open a new one."""
    SHRUNK = 6
    """Retired offsets leave no stretch of memory as long as the cell, whatever is evicted."""
    BURIED = 7
    """A copy of a block that was deleted since, which the sender has not heard of."""


class Commitment(Enum):
    """What became of a cell that its writer said is complete."""

    STORED = auto()
    DAMAGED = auto()
    """What was written is not the cell that was announced."""
    NO_ROOM = auto()
    """All entries of the key table where it could go are those of cells that are being read."""
    DELETED = auto()
    """Its block was deleted while it was written."""


class Suspicion(Enum):
    """What became of a held cell that somebody found damaged."""

    RIGHT = auto()
    """It is dropped."""
    WRONG = auto()
    """It is whole."""
    OPEN = auto()
    """It is pinned: nobody has looked."""


@dataclass(frozen=True, slots=True)
class NewCell:
    """What a writer says of a cell before it is there."""

    key: bytes
    cell: int
    tokens: int
    length: int
    depth: int
    span: int
    ttl_s: int


@dataclass(frozen=True, slots=True)
class CellChange:
    """A cell came (``added``) or went."""

    key: bytes
    cell: int
    span: int
    added: bool
