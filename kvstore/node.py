"""A storage node's authority over its cells: sessions, reservations, leases. No I/O.

    client                        node                                   host tier
    open session  ──────────────> session, kept alive by beats
    Reserve(keys) ──────────────> present / busy / refused / slot        RESERVED
    writes the slot in place
    Commit(slot, generation) ───> header checked, visible                COMMITTED
    Acquire(keys) ──────────────> descriptors under a lease              pinned
                                  (``begin_acquire``: brought up from the NVMe tier before)
    reads, Release(lease) ──────> lease ends                             unpinned

What a session reserved and never finished is retired when the session ends, however it ends: only
the writer's own Commit or Abort makes an offset reusable. Looking up does not pin and does not
touch. Every answer is an explicit outcome per cell.

The class is plain and driven by one thread; ``kvstore.rpc`` serves it over gRPC, the embedded
client calls it directly. Does not cover: bytes (``kvstore.transport``), where else a cell is
(``kvstore.directory``).
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile

import numpy as np
import numpy.typing as npt

from kvstore.calls import (
    DAMAGED_PER_CALL_MAX,
    MAX_CELLS_PER_CALL,
    AcquireReply,
    CellOutcome,
    Damage,
    NodeIdentity,
    NodeStats,
    Outcomes,
    ReserveReply,
    ReserveRequest,
    every_cell,
)
from kvstore.changes import Changes
from kvstore.clock import Clock
from kvstore.errors import UsageError
from kvstore.key import KEY_BYTES, Keys
from kvstore.leases import Leases
from kvstore.table import Cells, Generations, Slots, SlotState
from kvstore.tiers.behind import Behind
from kvstore.tiers.host import HostTier
from kvstore.tiers.promotion import Promotion
from kvstore.tiers.tier import Commitment, NewCell, Refusal

log = logging.getLogger(__name__)

SESSIONS_MAX = 4096
RESERVATIONS_PER_SESSION_MAX = 4096
RESERVATION_S_MAX = 600.0
"""A writer that lives and has not said by then what became of its write never will."""
SESSION_DEAD_S = 2.0
STALL_S = 0.5
"""What counts at most of the time between two ticks: for the rest the node itself stood still."""

_COMMITTED = {
    Commitment.STORED: CellOutcome.STORED,
    Commitment.DAMAGED: CellOutcome.DAMAGED,
    Commitment.NO_ROOM: CellOutcome.REFUSED,
}


@dataclass(slots=True)
class _Session:
    beat_s: float
    operation: int = -1
    stamp: int = 0
    reserved: dict[int, float] = field(default_factory=dict)
    """Since when each slot is, in that order."""


class Node:
    """One storage node's state machine. Call it from one thread, ``tick`` every 100 ms or so.

    ``default_ttl_s`` is for puts that do not say how long their blocks are to live, ``behind`` the
    NVMe tier, if there is one.
    """

    def __init__(
        self,
        identity: NodeIdentity,
        tier: HostTier,
        clock: Clock,
        default_ttl_s: int = 0,
        behind: Behind | None = None,
    ) -> None:
        self.identity = identity
        self.tier = tier
        self.behind = Behind.nothing(tier, clock) if behind is None else behind
        self._default_ttl_s = default_ttl_s
        self._clock = clock
        self._sessions: dict[int, _Session] = {}
        self._next_id = identity.incarnation << 32
        self._leases = Leases(tier, clock, self._next_id)
        self._ticked_s = clock.monotonic_s()

    def open_session(self) -> int:
        """Start a session; it lives while it beats. Refuses, with 0, over ``SESSIONS_MAX``."""
        if len(self._sessions) >= SESSIONS_MAX:
            return 0
        self._next_id += 1
        self._sessions[self._next_id] = _Session(self._clock.monotonic_s())
        return self._next_id

    def beat(self, session: int) -> bool:
        """Keep a session alive; ``False`` says that it is unknown (open a new one)."""
        found = self._sessions.get(session)
        if found is None:
            return False
        found.beat_s = self._clock.monotonic_s()
        return True

    def close_session(self, session: int) -> None:
        """End a session: its leases end, what it reserved and did not finish is retired."""
        found = self._sessions.pop(session, None)
        if found is None:
            return
        self._leases.end_all(session)
        for slot in found.reserved:
            self.tier.retire(slot)
        if found.reserved:
            log.warning(
                "session %d ended with %d unfinished writes: their memory is replaced",
                session,
                len(found.reserved),
            )

    def tick(self) -> None:
        """End sessions and leases whose time is up, and let freed slots be used again."""
        now_s = self._clock.monotonic_s()
        late_s = now_s - self._ticked_s - STALL_S
        self._ticked_s = now_s
        if late_s > 0:
            # We stood still: beats that wait to be read must not count as missing.
            for session in self._sessions.values():
                session.beat_s = min(now_s, session.beat_s + late_s)
            self._leases.credit(late_s)
        dead = [s for s, v in self._sessions.items() if now_s - v.beat_s >= SESSION_DEAD_S]
        for session_id in dead:
            self.close_session(session_id)
        self._leases.tick(now_s)
        for session in self._sessions.values():
            self._end_forgotten(session, now_s)
        self.tier.tick()
        self.behind.tick()

    def lookup(self, keys: Keys, mask: int) -> int:
        """How many leading blocks have all cells of ``mask`` here."""
        if not len(keys):
            return 0
        each = mask.bit_count()
        spread = every_cell(keys, mask)
        held = self.tier.find(*spread).held | self.behind.find(*spread)
        holes = np.flatnonzero(~held)
        return len(keys) if not len(holes) else int(holes[0]) // each

    def reserve(self, request: ReserveRequest) -> ReserveReply:
        """Give slots to the cells that are neither here nor being written; touch what is here."""
        count = len(request.keys)
        _check_count(count)
        reply = ReserveReply(
            outcomes=np.full(count, CellOutcome.REFUSED, np.uint8),
            refusals=np.full(count, Refusal.SESSION, np.uint8),
            slots=np.zeros(count, np.uint32),
            generations=np.zeros(count, np.uint64),
            offsets=np.zeros(count, np.uint64),
        )
        session = self._sessions.get(request.session)
        if session is None:
            return reply
        if session.operation != request.operation:
            session.operation = request.operation
            session.stamp = self.tier.next_stamp()
        reply.refusals[:] = Refusal.NONE
        held = self.tier.find_for_writing(request.keys, request.cells)
        reply.outcomes[held.held] = CellOutcome.PRESENT
        rows, ttl_s = held.held, self._ttl_s(request)
        self._touch(request.keys, request.cells, held.slots, rows, session.stamp, ttl_s)
        for row in np.flatnonzero(~held.held).tolist():
            self._reserve_one(session, request, row, reply)
        return reply

    def commit(
        self,
        session: int,
        slots: Slots,
        generations: Generations,
        header_digests: npt.NDArray[np.uint64],
    ) -> Outcomes:
        """Make written slots visible. Committing the same slot again answers STORED again."""
        _check_count(len(slots))
        outcomes = np.full(len(slots), CellOutcome.LOST, np.uint8)
        found = self._sessions.get(session)
        for row, (slot, generation) in enumerate(
            zip(slots.tolist(), generations.tolist(), strict=True)
        ):
            if self.tier.table.is_current(slot, generation, SlotState.COMMITTED):
                outcomes[row] = CellOutcome.STORED
            elif found is not None and self._owns(found, slot, generation):
                del found.reserved[slot]
                outcomes[row] = _COMMITTED[self.tier.commit(slot, int(header_digests[row]))]
        return outcomes

    def abort(self, session: int, slots: Slots, generations: Generations) -> None:
        """The writer will not write these any more; unknown ones are ignored."""
        for slot in self._owned(session, slots, generations):
            self.tier.abort(slot)

    def abandon(self, session: int, slots: Slots, generations: Generations) -> None:
        """The writer can't say whether bytes may still arrive in these: retire them."""
        for slot in self._owned(session, slots, generations):
            self.tier.retire(slot)

    def begin_acquire(self, keys: Keys, cells: Cells) -> Promotion:
        """Bring up from the NVMe tier what is there only: done once ``behind.poll`` has made it so.

        To be followed by ``end_acquire``: until then what has come stays in the arena.
        """
        return self.behind.begin(keys, cells)

    def end_acquire(self, promotion: Promotion) -> None:
        """What was brought up is leased, or nobody wants it any more."""
        self.behind.end(promotion)

    def acquire(
        self,
        session: int,
        keys: Keys,
        cells: Cells,
        lease_ms: int,
        promotion: Promotion | None = None,
    ) -> AcquireReply:
        """Lease what is held of ``keys``; what is not is a MISS. Touches what it leases.

        What the session may not lease, because it is unknown or has too much under lease, is
        REFUSED, and so is what has not come up from the NVMe tier: that says nothing of what is
        here.
        """
        _check_count(len(keys))
        if session in self._sessions:
            # What has expired goes: announced still, it would hide another node's living copy.
            self.tier.find_for_writing(keys, cells)
        found = self.tier.find(keys, cells)
        outcomes = np.full(len(keys), CellOutcome.REFUSED, np.uint8)
        lease = 0
        if session in self._sessions:
            lease, granted = self._leases.grant(session, found, lease_ms)
            outcomes[granted] = CellOutcome.FOUND
            outcomes[~(found.held | self.behind.find(keys, cells))] = CellOutcome.MISS
        if lease:
            self._touch(keys, cells, found.slots, granted, self.tier.next_stamp())
        loaded = np.zeros(len(keys), np.bool_) if promotion is None else promotion.loaded
        return AcquireReply(
            lease, outcomes, found.slots, found.generations, found.offsets, found.lengths,
            found.header_digests, loaded,
        )  # fmt: skip

    def release(self, session: int, lease: int) -> None:
        """End a lease early; an unknown one, or another session's, is ignored."""
        self._leases.release(session, lease)

    def discard(self, damaged: Sequence[Damage]) -> int:
        """Drop those of the cells that are damaged indeed; returns how many.

        What is whole, or under a lease, stays: a reader's word alone deletes nothing.
        """
        if len(damaged) > DAMAGED_PER_CALL_MAX:
            raise UsageError(f"{len(damaged)} damaged cells are over {DAMAGED_PER_CALL_MAX}")
        return sum(self._discard_one(one) for one in damaged)

    def touch(self, keys: Keys, mask: int) -> int:
        """Say that a prompt was used: one stamp for all its cells. Returns how many are here."""
        spread = every_cell(keys, mask)
        found = self.tier.find(*spread)
        below = self._touch(*spread, found.slots, found.held, self.tier.next_stamp())
        return int((found.held | below).sum())

    def stats(self) -> NodeStats:
        """A snapshot of the counters."""
        metadata_bytes = self.tier.metadata_bytes() + self.behind.metadata_bytes()
        return NodeStats(
            self.tier.stats, self.behind.stats, len(self._sessions), len(self._leases),
            metadata_bytes,
        )  # fmt: skip

    def drain_changes(self) -> Changes:
        """Cells that came and went since the last call, in order, for the directory."""
        return self.behind.drain_changes()

    def snapshot(self) -> Changes:
        """Everything that is held, as if it had just come."""
        return self.behind.snapshot()

    def _touch(
        self,
        keys: Keys,
        cells: Cells,
        slots: Slots,
        rows: npt.NDArray[np.bool_],
        stamp: int,
        ttl_s: int | None = None,
    ) -> npt.NDArray[np.bool_]:
        """Cells were used, those of ``rows`` from the arena. Answers which are on the disk."""
        self.tier.touch(slots[rows], stamp, ttl_s)
        below = self.behind.touch(keys, cells, ttl_s)
        self.behind.want(slots[rows & ~below])
        return below

    def _ttl_s(self, request: ReserveRequest) -> int:
        return self._default_ttl_s if request.ttl_s is None else request.ttl_s

    def _reserve_one(
        self, session: _Session, request: ReserveRequest, row: int, reply: ReserveReply
    ) -> None:
        new = NewCell(
            key=request.keys[row].tobytes(),
            cell=int(request.cells[row]),
            tokens=int(request.tokens[row]),
            length=int(request.lengths[row]),
            depth=int(request.depths[row]),
            span=int(request.spans[row]),
            ttl_s=self._ttl_s(request),
        )
        if self.tier.is_writing(new.key, new.cell):
            reply.outcomes[row] = CellOutcome.BUSY
            return
        refusal = Refusal.NONE if new.is_possible else Refusal.BAD_REQUEST
        if refusal is Refusal.NONE and len(session.reserved) >= RESERVATIONS_PER_SESSION_MAX:
            refusal = Refusal.QUOTA
        slot = self.tier.reserve(new, session.stamp) if refusal is Refusal.NONE else refusal
        if isinstance(slot, Refusal):
            reply.refusals[row] = slot
            return
        session.reserved[slot] = self._clock.monotonic_s()
        record = self.tier.table.slots[slot]
        reply.outcomes[row] = CellOutcome.RESERVED
        reply.slots[row] = slot
        reply.generations[row] = record["generation"]
        reply.offsets[row] = record["offset"]

    def _end_forgotten(self, session: _Session, now_s: float) -> None:
        """Retire writes whose Commit, Abort or Abandon was lost on the way, or never sent."""
        oldest_s = now_s - RESERVATION_S_MAX
        over = list(takewhile(lambda slot: session.reserved[slot] < oldest_s, session.reserved))
        for slot in over:
            del session.reserved[slot]
            self.tier.retire(slot)

    def _discard_one(self, damage: Damage) -> bool:
        key = np.frombuffer(damage.key, np.uint8).reshape(1, KEY_BYTES)
        found = self.tier.table.find(key, np.array([damage.cell], np.uint8))
        if not found.held[0] or int(found.generations[0]) != damage.generation:
            return False
        dropped = self.tier.discard(int(found.slots[0]), damage.leaf_bytes)
        if dropped:
            self.behind.drop(key)
            log.warning("the cell in slot %d was damaged: it is dropped", found.slots[0])
        return dropped

    def _owned(self, session: int, slots: Slots, generations: Generations) -> list[int]:
        """Take those slots from a session that it has reserved; the others are ignored."""
        _check_count(len(slots))
        found = self._sessions.get(session)
        if found is None:
            return []
        pairs = dict.fromkeys(zip(slots.tolist(), generations.tolist(), strict=True))
        owned = [slot for slot, generation in pairs if self._owns(found, slot, generation)]
        for slot in owned:
            del found.reserved[slot]
        return owned

    def _owns(self, session: _Session, slot: int, generation: int) -> bool:
        return slot in session.reserved and self.tier.table.is_current(
            slot, generation, SlotState.RESERVED
        )


def _check_count(count: int) -> None:
    if count > MAX_CELLS_PER_CALL:
        raise UsageError(f"{count} cells in one call are over {MAX_CELLS_PER_CALL}: split it")
