"""What is asked of a storage node, and what it answers: packed, one row per cell.

Covers: the values of the calls between a client and a node, whatever carries them. Does not cover:
what a node does about them (``kvstore.node``), their form on the wire (``kvstore.rpc.convert``).
"""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from kvstore.cell import CELLS_MAX
from kvstore.errors import UsageError
from kvstore.key import Keys
from kvstore.table import Cells, Generations, Slots
from kvstore.tiers.nvme.spill import NvmeStats
from kvstore.tiers.stats import HostStats

MAX_CELLS_PER_CALL = 512
DAMAGED_PER_CALL_MAX = 16
"""Each of them is read and hashed on the node's one thread."""
DELETE_KEYS_MAX = 4096
DELETE_ID_MAX = (1 << 63) - 1
HOLD_KEYS_MAX = 8192
HOLD_TTL_MS_MAX = 365 * 24 * 3600 * 1000
HANDLE_BYTES_MAX = 128
REPLICAS_MAX = 2
CARRY_CELLS_MAX = 1024
INSPECT_KEYS_MAX = 256

Outcomes = npt.NDArray[np.uint8]


class CellOutcome(IntEnum):
    """What became of one cell of a call."""

    STORED = 1
    PRESENT = 2
    BUSY = 3
    """Being written by another client."""
    REFUSED = 4
    RESERVED = 5
    LOST = 6
    """The reservation is gone: its session ended, or the node restarted."""
    MISS = 7
    FOUND = 8
    DAMAGED = 9
    """What was written is not the cell that was announced."""


@dataclass(frozen=True, slots=True)
class NodeIdentity:
    """Who a node is, and since which restart."""

    node_id: str
    incarnation: int
    host_id: str
    arena_folder: str


@dataclass(frozen=True, slots=True)
class ReserveRequest:
    """Cells of one prompt that a session wants to write, packed by cell.

    ``operation`` numbers a client's puts: all calls of one put get one LRU stamp. ``depths`` are
    block indexes, ``lengths`` payload bytes, ``ttl_s`` 0 for no expiry, ``None`` for the node's
    own default. ``burials`` goes with copies of what is elsewhere: of each row, the newest delete
    (0: none) that the sender knew of when it had the cell.
    """

    session: int
    operation: int
    keys: Keys
    cells: Cells
    lengths: npt.NDArray[np.uint32]
    tokens: npt.NDArray[np.uint32]
    depths: npt.NDArray[np.uint32]
    spans: npt.NDArray[np.uint64]
    ttl_s: int | None = None
    burials: npt.NDArray[np.uint64] | None = None


@dataclass(frozen=True, slots=True)
class ReserveReply:
    """One row per requested cell; slot columns mean something where the outcome is RESERVED.

    ``refusals`` say why, where it is REFUSED.
    """

    outcomes: Outcomes
    refusals: npt.NDArray[np.uint8]
    slots: Slots
    generations: Generations
    offsets: npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class AcquireReply:
    """Descriptors of what is FOUND, under one lease; ``lease`` 0 if nothing is.

    A cell is REFUSED to a session that is unknown or has too much under lease, and when it did not
    come up from the NVMe tier in time: it may be here. ``loaded`` says which did come up.
    """

    lease: int
    outcomes: Outcomes
    slots: Slots
    generations: Generations
    offsets: npt.NDArray[np.uint64]
    lengths: npt.NDArray[np.uint32]
    header_digests: npt.NDArray[np.uint64]
    loaded: npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Damage:
    """A cell that a reader found damaged: which one, and how long each of its leaves is."""

    key: bytes
    cell: int
    leaf_bytes: tuple[int, ...]


def every_cell(keys: Keys, mask: int) -> tuple[Keys, Cells]:
    """Every key with every cell of ``mask``, key major."""
    if not 0 < mask < 1 << CELLS_MAX:
        raise UsageError(f"mask {mask:#x} must name at least one of {CELLS_MAX} cells, no other")
    wanted = [cell for cell in range(CELLS_MAX) if mask >> cell & 1]
    return np.repeat(keys, len(wanted), axis=0), np.tile(np.array(wanted, np.uint8), len(keys))


@dataclass(frozen=True, slots=True)
class NodeStats:
    """What a node holds and did. ``promised_bytes`` are those that holds keep it from evicting."""

    host: HostStats
    nvme: NvmeStats
    sessions: int
    leases: int
    metadata_bytes: int
    holds: int = 0
    promised_bytes: int = 0
    promisable_bytes: int = 0
    burials: int = 0
    is_sealed: bool = False
    short_holds: int = 0
    """Holds that have fewer copies than were asked for."""
    copied_cells: int = 0
    """Cells of holds that other nodes were sent."""


class HoldOutcome(IntEnum):
    """What became of a promise that was asked for."""

    GRANTED = 1
    OVER_BUDGET = 2
    """Of the tenant, or of the node for all tenants together."""
    NOT_HELD = 3
    """A cell of it is not here, or its tenant was erased since."""
    TOO_MANY = 4
    """Holds, at this node."""
    FAILED = 5
    """It could not be written down, so it would not outlive a restart."""
    RELEASED = 6
    """Said to another node: it was released, or its tenant erased, and is to end there, too."""
    SEALED = 7
    """Said to another node: what is here is not shown yet, ask again."""


@dataclass(frozen=True, slots=True)
class HoldRequest:
    """Blocks that a node is to keep for ``ttl_ms``, all cells of ``mask``, on ``replicas`` nodes.

    A second one of the same ``tenant`` (``kvstore.tenants``) and ``handle`` adds to the first; one
    of a later ``tenant_epoch`` replaces it. That is the blocks', as far as the client knows.
    """

    tenant: bytes
    handle: str
    keys: Keys
    mask: int
    ttl_ms: int
    replicas: int = 1
    tenant_epoch: int = 0


@dataclass(frozen=True, slots=True)
class HoldReply:
    """``held_bytes`` are promised to the tenant now, of ``budget_bytes`` at most."""

    outcome: HoldOutcome
    held_bytes: int
    budget_bytes: int


@dataclass(frozen=True, slots=True, eq=False)
class CarryRequest:
    """Cells of a hold that ``origin`` has and another node is to keep as well, a row each.

    ``more_bytes`` is what will be asked for besides, so that a copy that does not fit is declined
    before any of it is sent. ``granter``, ``grant``, ``released`` and ``tenant_epoch`` are the
    hold's (``kvstore.hold``).
    """

    tenant: bytes
    handle: str
    origin: str
    keys: Keys
    cells: Cells
    sizes_bytes: npt.NDArray[np.uint64]
    more_bytes: int
    ttl_ms: int
    granter: str
    grant: int
    released: int
    tenant_epoch: int


@dataclass(frozen=True, slots=True, eq=False)
class CarryReply:
    """Where GRANTED, which rows are not there and would be kept: ``wanted``; the others are."""

    outcome: HoldOutcome
    wanted: npt.NDArray[np.bool_]


class CopyState(IntEnum):
    """Whether a hold has the copies that were asked for, and if not, why."""

    SINGLE = 0
    """One copy was asked for."""
    COMPLETE = 1
    UNDER_WAY = 2
    """Another node is being asked, or sent what it lacks."""
    ALONE = 3
    """No other node answers."""
    DECLINED = 4
    """No other node took it."""


@dataclass(frozen=True, slots=True)
class HoldMark:
    """A promise, how long it lasts, and how many copies were asked for."""

    handle: str
    remaining_ms: int
    replicas: int = 1
    state: CopyState = CopyState.SINGLE

    @property
    def copies(self) -> int:
        """How many there are, as far as this node knows."""
        return self.replicas if self.state is CopyState.COMPLETE else 1


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a node knows of one block; which cells are in the arena and on the disk.

    ``size_bytes`` are those of the payloads, counted once for each tier. ``ttl_s`` and
    ``remaining_ms`` are the least of its cells', 0 for no expiry.
    """

    key: bytes
    arena_mask: int
    disk_mask: int
    size_bytes: int
    ttl_s: int
    remaining_ms: int
    holds: tuple[HoldMark, ...]
    verified_ms_ago: int | None
    """Since the copy whose bytes were checked the longest ago was found whole; ``None``: some were
    not since the start, or there is nothing."""
    buried_ms_ago: int | None
