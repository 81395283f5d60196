"""Copies: what both tiers of a node have of one block, and since when it is known to be whole.

Found or not: a sealed node says it too. What has expired is not there. Does not cover: promises and
deletes (``kvstore.life``).
"""

from dataclasses import dataclass
from enum import Enum, auto

import numpy as np

from kvstore.cell import CELLS_MAX
from kvstore.key import Keys
from kvstore.tiers.behind import Behind
from kvstore.tiers.host import HostTier


class Where(Enum):
    """Which tier has a copy."""

    ARENA = auto()
    DISK = auto()


@dataclass(frozen=True, slots=True)
class Copy:
    """Of one cell. ``expires_ms`` 0 is never; ``checked_ago_ms`` ``None`` not since the start."""

    where: Where
    cell: int
    length: int
    ttl_s: int
    expires_ms: int
    checked_ago_ms: int | None


def copies_of(host: HostTier, behind: Behind, key: Keys, wall_ms: int) -> list[Copy]:
    """All copies of one block, uint8 ``[1, 32]``."""
    slots = host.table.slots_of(key).tolist()
    copies = [
        _copy(Where.ARENA, host.table.slots[slot], host.checks.ago_ms(slot)) for slot in slots
    ]
    disk = behind.disk
    if disk is not None:
        found = disk.locate(np.repeat(key, CELLS_MAX, axis=0), np.arange(CELLS_MAX, dtype=np.uint8))
        copies += [
            _copy(Where.DISK, disk.record(number), disk.checked_ago_ms(number))
            for number in found.slots[found.held].tolist()
        ]
    return [copy for copy in copies if not 0 < copy.expires_ms <= wall_ms]


def _copy(where: Where, record: np.void, checked_ago_ms: int | None) -> Copy:
    return Copy(
        where,
        cell=int(record["cell"]),
        length=int(record["length"]),
        ttl_s=int(record["ttl_s"]),
        expires_ms=int(record["expires_ms"]),
        checked_ago_ms=checked_ago_ms,
    )
