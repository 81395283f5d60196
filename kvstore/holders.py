"""Holders: a packed table from block keys to the nodes that hold the block's cells.

    key slots, in buckets of eight                       holders, one per (key, node)
    ┌────────┬─────────────┬──────┐                     ┌──────┬──────┬──────┐
    │ word 0 │ words 1 - 3 │ head │ ──────────────────> │ node │ mask │ next │ ──> ... ──> 0
    └────────┴─────────────┴──────┘                     └──────┴──────┴──────┘
    36 bytes                                            18 bytes with the free stack

A key lies in one of two buckets, in the emptier one when it came; keys never move but in a
rebuild, so there are no tombstones, and a slot is free exactly when its head is 0. A look-up
compares both buckets of all its keys in one gather; only the length of the longest chain is
looped over, never the keys. A chain names a node once.

Does not cover: who may change an entry, and when (``kvstore.directory``).
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvstore.changes import KEY_WORDS, Flags, Indexes, Words
from kvstore.mix import mix64

_WAYS = 8
_BUCKETS_MIN = 8
_LOAD_MAX = 0.75
_LOAD_MIN = 0.2
_LOAD_FRESH = 0.5
_GROWTH = 1.4
"""Small steps: the bytes per entry stay in their budget just after a growth too."""
_HOLDERS_MIN = 64
_NIL = 0
_SPREAD = np.array(
    [0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93], np.uint64
)

Masks = npt.NDArray[np.uint64]
Slots = Indexes
"""Positions of keys in the table; -1 for a key that is not there."""


@dataclass(frozen=True, slots=True, eq=False)
class Located:
    """Who holds ``n`` keys: ``counts`` uint16 ``[n]``, then per key that many nodes and masks."""

    counts: npt.NDArray[np.uint16]
    nodes: npt.NDArray[np.uint16]
    masks: Masks

    @classmethod
    def nothing(cls, keys: int) -> "Located":
        """Nobody holds any of ``keys`` keys."""
        return cls(np.zeros(keys, np.uint16), np.empty(0, np.uint16), np.empty(0, np.uint64))

    def without(self, hidden: frozenset[int]) -> "Located":
        """The same answer without some nodes, such as those that are unreachable just now."""
        if not hidden:
            return self
        kept = ~np.isin(self.nodes, np.array(sorted(hidden), np.uint16))
        rows = np.repeat(np.arange(len(self.counts)), self.counts)[kept]
        counts = np.bincount(rows, minlength=len(self.counts)).astype(np.uint16)
        return Located(counts, self.nodes[kept], self.masks[kept])


class HolderTable:
    """Which node holds which cells of which key. Batches name each key once."""

    def __init__(self) -> None:
        self._nodes = np.zeros(_HOLDERS_MIN, np.uint16)
        self._masks = np.zeros(_HOLDERS_MIN, np.uint64)
        self._next = np.zeros(_HOLDERS_MIN, np.uint32)
        self._free = np.zeros(_HOLDERS_MIN, np.uint32)
        self._free_count = 0
        self._offer_holders(1, _HOLDERS_MIN)
        self._empty_slots(_BUCKETS_MIN)

    def __len__(self) -> int:
        """How many (key, node) pairs there are."""
        return len(self._nodes) - 1 - self._free_count

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        slots = self._first.nbytes + self._rest.nbytes + self._heads.nbytes
        return slots + sum(a.nbytes for a in (self._nodes, self._masks, self._next, self._free))

    def locate(self, words: Words, holders_max: int) -> Located:
        """Up to ``holders_max`` holders of every key, the newest first. Changes nothing."""
        slots = self._find(words)
        rows = np.flatnonzero(slots >= 0)
        at = self._heads[slots[rows]]
        found: list[tuple[Indexes, npt.NDArray[np.uint32]]] = []
        while len(rows) and len(found) < holders_max:
            found.append((rows, at))
            at = self._next[at]
            rows, at = rows[at != _NIL], at[at != _NIL]
        all_rows = np.concatenate([np.empty(0, np.intp), *(part[0] for part in found)])
        all_at = np.concatenate([np.empty(0, np.uint32), *(part[1] for part in found)])
        holders = all_at[np.argsort(all_rows, kind="stable")]
        counts = np.bincount(all_rows, minlength=len(words)).astype(np.uint16)
        return Located(counts, self._nodes[holders], self._masks[holders])

    def update(self, words: Words, node: int, gained: Masks, lost: Masks) -> tuple[Masks, Masks]:
        """Add and take cells of distinct keys for one node; the masks before and after."""
        slots = self._find(words)
        holders, before = self._holders(slots, node)
        old = self._masks[holders]
        new = (old | gained) & ~lost
        known = holders != _NIL
        kept = known & (new != 0)
        self._masks[holders[kept]] = new[kept]
        gone = known & (new == 0)
        self._unlink(slots[gone], holders[gone], before[gone])
        fresh = ~known & (new != 0)
        if fresh.any():
            # Keys of a batch are distinct, so unlinking has emptied no slot found for these.
            self._link(words[fresh], slots[fresh], node, new[fresh])
        self._shrink()
        return old, new

    def drop(self, node: int) -> None:
        """Forget everything that one node holds."""
        slots = np.flatnonzero(self._heads)
        holders, before = self._holders(slots, node)
        named = holders != _NIL
        self._unlink(slots[named], holders[named], before[named])
        self._shrink()

    # Chains of holders.

    def _holders(
        self, slots: Slots, node: int
    ) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint32]]:
        """Where each slot's chain names ``node``, and the holder before it; 0 for none."""
        holders = np.zeros(len(slots), np.uint32)
        before = np.zeros(len(slots), np.uint32)
        rows = np.flatnonzero(slots >= 0)
        at = self._heads[slots[rows]]
        last = np.zeros(len(rows), np.uint32)
        while len(rows):
            hit = self._nodes[at] == node
            holders[rows[hit]] = at[hit]
            before[rows[hit]] = last[hit]
            follower = self._next[at]
            onward = ~hit & (follower != _NIL)
            rows, last, at = rows[onward], at[onward], follower[onward]
        return holders, before

    def _link(self, words: Words, slots: Slots, node: int, masks: Masks) -> None:
        """Put a new holder at the head of each key's chain, and new keys into slots."""
        count = len(words)
        self._reserve_holders(count)
        holders = self._free[self._free_count - count : self._free_count].copy()
        self._free_count -= count
        self._nodes[holders] = node
        self._masks[holders] = masks
        known = slots >= 0
        self._next[holders[known]] = self._heads[slots[known]]
        self._heads[slots[known]] = holders[known]
        self._next[holders[~known]] = _NIL
        self._insert(words[~known], holders[~known])

    def _unlink(
        self,
        slots: Slots,
        holders: npt.NDArray[np.uint32],
        before: npt.NDArray[np.uint32],
    ) -> None:
        """Take holders out of the chains of distinct slots; a slot without any is free."""
        follower = self._next[holders]
        inner = before != _NIL
        self._next[before[inner]] = follower[inner]
        self._heads[slots[~inner]] = follower[~inner]
        self._keys -= int(np.count_nonzero(follower[~inner] == _NIL))
        self._masks[holders] = 0
        self._free[self._free_count : self._free_count + len(holders)] = holders
        self._free_count += len(holders)

    def _reserve_holders(self, count: int) -> None:
        if count <= self._free_count:
            return
        size = len(self._nodes)
        grown = max(int(size * _GROWTH), size + count - self._free_count)
        self._nodes = np.resize(self._nodes, grown)
        self._masks = np.resize(self._masks, grown)
        self._next = np.resize(self._next, grown)
        self._free = np.resize(self._free, grown)
        self._offer_holders(size, grown)

    def _offer_holders(self, start: int, stop: int) -> None:
        """Push holders onto the free stack, lowest on top."""
        self._masks[start:stop] = 0
        count = stop - start
        self._free[self._free_count : self._free_count + count] = np.arange(stop - 1, start - 1, -1)
        self._free_count += count

    # Slots of keys.

    def _empty_slots(self, buckets: int) -> None:
        self._first = np.zeros((buckets, _WAYS), np.uint64)
        self._rest = np.zeros((buckets * _WAYS, KEY_WORDS - 1), np.uint64)
        self._heads = np.zeros(buckets * _WAYS, np.uint32)
        self._keys = 0

    def _buckets(self, words: Words) -> npt.NDArray[np.intp]:
        """The two buckets of every key, ``[n, 2]``."""
        hashed = mix64((words * _SPREAD).sum(axis=1, dtype=np.uint64))
        halves = np.stack([hashed & np.uint64(0xFFFFFFFF), hashed >> np.uint64(32)], axis=1)
        return ((halves * np.uint64(len(self._first))) >> np.uint64(32)).astype(np.intp)

    def _find(self, words: Words) -> Slots:
        """The slot of every key, -1 where it is not there."""
        buckets = self._buckets(words)
        rows, choices, ways = np.nonzero(self._first[buckets] == words[:, :1, None])
        slots = buckets[rows, choices] * _WAYS + ways
        same = (self._rest[slots] == words[rows, 1:]).all(axis=1) & (self._heads[slots] != _NIL)
        found = np.full(len(words), -1, np.intp)
        found[rows[same]] = slots[same]
        return found

    def _insert(self, words: Words, heads: npt.NDArray[np.uint32]) -> None:
        """Give distinct keys that are not there a slot, growing as needed."""
        wanted = self._keys + len(words)
        if wanted > _LOAD_MAX * len(self._heads):
            self._rebuild(max(_grown(len(self._first)), _fitting(wanted, _LOAD_MAX)))
        left = self._place(words, heads)
        while len(left):
            self._rebuild(_grown(len(self._first)))
            words, heads = words[left], heads[left]
            left = self._place(words, heads)

    def _place(self, words: Words, heads: npt.NDArray[np.uint32]) -> Indexes:
        """Fill free slots; the positions of the keys for which both buckets are full."""
        left = [np.empty(0, np.intp)]
        # A part is small against the table, so that most keys see the buckets as they will be.
        step = max(_WAYS, len(self._first) // 4)
        for start in range(0, len(words), step):
            pending = np.arange(start, min(start + step, len(words)))
            while len(pending):
                placed = self._place_round(words[pending], heads[pending])
                if not placed.any():
                    left.append(pending)
                    break
                pending = pending[~placed]
        return np.concatenate(left)

    def _place_round(self, words: Words, heads: npt.NDArray[np.uint32]) -> Flags:
        """Each key tries the emptier of its buckets; those that found a slot there."""
        buckets = self._buckets(words)
        taken = self._heads.reshape(-1, _WAYS)[buckets] != _NIL
        choice = np.argmin(taken.sum(axis=2), axis=1)
        everyone = np.arange(len(words))
        bucket, full = buckets[everyone, choice], taken[everyone, choice]
        # One key per bucket and round: the others choose again, knowing of it.
        fits: Flags = ~full.all(axis=1)
        fits[fits] = _is_first(bucket[fits])
        way = np.argmin(full[fits], axis=1)
        slots = bucket[fits] * _WAYS + way
        self._first[bucket[fits], way] = words[fits, 0]
        self._rest[slots] = words[fits, 1:]
        self._heads[slots] = heads[fits]
        self._keys += len(slots)
        return fits

    def _rebuild(self, buckets: int) -> None:
        """Move all keys into a table of at least ``buckets`` buckets."""
        used = np.flatnonzero(self._heads)
        words = np.concatenate([self._first.reshape(-1, 1)[used], self._rest[used]], axis=1)
        heads = self._heads[used]
        self._empty_slots(buckets)
        while len(self._place(words, heads)):
            self._empty_slots(_grown(len(self._first)))

    def _shrink(self) -> None:
        """Give memory back once little of it is used."""
        if len(self._first) > _BUCKETS_MIN and self._keys < _LOAD_MIN * len(self._heads):
            self._rebuild(_fitting(self._keys, _LOAD_FRESH))
        if len(self._nodes) > _HOLDERS_MIN and len(self) < _LOAD_MIN * len(self._nodes):
            self._compact_holders()

    def _compact_holders(self) -> None:
        """Renumber the holders without gaps; masks of free ones are 0."""
        used = np.flatnonzero(self._masks)
        size = max(_HOLDERS_MIN, int((len(used) + 1) / _LOAD_FRESH))
        renumbered = np.zeros(len(self._nodes), np.uint32)
        renumbered[used] = np.arange(1, len(used) + 1)
        nodes, masks, followers = self._nodes[used], self._masks[used], self._next[used]
        self._heads = renumbered[self._heads]
        self._nodes, self._masks = np.zeros(size, np.uint16), np.zeros(size, np.uint64)
        self._next, self._free = np.zeros(size, np.uint32), np.zeros(size, np.uint32)
        stop = len(used) + 1
        self._nodes[1:stop], self._masks[1:stop] = nodes, masks
        self._next[1:stop] = renumbered[followers]
        self._free_count = 0
        self._offer_holders(stop, size)


def _is_first(values: Indexes) -> Flags:
    """Which elements are the first of their value."""
    first = np.zeros(len(values), np.bool_)
    first[np.unique(values, return_index=True)[1]] = True
    return first


def _grown(buckets: int) -> int:
    return int(buckets * _GROWTH) + 1


def _fitting(keys: int, load: float) -> int:
    return max(_BUCKETS_MIN, int(keys / (load * _WAYS)) + 1)
