"""Tombstones: when which blocks were deleted, so that no older record of one is held again.

In the catalog each has the sequence of its delete, and a start holds no record of that block with
a smaller one (``recovery``): from the tombstone's commit on a block is gone, whatever of its rows
a crash has left. A tombstone is kept for ``TOMBSTONE_S``; there are ``TOMBSTONES_MAX`` at most,
and the oldest go first.

Does not cover: how they are made durable (``drive``), copies on other nodes (``kvstore.burials``).
"""

import numpy as np

from kvstore.tiers.nvme.record import Tombstones

TOMBSTONE_S = 30 * 24 * 3600
TOMBSTONES_MAX = 1 << 16


class TombstoneBook:
    """What was deleted when, oldest first."""

    def __init__(self, found: Tombstones) -> None:
        ordered = found[np.argsort(found["sequence"])]
        self._deleted_ms = {t["key"].tobytes(): int(t["deleted_ms"]) for t in ordered}

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
