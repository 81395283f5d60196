"""Eviction: which held cells go first. Tail-first LRU.

Every put, hit or touch of a prompt gives all its cells one stamp, larger than any before. Since
a prompt's shorter prefixes are touched with it, a block's stamp is never older than its
children's; among equal stamps the deepest goes first. So chains are eaten from the tail.

A policy is this one small class: it sees slot numbers, stamps and depths, never keys or bytes, so
that live nodes and a trace simulator can share it. It is driven from one thread.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

DEPTH_BITS = 20
_DEPTH_MAX = (1 << DEPTH_BITS) - 1
_ABSENT = np.uint64(np.iinfo(np.uint64).max)
BATCH_SLOTS = 256


class TailFirstLru:
    """Orders up to ``slots`` slots by (stamp, deepest first)."""

    def __init__(self, slots: int) -> None:
        self._order = np.full(slots, _ABSENT, np.uint64)
        self._queue: list[tuple[int, int]] = []
        self._stamp = 0

    def next_stamp(self) -> int:
        """A stamp newer than every other; one per put, hit or touch of a prompt."""
        self._stamp += 1
        return self._stamp

    def go_on_after(self, stamp: int) -> None:
        """Every later stamp is newer than this one, too."""
        self._stamp = max(self._stamp, stamp)

    def touch(
        self, slots: npt.NDArray[np.uint32], depths: npt.NDArray[np.uint32], stamp: int
    ) -> None:
        """Enter slots, or move them to ``stamp``; never to an older one."""
        self.go_on_after(stamp)
        order = orders(np.full(len(slots), stamp, np.uint64), depths)
        if self._queue and len(order) and int(order.min()) <= self._queue[-1][1]:
            self._queue = []  # what was entered is older than what is queued
        current = self._order[slots]
        self._order[slots] = np.where(current == _ABSENT, order, np.maximum(order, current))

    def enter(
        self,
        slots: npt.NDArray[np.uint32],
        depths: npt.NDArray[np.uint32],
        stamps: npt.NDArray[np.uint64],
    ) -> None:
        """Take over slots with the stamps that they had in an earlier life."""
        self.go_on_after(int(stamps.max(initial=0)))
        self._queue = []  # what is entered may be older than what is queued
        self._order[slots] = orders(stamps, depths)

    def metadata_bytes(self) -> int:
        """Memory that the policy uses."""
        return self._order.nbytes

    def stamp_of(self, slot: int) -> int:
        """When a held slot was used last."""
        return int(self._order[slot]) >> DEPTH_BITS

    def used_since(self, stamp: int) -> npt.NDArray[np.uint32]:
        """Held slots with this stamp or a newer one."""
        stamps = self._order >> np.uint64(DEPTH_BITS)
        held = np.flatnonzero((self._order != _ABSENT) & (stamps >= np.uint64(stamp)))
        return held.astype(np.uint32)

    def remove(self, slot: int) -> None:
        """Forget a slot that was freed."""
        self._order[slot] = _ABSENT

    def victims(self) -> Iterator[int]:
        """Slots to evict, first victim first; the caller may touch and remove between two.

        The oldest slots stay queued from one call to the next, because finding them reads every
        order there is. A slot of the queue that was touched or removed since is passed over.
        """
        batch = BATCH_SLOTS
        self._queue = self._queue[self._passed_over() :]
        while True:
            complete = not self._queue  # one that was queued earlier misses what came since
            if complete:
                self._queue = self._oldest(batch)
            queue, passed_over = self._queue, 0
            for slot, order in queue:
                if self._order[slot] == order:
                    yield slot
                passed_over += bool(self._order[slot] == order)
            if self._queue is queue:
                self._queue = []
            if complete and passed_over == len(queue) < batch:
                return  # every slot was offered, none was taken
            batch = 2 * batch if passed_over == len(queue) else BATCH_SLOTS

    def _passed_over(self) -> int:
        """How many at the queue's front were taken or used: no call must look at them again."""
        stale = (i for i, (slot, order) in enumerate(self._queue) if self._order[slot] == order)
        return next(stale, len(self._queue))

    def heads_first(self, count: int) -> npt.NDArray[np.uint32]:
        """The ``count`` oldest slots (fewer if fewer are held), of equal stamps the shallowest
        first: in this order a prompt is saved from eviction without leaving a hole."""
        order = self._order ^ np.uint64(_DEPTH_MAX)
        last = min(count, len(order)) - 1
        oldest = np.argpartition(order, last)[: last + 1]
        held = oldest[self._order[oldest] != _ABSENT]
        named: npt.NDArray[np.uint32] = held[np.argsort(order[held])].astype(np.uint32)
        return named

    def _oldest(self, count: int) -> list[tuple[int, int]]:
        """The ``count`` oldest slots (fewer if fewer are held), oldest first, with their orders."""
        last = min(count, len(self._order)) - 1
        oldest = np.argpartition(self._order, last)[: last + 1]
        held = oldest[self._order[oldest] != _ABSENT]
        named = held[np.argsort(self._order[held])]
        return list(zip(named.tolist(), self._order[named].tolist(), strict=True))


def orders(
    stamps: npt.NDArray[np.uint64], depths: npt.NDArray[np.uint32]
) -> npt.NDArray[np.uint64]:
    """What slots are sorted by: the stamp, then the depth, deepest first."""
    inverse = _DEPTH_MAX - np.minimum(depths, _DEPTH_MAX)
    orders: npt.NDArray[np.uint64] = stamps << np.uint64(DEPTH_BITS) | inverse.astype(np.uint64)
    return orders
