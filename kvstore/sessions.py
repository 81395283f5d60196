"""Sessions: which clients of a node live, and which slots each of them is writing.

    bound                          of each session
    SESSION_DEAD_S                 without a beat
    RESERVATIONS_PER_SESSION_MAX   writes that it has not finished
    RESERVATION_S_MAX              how long it may take to finish one
    OPERATIONS_PER_SESSION_MAX     operations that go on side by side

What a session reserved and never finished is retired when the session ends, however it ends.
Driven from the node's one thread. Does not cover: how much it may read (``kvstore.leases``), what
is written (``kvstore.node``).
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import takewhile

from kvstore.clock import Clock
from kvstore.leases import Leases
from kvstore.table import Generations, Slots, SlotState
from kvstore.tiers.host import HostTier

log = logging.getLogger(__name__)

SESSIONS_MAX = 4096
RESERVATIONS_PER_SESSION_MAX = 4096
RESERVATION_S_MAX = 600.0
"""A writer that lives and has not said by then what became of its write never will."""
OPERATIONS_PER_SESSION_MAX = 16
"""An operation that so many others came after since its last call goes on with a newer stamp."""
SESSION_DEAD_S = 2.0
STALL_S = 0.5
"""What counts at most of the time between two ticks: for the rest the node itself stood still."""


@dataclass(slots=True)
class Session:
    """One client's; ``reserved`` says since when each slot is, in that order.

    ``stamps`` are those of its operations, by number, whose call came last at the end.
    """

    beat_s: float
    stamps: dict[int, int] = field(default_factory=dict)
    reserved: dict[int, float] = field(default_factory=dict)

    def may_reserve(self, count: int) -> bool:
        """Whether it may have so many more unfinished writes."""
        return len(self.reserved) + count <= RESERVATIONS_PER_SESSION_MAX


class Sessions:
    """All sessions of a node. Their numbers begin behind ``first``."""

    def __init__(self, tier: HostTier, leases: Leases, clock: Clock, first: int) -> None:
        self._tier = tier
        self._leases = leases
        self._clock = clock
        self._number = first
        self._sessions: dict[int, Session] = {}
        self._ticked_s = clock.monotonic_s()

    def __len__(self) -> int:
        return len(self._sessions)

    def __contains__(self, session: int) -> bool:
        return session in self._sessions

    def __iter__(self) -> Iterator[Session]:
        return iter(self._sessions.values())

    def get(self, session: int) -> Session | None:
        """``None`` for one that is unknown, or has ended."""
        return self._sessions.get(session)

    def open(self) -> int:
        """Start a session; it lives while it beats. Refuses, with 0, over ``SESSIONS_MAX``."""
        if len(self._sessions) >= SESSIONS_MAX:
            return 0
        self._number += 1
        self._sessions[self._number] = Session(self._clock.monotonic_s())
        return self._number

    def beat(self, session: int) -> bool:
        """Keep a session alive; ``False`` says that it is unknown (open a new one)."""
        found = self._sessions.get(session)
        if found is None:
            return False
        found.beat_s = self._clock.monotonic_s()
        return True

    def stamp_of(self, session: int, operation: int) -> int:
        """One LRU stamp for all calls of an operation; where no such session is, a new one."""
        found = self._sessions.get(session)
        if found is None:
            return self._tier.next_stamp()
        stamp = found.stamps.pop(operation, 0) or self._tier.next_stamp()
        found.stamps[operation] = stamp
        if len(found.stamps) > OPERATIONS_PER_SESSION_MAX:
            del found.stamps[next(iter(found.stamps))]
        return stamp

    def close(self, session: int) -> None:
        """End a session: its leases end, what it reserved and did not finish is retired."""
        found = self._sessions.pop(session, None)
        if found is None:
            return
        self._leases.end_all(session)
        for slot in found.reserved:
            self._tier.retire(slot)
        if found.reserved:
            log.warning(
                "session %d ended with %d unfinished writes: their memory is replaced",
                session,
                len(found.reserved),
            )

    def close_all(self) -> None:
        """End all sessions."""
        for session in list(self._sessions):
            self.close(session)

    def tick(self) -> None:
        """End sessions, leases and writes whose time is up."""
        now_s = self._clock.monotonic_s()
        late_s = now_s - self._ticked_s - STALL_S
        self._ticked_s = now_s
        if late_s > 0:
            # We stood still: beats that wait to be read must not count as missing.
            for session in self:
                session.beat_s = min(now_s, session.beat_s + late_s)
            self._leases.credit(late_s)
        dead = [s for s, v in self._sessions.items() if now_s - v.beat_s >= SESSION_DEAD_S]
        for session_id in dead:
            self.close(session_id)
        self._leases.tick(now_s)
        for session in self:
            self._end_forgotten(session, now_s)

    def owns(self, session: Session, slot: int, generation: int) -> bool:
        """Whether a session has reserved this slot, and may still write it."""
        return slot in session.reserved and self._tier.table.is_current(
            slot, generation, SlotState.RESERVED
        )

    def take(self, session: int, slots: Slots, generations: Generations) -> list[int]:
        """Take those slots from a session that it has reserved; the others are ignored."""
        found = self._sessions.get(session)
        if found is None:
            return []
        pairs = dict.fromkeys(zip(slots.tolist(), generations.tolist(), strict=True))
        owned = [slot for slot, generation in pairs if self.owns(found, slot, generation)]
        for slot in owned:
            del found.reserved[slot]
        return owned

    def _end_forgotten(self, session: Session, now_s: float) -> None:
        """Retire writes whose Commit, Abort or Abandon was lost on the way, or never sent."""
        oldest_s = now_s - RESERVATION_S_MAX
        over = list(takewhile(lambda slot: session.reserved[slot] < oldest_s, session.reserved))
        for slot in over:
            del session.reserved[slot]
            self._tier.retire(slot)
