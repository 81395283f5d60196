"""Space: which parts of an arena may be handed out, and what replaces those that never may again.

    0                                  capacity                     frontier
    | held | free | RETIRED | held | free | fresh, for the retired | never used so far ...

A retired range's memory is given back to the system and as much is backed at the frontier, so that
a tier keeps its size. Where the system refuses either, the tier is smaller until a later try, the
first of them soon: all of a small tier may be missing. Where the file has no fresh offsets left, it
stays smaller until its arena is discarded.

The table has one row more for retired ranges than it has slots. Two ranges that lie apart with no
slot in between have only free memory there, so when all rows are taken the narrowest such gap is
retired as well and two ranges become one: rows never run out.

Does not cover: whose the ranges are and what they hold (``kvstore.tiers.host``).
"""

import logging
from collections.abc import Iterable
from itertools import pairwise

from kvstore.arena import Arena
from kvstore.clock import Clock
from kvstore.ranges import Ranges
from kvstore.table import KeyTable
from kvstore.tiers.retired import Retired

log = logging.getLogger(__name__)

SWEEP_S = 60.0
"""How often the memory behind retired offsets is given back once more."""
RETRY_S = 1.0
"""The same, first time after the tier became smaller; then twice as long each time, up to that."""

Extent = tuple[int, int]
"""Start and length."""


class Space:
    """The memory of one arena; in its table stand the frontier and what was retired."""

    def __init__(self, arena: Arena, table: KeyTable, clock: Clock) -> None:
        self._arena = arena
        self._clock = clock
        self._header = table.header
        self._ranges = Ranges()
        self._retired = Retired(table.retired)
        self._given_back_bytes = 0
        self._missing_bytes = 0
        self._worn = False
        self._wait_s = SWEEP_S
        self._sweep_s = clock.monotonic_s() + SWEEP_S
        """When to sweep next."""

    @property
    def free_bytes(self) -> int:
        """How much could be handed out, in however many pieces."""
        return self._ranges.free_bytes

    @property
    def retired_bytes(self) -> int:
        """How many of the arena's offsets are never handed out again."""
        return self._retired.nbytes

    def has_room(self, length: int) -> bool:
        """Whether ``allocate`` would find a range."""
        return self._ranges.largest_bytes() >= length

    def longest_stretch(self, in_use: Iterable[Extent]) -> int:
        """The longest range that could be free if all but ``in_use`` were freed."""
        taken = [(start, start + length) for start, length in in_use]
        frontier = int(self._header["frontier"])
        longest = position = 0
        for start, stop in sorted([*taken, *self._retired.ranges(), (frontier, frontier)]):
            longest = max(longest, start - position)
            position = stop
        return longest

    def allocate(self, length: int) -> int | None:
        """Take a range; ``None`` if no free one is long enough."""
        return self._ranges.allocate(length)

    def free(self, start: int, length: int) -> None:
        """Let a range be handed out again."""
        self._ranges.free(start, length)

    def retire(self, start: int, length: int) -> None:
        """Never hand this range out again, but as much memory elsewhere."""
        faults = [self._give_back(*extent) for extent in self._remember(start, length)]
        self._settle(faults)

    def take_over(self, free: Iterable[Extent], unfinished: Iterable[Extent]) -> None:
        """Go on with a predecessor's arena: what is free in it, and what is to be retired."""
        for start, length in free:
            self._ranges.free(start, length)
        self._join()
        for start, length in unfinished:
            self._remember(start, length)
        self.sweep()

    def tick(self) -> None:
        """``sweep``, when it is time."""
        now_s = self._clock.monotonic_s()
        if now_s < self._sweep_s:
            return
        self._wait_s = min(2 * self._wait_s, SWEEP_S) if self._missing_bytes else SWEEP_S
        self._sweep_s = now_s + self._wait_s
        self.sweep()

    def sweep(self) -> None:
        """Give the memory of all retired ranges back once more.

        A writer that went on after it was given up has brought pages back; what the system
        refused earlier may work now.
        """
        self._given_back_bytes = 0
        ranges = self._retired.ranges()
        self._settle([self._give_back(start, stop - start) for start, stop in ranges])

    def _remember(self, start: int, length: int) -> list[Extent]:
        """Enter a range among the retired; what was retired by that."""
        self._retired.add(start, start + length)
        return [(start, length), *self._join()]

    def _join(self) -> list[Extent]:
        """Make two ranges one while no row is left; the gaps that were retired for it."""
        gaps = []
        while self._retired.is_full:
            start, length = self._narrowest_gap()
            self._ranges.take(start)
            self._retired.add(start, start + length)
            gaps.append((start, length))
        return gaps

    def _narrowest_gap(self) -> Extent:
        """A free range, and nothing else, between two retired ones."""
        between = pairwise(self._retired.ranges())
        gaps = [(before[1], after[0] - before[1]) for before, after in between]
        free = [gap for gap in gaps if self._ranges.is_free(*gap)]
        assert free, "more ranges are retired than there are slots to lie in between"
        return min(free, key=lambda gap: gap[1])

    def _give_back(self, start: int, length: int) -> OSError | None:
        try:
            self._arena.punch(start, length)
        except OSError as fault:
            return fault
        self._given_back_bytes += length
        return None

    def _settle(self, faults: Iterable[OSError | None]) -> None:
        """Replace what was given back; say once that the tier shrank, and once that it is whole."""
        fault = self._replace() or next((fault for fault in faults if fault is not None), None)
        backed_bytes = int(self._header["frontier"]) - self._retired.nbytes
        missing_bytes = int(self._header["capacity_bytes"]) - backed_bytes
        if missing_bytes and not self._missing_bytes:
            self._wait_s = RETRY_S
            self._sweep_s = min(self._sweep_s, self._clock.monotonic_s() + RETRY_S)
            if not self._worn:
                log.warning(
                    "the tier is %d bytes smaller than configured: %s", missing_bytes, fault
                )
        elif self._missing_bytes and not missing_bytes:
            log.warning("the tier has its configured size again")
        self._missing_bytes = missing_bytes

    def _replace(self) -> OSError | None:
        frontier = int(self._header["frontier"])
        wanted = int(self._header["capacity_bytes"]) - (frontier - self._given_back_bytes)
        length = min(wanted, self._arena.size_bytes - frontier)
        if wanted > length and not self._worn:
            self._worn = True
            log.warning(
                "writers that were lost have used up the arena's offsets (%d bytes are retired): "
                "the tier gets smaller with every further one until its arena is discarded with "
                "`samovar down --purge`",
                self._retired.nbytes,
            )
        if length <= 0:
            return None
        try:
            self._arena.back(frontier, length)
        except OSError as fault:
            return fault
        self._header["frontier"] = frontier + length
        self._ranges.free(frontier, length)
        return None
