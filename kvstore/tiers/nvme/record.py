"""What the tier knows of one cell on disk: 96 bytes, the same in memory, catalog and slot.

One packed form for all of them, so that a hundred thousand cells are read, moved and compared as
one array. All integers are little-endian.

    key, cell        whose bytes they are            offset     where in the slab the slot begins
    sequence         which write: never used twice   length     payload bytes
    header_digest    of the cell's header            stamp      last use, for eviction
    tokens, depth, span                              expires_ms, ttl_s   as in the host tier

A *slot* is a header page and the payload, padded to one of sixteen sizes per doubling, so that at
most 1/16 of it is padding and a freed slot fits the next block of about the same size.

Does not cover: how records are found (``index``), kept (``catalog``) or written (``slab``).
"""

import numpy as np
import numpy.typing as npt

from kvstore.block import HEADER_BYTES
from kvstore.cell import CELL_BYTES_MAX

PAGE_BYTES = 4096
"""Unit of everything in the slab: what O_DIRECT asks for on the disks there are."""
_STEPS_PER_DOUBLING = 16

RECORD = np.dtype(
    [
        ("key", "<u8", 4),
        ("offset", "<u8"),
        ("sequence", "<u8"),
        ("header_digest", "<u8"),
        ("span", "<u8"),
        ("expires_ms", "<u8"),
        ("stamp", "<u8"),
        ("length", "<u4"),
        ("depth", "<u4"),
        ("ttl_s", "<u4"),
        ("tokens", "<u2"),
        ("cell", "u1"),
        ("flags", "u1"),
    ]
)
TOMBSTONE = np.dtype([("key", "<u8", 4), ("sequence", "<u8"), ("deleted_ms", "<u8")])
"""A deleted block: no copy of it with a smaller sequence may come back."""
assert RECORD.itemsize == 96
assert TOMBSTONE.itemsize == 48

Records = npt.NDArray[np.void]
Tombstones = npt.NDArray[np.void]


def rows_in(packed: bytes, at: int, records: int, tombstones: int) -> tuple[Records, Tombstones]:
    """So many records from byte ``at`` on, and the tombstones that lie behind them."""
    found = np.frombuffer(packed, RECORD, records, at)
    return found, np.frombuffer(packed, TOMBSTONE, tombstones, at + found.nbytes)


def slot_bytes_of(length: int) -> int:
    """Size of the slots that cells of ``length`` payload bytes go into."""
    pages = -(-(HEADER_BYTES + length) // PAGE_BYTES)
    step = max(1, (1 << (pages - 1).bit_length() - 1) // _STEPS_PER_DOUBLING)
    return -(-pages // step) * step * PAGE_BYTES


def stored_bytes_of(length: int) -> int:
    """What is written of a slot: its header page and the payload, in whole pages."""
    return -(-(HEADER_BYTES + length) // PAGE_BYTES) * PAGE_BYTES


def slot_bytes_of_all(lengths: npt.NDArray[np.uint32]) -> npt.NDArray[np.int64]:
    """``slot_bytes_of`` for many; there are few different lengths among them."""
    distinct, at = np.unique(lengths, return_inverse=True)
    sizes = np.array([slot_bytes_of(length) for length in distinct.tolist()], np.int64)
    return sizes[at] if len(sizes) else np.empty(0, np.int64)


def key_bytes(record: np.void) -> bytes:
    """The block key of a record."""
    return bytes(record["key"].tobytes())


def name_of(record: np.void) -> tuple[bytes, int]:
    """Key and cell of a record: of whose cell it is."""
    return key_bytes(record), int(record["cell"])


def is_possible(record: np.void) -> bool:
    """Whether the fields that decide where bytes go are in range."""
    return 1 <= int(record["length"]) <= CELL_BYTES_MAX and int(record["offset"]) % PAGE_BYTES == 0
