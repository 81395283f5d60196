"""How large a slab is, and how it is cut into extents.

Does not cover: what is configured (``kvstore.config``), what a slab that is there has
(``identity``; its extents keep their size, whatever would be chosen for a new one).
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

from kvstore.errors import ConfigError
from kvstore.tiers.nvme.record import PAGE_BYTES
from kvstore.tiers.nvme.slab import SLAB_FILE

DEFAULT_BYTES_MAX = 20 << 30
DEFAULT_BYTES_MIN = 64 << 20
"""Where a default would be less, there is no NVMe tier."""
DEFAULT_FREE_SHARE = 0.1
CAPACITY_BYTES_MIN = 16 << 20
EXTENT_BYTES_MAX = 64 << 20
EXTENTS_MIN = 16
"""So many sizes can have an extent each, before the extents become smaller."""
_EXTENT_STEP_BYTES = 1 << 20
_CELL_BYTES = 1 << 16
"""A tier has room for as many cells as if they were all this small."""
_CELLS_MAX = 1 << 22


def default_capacity_bytes(free_bytes: int, nodes: int = 1) -> int:
    """What each of some nodes takes of a disk with that much free space when nobody says; 0 for no
    NVMe tier."""
    share_bytes = min(DEFAULT_BYTES_MAX, int(free_bytes * DEFAULT_FREE_SHARE) // nodes)
    return share_bytes if share_bytes >= DEFAULT_BYTES_MIN else 0


def default_bytes_in(folders: Sequence[Path]) -> int:
    """``default_capacity_bytes`` for the nodes with these folders, all on one disk.

    Slabs that are there keep their size: what others wrote since must not cost blocks.
    """
    slabs = [slab_bytes_in(folder) for folder in folders]
    if all(slabs):
        return max(slabs)
    return default_capacity_bytes(free_bytes_of(folders[0]) + sum(slabs), len(folders))


def slab_bytes_in(folder: Path) -> int:
    """How large the slab in a folder is, 0 where there is none."""
    try:
        return (folder / SLAB_FILE).stat().st_size
    except FileNotFoundError:
        return 0


def free_bytes_of(folder: Path) -> int:
    """Free space of the disk that a folder is on, or would be on."""
    existing = next(path for path in (folder, *folder.parents) if path.is_dir())
    return shutil.disk_usage(existing).free


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
