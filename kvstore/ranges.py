"""Free ranges of an arena: best fit, coalescing, whole pages.

    offset 0                                          limit (capacity)          frontier
    |  live  |free|   live   |   free   |  live  |free|  fresh: after a range was retired, as
                                                         much of it as was lost is handed out

Memory moves between blocks of different sizes because neighbours that are free become one range;
there are no size classes. Does not cover: which bytes are in use by whom (``kvstore.tiers.host``).
"""

from bisect import bisect_left, insort


class Ranges:
    """Free ranges as sorted ``(start, length)``; every operation is a few bisections."""

    def __init__(self) -> None:
        self._by_start: list[int] = []
        self._by_size: list[tuple[int, int]] = []
        self._length: dict[int, int] = {}
        self.free_bytes = 0

    def allocate(self, length: int) -> int | None:
        """Take ``length`` bytes from the smallest range that has them, lowest offset first.

        ``None`` says that no range is long enough, however much is free in all.
        """
        at = bisect_left(self._by_size, (length, 0))
        if at == len(self._by_size):
            return None
        size, start = self._by_size[at]
        self._drop(start)
        if size > length:
            self._put(start + length, size - length)
        return start

    def free(self, start: int, length: int) -> None:
        """Give ``[start, start + length)`` back and join it to free neighbours."""
        at = bisect_left(self._by_start, start)
        if at < len(self._by_start):
            after = self._by_start[at]
            assert start + length <= after, "freed twice"
            if start + length == after:
                length += self._drop(after)
        if at > 0:
            before = self._by_start[at - 1]
            assert before + self._length[before] <= start, "freed twice"
            if before + self._length[before] == start:
                length += self._drop(before)
                start = before
        self._put(start, length)

    def is_free(self, start: int, length: int) -> bool:
        """Whether this is a free range with nothing free beside it."""
        return self._length.get(start) == length

    def take(self, start: int) -> None:
        """Take the whole free range that begins at ``start``."""
        self._drop(start)

    def largest_bytes(self) -> int:
        """The longest free range."""
        return self._by_size[-1][0] if self._by_size else 0

    def _put(self, start: int, length: int) -> None:
        insort(self._by_start, start)
        insort(self._by_size, (length, start))
        self._length[start] = length
        self.free_bytes += length

    def _drop(self, start: int) -> int:
        length = self._length.pop(start)
        del self._by_start[bisect_left(self._by_start, start)]
        del self._by_size[bisect_left(self._by_size, (length, start))]
        self.free_bytes -= length
        return length
