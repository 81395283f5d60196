"""Start: how a host tier comes to be when its node starts.

Does not cover: what of a predecessor's arena can be adopted (``adoption``), the disk
(``kvstore.tiers.nvme.recovery``).
"""

import logging
from pathlib import Path

import numpy as np

from kvstore.clock import Clock
from kvstore.errors import StateError
from kvstore.fs import FileSystem
from kvstore.tiers.host import HostTier

log = logging.getLogger(__name__)


def default_slots(capacity_bytes: int) -> int:
    """How many cells a tier of this size has records for."""
    return int(np.clip(capacity_bytes // 65536, 1024, 1 << 22))


def open_tier(
    fs: FileSystem, clock: Clock, folder: Path, capacity_bytes: int, incarnation: int
) -> HostTier:
    """Adopt what is in ``folder``, or start empty and say why."""
    try:
        tier = HostTier.adopt(fs, clock, folder, capacity_bytes, incarnation)
    except StateError as reason:
        log.info("starting with an empty arena in %s: %s", folder, reason)
        slots = default_slots(capacity_bytes)
        return HostTier.create(fs, clock, folder, capacity_bytes, slots, incarnation)
    log.info("adopted %d cells in %s", tier.stats.adopted, folder)
    return tier
