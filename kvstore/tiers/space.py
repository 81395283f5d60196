"""Space: which parts of an arena may be handed out, and what replaces those that never may again.

    0                                  capacity                     frontier
    | held | free | RETIRED | held | free | fresh, for the retired | never used so far ...

A retired range's memory is given back to the system and as much is backed at the frontier, so that
a tier keeps its size. Where the system refuses either, the tier is smaller until a later try.

Does not cover: whose the ranges are and what they hold (``kvstore.tiers.host``).
"""

import errno
import logging
from collections.abc import Iterable

import numpy as np

from kvstore.arena import Arena
from kvstore.ranges import Ranges

log = logging.getLogger(__name__)


class Space:
    """The memory of one arena; ``header`` is its table's, where the frontier stands."""

    def __init__(self, arena: Arena, header: np.void) -> None:
        self._arena = arena
        self._header = header
        self._ranges = Ranges()
        self._retired_bytes = 0
        self._given_back_bytes = 0
        self._missing_bytes = 0

    @property
    def free_bytes(self) -> int:
        """How much could be handed out, in however many pieces."""
        return self._ranges.free_bytes

    def has_room(self, length: int) -> bool:
        """Whether ``allocate`` would find a range."""
        return self._ranges.largest_bytes() >= length

    def allocate(self, length: int) -> int | None:
        """Take a range; ``None`` if no free one is long enough."""
        return self._ranges.allocate(length)

    def free(self, start: int, length: int) -> None:
        """Let a range be handed out again."""
        self._ranges.free(start, length)

    def retire(self, start: int, length: int) -> None:
        """Never hand this range out again, but as much memory elsewhere."""
        self._settle(self._give_back(start, length))

    def sweep(self, retired: Iterable[tuple[int, int]]) -> None:
        """Give the memory of all retired ranges back once more.

        A writer that went on after it was given up has brought pages back; what the system
        refused earlier may work now.
        """
        self._retired_bytes = self._given_back_bytes = 0
        faults = [self._give_back(start, length) for start, length in retired]
        self._settle(next((fault for fault in faults if fault is not None), None))

    def _give_back(self, start: int, length: int) -> OSError | None:
        self._retired_bytes += length
        try:
            self._arena.punch(start, length)
        except OSError as fault:
            return fault
        self._given_back_bytes += length
        return None

    def _settle(self, fault: OSError | None) -> None:
        """Replace what was given back; say once that the tier shrank, and once that it is whole."""
        fault = self._replace() or fault
        backed_bytes = int(self._header["frontier"]) - self._retired_bytes
        missing_bytes = int(self._header["capacity_bytes"]) - backed_bytes
        if missing_bytes > self._missing_bytes:
            log.warning("the tier is %d bytes smaller than configured: %s", missing_bytes, fault)
        elif missing_bytes == 0 < self._missing_bytes:
            log.warning("the tier has its configured size again")
        self._missing_bytes = missing_bytes

    def _replace(self) -> OSError | None:
        frontier = int(self._header["frontier"])
        wanted = int(self._header["capacity_bytes"]) - (frontier - self._given_back_bytes)
        if wanted <= 0:
            return None
        if frontier + wanted > self._arena.size_bytes:
            return OSError(
                errno.ENOSPC, "no fresh offsets are left, restart this node with --purge"
            )
        try:
            self._arena.back(frontier, wanted)
        except OSError as fault:
            return fault
        self._header["frontier"] = frontier + wanted
        self._ranges.free(frontier, wanted)
        return None
