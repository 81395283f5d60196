"""Retired ranges: offsets that are never handed out again, remembered for as long as the arena.

    rows of (start, stop) in the table; a row that does not stop beyond its start is empty

    what is retired lies            and is entered as
    beside no other                 an empty row's start, then its stop
    right behind a row's range      that row's stop
    right before a row's range      that row's start
    between the ranges of two       the lower one's stop; then the upper one is emptied

Neighbours become one range, so that a tier whose writers come and go needs few rows, however often
they do. Each step is one store of eight bytes, and after each the rows cover what they covered
before: whenever the node dies, its successor knows every retired offset. Ranges that overlap are
what a death between two steps leaves; the successor joins them.

Does not cover: what replaces the memory, and why the rows suffice (``kvstore.tiers.space``).
"""

from array import array
from bisect import bisect_left

import numpy as np
import numpy.typing as npt


class Retired:
    """Ranges in order of their starts; ``rows`` is where a successor finds them."""

    def __init__(self, rows: npt.NDArray[np.void]) -> None:
        self._row_starts: npt.NDArray[np.uint64] = rows["start"]
        self._row_stops: npt.NDArray[np.uint64] = rows["stop"]
        self._starts: list[int] = []
        self._rows: list[int] = []
        empty = np.flatnonzero(rows["stop"] <= rows["start"])[::-1]
        self._empty = array("I", empty.astype(np.uint32).tobytes())  # of many rows, few are used
        self.nbytes = 0
        used = np.flatnonzero(rows["stop"] > rows["start"])
        for row in used[np.argsort(rows["start"][used])].tolist():
            self._take_over(row)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def is_full(self) -> bool:
        """Whether no other range has a row."""
        return not self._empty

    def ranges(self) -> list[tuple[int, int]]:
        """All of them as ``(start, stop)``, lowest first; no two touch."""
        return [(start, self._stop(at)) for at, start in enumerate(self._starts)]

    def add(self, start: int, stop: int) -> None:
        """Remember ``[start, stop)``, nothing of which is retired yet."""
        at = bisect_left(self._starts, start)
        follows = at > 0 and self._stop(at - 1) == start
        leads = at < len(self) and self._starts[at] == stop
        self.nbytes += stop - start
        if follows and leads:
            self._row_stops[self._rows[at - 1]] = self._stop(at)
            self._clear(self._rows.pop(at))
            del self._starts[at]
        elif follows:
            self._row_stops[self._rows[at - 1]] = stop
        elif leads:
            self._row_starts[self._rows[at]] = self._starts[at] = start
        else:
            row = self._empty.pop()
            self._row_stops[row] = 0
            self._row_starts[row] = start
            self._row_stops[row] = stop
            self._starts.insert(at, start)
            self._rows.insert(at, row)

    def _take_over(self, row: int) -> None:
        """Enter a predecessor's row, the next one by its start."""
        start, stop = int(self._row_starts[row]), int(self._row_stops[row])
        reached = self._stop(-1) if self._rows else -1
        self.nbytes += max(0, stop - max(start, reached))
        if start > reached:
            self._starts.append(start)
            self._rows.append(row)
            return
        self._row_stops[self._rows[-1]] = max(stop, reached)
        self._clear(row)

    def _clear(self, row: int) -> None:
        self._row_stops[row] = 0
        self._empty.append(row)

    def _stop(self, at: int) -> int:
        return int(self._row_stops[self._rows[at]])
