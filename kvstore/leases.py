"""Leases: cells that sessions keep from being evicted, until when, and how many at most.

    bound                          of each session
    LEASES_PER_SESSION_MAX         leases that have not ended
    PINNED_SHARE_MAX               of the tier's capacity, each cell counted once, or a single cell
    LEASE_MS_MAX                   how long a lease can be asked for

A session that does not release what it leases stops being given more, so that it never has the
whole tier. Driven from the node's one thread. Does not cover: which sessions live
(``kvstore.node``), what a pin does (``kvstore.tiers.host``).
"""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kvstore.clock import Clock
from kvstore.table import Found
from kvstore.tiers.host import HostTier

LEASES_PER_SESSION_MAX = 256
PINNED_SHARE_MAX = 0.5
LEASE_MS_MAX = 60_000
LEASE_MARGIN_S = 0.5
"""The owner keeps cells this much longer than the reader believes."""


@dataclass(slots=True)
class _Lease:
    session: int
    until_s: float
    slots: list[int]


@dataclass(slots=True)
class _Holdings:
    """What one session has under lease; ``pinned`` counts its leases of each slot."""

    leases: set[int] = field(default_factory=set)
    pinned: Counter[int] = field(default_factory=Counter)
    pinned_bytes: int = 0


class Leases:
    """All leases of a node. Numbers of leases begin behind ``first``."""

    def __init__(self, tier: HostTier, clock: Clock, first: int) -> None:
        self._tier = tier
        self._clock = clock
        self._number = first
        self._leases: dict[int, _Lease] = {}
        self._holdings: dict[int, _Holdings] = {}

    def __len__(self) -> int:
        return len(self._leases)

    def grant(self, session: int, found: Found, lease_ms: int) -> tuple[int, npt.NDArray[np.bool_]]:
        """Lease the leading held cells, as many as the bounds allow.

        Answers the lease, 0 if there is none, and which cells it is for.
        """
        holdings = self._holdings.setdefault(session, _Holdings())
        granted = self._allowed(holdings, found)
        slots: list[int] = found.slots[granted].tolist()
        if not slots:
            self._forget_empty(session)
            return 0, granted
        self._tier.pin(slots)
        self._number += 1
        until_s = self._clock.monotonic_s() + min(lease_ms, LEASE_MS_MAX) / 1000
        self._leases[self._number] = _Lease(session, until_s + LEASE_MARGIN_S, slots)
        holdings.leases.add(self._number)
        return self._number, granted

    def release(self, session: int, lease: int) -> None:
        """End a lease early; an unknown one, or another session's, is ignored."""
        found = self._leases.get(lease)
        if found is not None and found.session == session:
            self._end(lease)

    def end_all(self, session: int) -> None:
        """End the leases of a session that ends itself."""
        if session in self._holdings:
            for lease in list(self._holdings[session].leases):
                self._end(lease)

    def credit(self, seconds: float) -> None:
        """Make all leases longer, because the node stood still."""
        for lease in self._leases.values():
            lease.until_s += seconds

    def tick(self, now_s: float) -> None:
        """End the leases whose time is up."""
        over = [number for number, lease in self._leases.items() if lease.until_s <= now_s]
        for number in over:
            self._end(number)

    def _allowed(self, holdings: _Holdings, found: Found) -> npt.NDArray[np.bool_]:
        """Which cells a session may lease; they count as its own from now on."""
        allowed = np.zeros(len(found.held), np.bool_)
        if len(holdings.leases) >= LEASES_PER_SESSION_MAX:
            return allowed
        limit_bytes = PINNED_SHARE_MAX * self._tier.stats.capacity_bytes
        for row in np.flatnonzero(found.held).tolist():
            slot = int(found.slots[row])
            more_bytes = 0 if slot in holdings.pinned else self._size_bytes(slot)
            if holdings.pinned and more_bytes and holdings.pinned_bytes + more_bytes > limit_bytes:
                break
            holdings.pinned[slot] += 1
            holdings.pinned_bytes += more_bytes
            allowed[row] = True
        return allowed

    def _end(self, number: int) -> None:
        lease = self._leases.pop(number)
        self._tier.unpin(lease.slots)
        holdings = self._holdings[lease.session]
        holdings.leases.discard(number)
        for slot in lease.slots:
            holdings.pinned[slot] -= 1
            if not holdings.pinned[slot]:
                del holdings.pinned[slot]
                holdings.pinned_bytes -= self._size_bytes(slot)
        self._forget_empty(lease.session)

    def _forget_empty(self, session: int) -> None:
        if not self._holdings[session].leases:
            del self._holdings[session]

    def _size_bytes(self, slot: int) -> int:
        return int(self._tier.table.slots[slot]["size_bytes"])
