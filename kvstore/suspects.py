"""Suspects: cells that readers found damaged, and that somebody uses: looked at when nobody does.

A cell under a lease, or on its way to the disk, is not taken from who uses it, and a reader reports
damage just when he has given his own lease back. Without this the report would be lost, and the
next reader would find the same cell.

Does not cover: looking (``kvstore.tiers.inspection``).
"""

from itertools import islice

from kvstore.calls import Damage

SUSPECTS_MAX = 256
"""What comes on top has to be reported again."""


class Suspects:
    """Reports that wait."""

    def __init__(self) -> None:
        self._waiting: dict[tuple[bytes, int], Damage] = {}

    def add(self, damage: Damage) -> None:
        """Look at this cell later."""
        name = damage.key, damage.cell
        if name in self._waiting or len(self._waiting) < SUSPECTS_MAX:
            self._waiting[name] = damage

    def take(self, count: int) -> list[Damage]:
        """At most so many, those that have waited longest."""
        return [self._waiting.pop(name) for name in list(islice(self._waiting, count))]
