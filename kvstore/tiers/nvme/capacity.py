"""How large a slab is, and how it is cut into extents.

Does not cover: what is configured (``kvstore.config``), what a slab that is there has
(``identity``; its extents keep their size, whatever would be chosen for a new one).
"""

from kvstore.errors import ConfigError
from kvstore.tiers.nvme.record import PAGE_BYTES

DEFAULT_BYTES_MAX = 20 << 30
DEFAULT_FREE_SHARE = 0.1
CAPACITY_BYTES_MIN = 16 << 20
EXTENT_BYTES_MAX = 64 << 20
EXTENTS_MIN = 16
"""So many sizes can have an extent each, before the extents become smaller."""
_EXTENT_STEP_BYTES = 1 << 20
_CELL_BYTES = 1 << 16
"""A tier has room for as many cells as if they were all this small."""
_CELLS_MAX = 1 << 22


def default_capacity_bytes(free_bytes: int) -> int:
    """What a node takes of a disk with that much free space when nobody says."""
    return min(DEFAULT_BYTES_MAX, int(free_bytes * DEFAULT_FREE_SHARE))


def extents_for(capacity_bytes: int) -> tuple[int, int]:
    """Bytes of an extent, and how many there are; with the first page, never more than asked."""
    if capacity_bytes < CAPACITY_BYTES_MIN:
        raise ConfigError(
            f"an NVMe tier needs at least {CAPACITY_BYTES_MIN} bytes, got {capacity_bytes}: give "
            "it more, or none"
        )
    usable_bytes = capacity_bytes - PAGE_BYTES
    wanted = min(EXTENT_BYTES_MAX, usable_bytes // EXTENTS_MIN)
    extent_bytes = max(_EXTENT_STEP_BYTES, wanted - wanted % _EXTENT_STEP_BYTES)
    return extent_bytes, usable_bytes // extent_bytes


def cells_for(capacity_bytes: int) -> int:
    """How many cells a tier of that size has records for."""
    return min(_CELLS_MAX, max(1024, capacity_bytes // _CELL_BYTES))
