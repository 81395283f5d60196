"""The index: which cells are held, found by key with one gather, in packed memory.

    records  96 bytes per cell         ways   [buckets, 8] numbers of records + 1, 0 is free

A cell is in one of two buckets, as in the key table of the arena, and never moves. Records that
are in no bucket belong to cells that are being written or freed: nobody finds them.

Does not cover: who is evicted, what is durable (``tier``).
"""

import numpy as np
import numpy.typing as npt

from kvstore.changes import as_words
from kvstore.key import Keys
from kvstore.table import LOAD_MAX, WAYS, Cells, Slots, buckets_of
from kvstore.tiers.nvme.record import RECORD, Records


class Index:
    """Room for ``cells_max`` records. Driven by one thread."""

    def __init__(self, cells_max: int) -> None:
        self.records: Records = np.zeros(cells_max, RECORD)
        buckets = int(cells_max / LOAD_MAX / WAYS) + 1
        self._ways = np.zeros((buckets, WAYS), np.uint32)
        self._words = self.records.view("<u8").reshape(cells_max, -1)
        self._bucket_count = np.uint64(buckets)

    def find(self, keys: Keys, cells: Cells) -> tuple[npt.NDArray[np.bool_], Slots]:
        """Of many cells, which are held, and by which records. Others' numbers mean nothing."""
        words = as_words(keys)
        buckets = buckets_of(words, cells, self._bucket_count)
        ways = np.concatenate([self._ways[bucket] for bucket in buckets], axis=1)
        at = np.maximum(ways, 1) - 1
        same = (ways != 0) & (self._words[at, 0] == words[:, :1])
        same &= self.records["cell"][at] == cells[:, None]
        numbers = at[np.arange(len(keys)), same.argmax(axis=1)].astype(np.uint32)
        held: npt.NDArray[np.bool_] = same.any(axis=1)
        held &= (self._words[numbers, :4] == words).all(axis=1)
        return held, numbers

    def insert(self, number: int) -> bool:
        """Let a record be found; ``False`` if both its buckets are full."""
        pair = self._buckets(np.array([number], np.uint32))[0].tolist()
        free = [(np.flatnonzero(self._ways[bucket] == 0), bucket) for bucket in pair]
        ways, bucket = max(free, key=lambda pair: len(pair[0]))
        if not len(ways):
            return False
        self._ways[bucket, int(ways[0])] = number + 1
        return True

    def insert_all(self, numbers: Slots) -> Slots:
        """``insert`` for many; those for which there was no room."""
        step = max(1, len(self._ways) // WAYS)
        while len(numbers) > step // WAYS:
            parts = [numbers[start : start + step] for start in range(0, len(numbers), step)]
            left = np.concatenate([self._insert_some(part) for part in parts])
            if len(left) == len(numbers):
                break
            numbers = left
        return np.array([n for n in numbers.tolist() if not self.insert(n)], np.uint32)

    def remove(self, number: int) -> None:
        """Let a record be found no more."""
        for bucket in self._buckets(np.array([number], np.uint32))[0].tolist():
            row = self._ways[bucket]
            row[row == number + 1] = 0

    def metadata_bytes(self) -> int:
        """Memory of all of it."""
        return self.records.nbytes + self._ways.nbytes

    def _insert_some(self, numbers: Slots) -> Slots:
        """At most one record into each bucket, the emptier of its two; the others are returned."""
        pair = self._buckets(numbers)
        used = (self._ways != 0).sum(axis=1)[pair]
        rows = np.arange(len(numbers))
        emptier = used.argmin(axis=1)
        bucket, filled = pair[rows, emptier], used[rows, emptier]
        first = np.zeros(len(numbers), np.bool_)
        first[np.unique(bucket, return_index=True)[1]] = True
        # Ways are freed in any order, so the first free one is looked for.
        free = self._ways[bucket] == 0
        first &= filled < WAYS
        self._ways[bucket[first], free[first].argmax(axis=1)] = numbers[first] + 1
        return numbers[~first]

    def _buckets(self, numbers: Slots) -> npt.NDArray[np.intp]:
        """The two that each record may be found in, ``[n, 2]``."""
        words, cells = self._words[numbers, :4], self.records["cell"][numbers]
        return np.stack(buckets_of(words, cells, self._bucket_count), axis=1).astype(np.intp)
