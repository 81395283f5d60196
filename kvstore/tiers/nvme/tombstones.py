"""Tombstones: blocks that were deleted, so that no copy from elsewhere brings them back.

What this node itself held is wiped before a delete is acknowledged, and needs no tombstone. They
are for the copies that were out of reach then: a replica on a node that was down, a promotion that
was on its way. A tombstone is kept for ``TOMBSTONE_S``; there are ``TOMBSTONES_MAX`` at most, and
the oldest go first.

Does not cover: how they are made durable (``tier``), who asks for them.
"""

import numpy as np
import numpy.typing as npt

from kvstore.key import Keys
from kvstore.tiers.nvme.record import Tombstones

TOMBSTONE_S = 30 * 24 * 3600
TOMBSTONES_MAX = 1 << 16


class TombstoneBook:
    """What was deleted when, oldest first."""

    def __init__(self, found: Tombstones) -> None:
        ordered = found[np.argsort(found["sequence"])]
        self._deleted_ms = {t["key"].tobytes(): int(t["deleted_ms"]) for t in ordered}

    def __len__(self) -> int:
        return len(self._deleted_ms)

    def enter(self, key: bytes, now_ms: int) -> None:
        """A block was deleted now."""
        self._deleted_ms.pop(key, None)
        self._deleted_ms[key] = now_ms

    def take_outdated(self, now_ms: int) -> list[bytes]:
        """Forget what is too old, or one too many; the keys."""
        outdated: list[bytes] = []
        for key, deleted_ms in self._deleted_ms.items():
            excess = len(self._deleted_ms) - len(outdated) - TOMBSTONES_MAX
            if excess <= 0 and now_ms - deleted_ms < TOMBSTONE_S * 1000:
                break
            outdated.append(key)
        for key in outdated:
            del self._deleted_ms[key]
        return outdated

    def deleted_ms(self, keys: Keys) -> npt.NDArray[np.uint64]:
        """When each block was deleted, 0 if it was not."""
        known = self._deleted_ms
        return np.array([known.get(key.tobytes(), 0) for key in keys], np.uint64)
