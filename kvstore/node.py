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
from kvstore.key import Keys, as_keys
from kvstore.lasting import Lasting
from kvstore.leases import Leases
from kvstore.life import Life
from kvstore.replication import DEFAULT_PACE, Pace
from kvstore.sessions import Session, Sessions
from kvstore.suspects import Suspects
from kvstore.table import Cells, Generations, Slots, SlotState
from kvstore.tiers.behind import Behind
from kvstore.tiers.host import HostTier
from kvstore.tiers.offer import Offer
from kvstore.tiers.promotion import Promotion
from kvstore.tiers.tier import Commitment, Refusal, Suspicion

log = logging.getLogger(__name__)

_COMMITTED = {
    Commitment.STORED: CellOutcome.STORED,
    Commitment.DAMAGED: CellOutcome.DAMAGED,
    Commitment.NO_ROOM: CellOutcome.REFUSED,
    Commitment.DELETED: CellOutcome.LOST,
}


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
        lasting: Lasting | None = None,
        hold_bytes: int | None = None,
        pace: Pace = DEFAULT_PACE,
    ) -> None:
        self.identity = identity
        self.tier = tier
        self.behind = Behind.nothing(tier, clock) if behind is None else behind
        self._default_ttl_s = default_ttl_s
        self._clock = clock
        first = identity.incarnation << 32
        self._leases = Leases(tier, clock, first)
        self._sessions = Sessions(tier, self._leases, clock, first)
        self._suspects = Suspects()
        lasting = Lasting.nowhere() if lasting is None else lasting
        self.life = Life(tier, self.behind, clock, lasting, hold_bytes, identity.node_id, pace)

    def open_session(self) -> int:
        """Start a session; it lives while it beats. Answers 0 if there are too many."""
        return self._sessions.open()

    def beat(self, session: int) -> bool:
        """Keep a session alive; ``False`` says that it is unknown (open a new one)."""
        return self._sessions.beat(session)

    def seal(self) -> None:
        """No map names this node any more: nothing is found here, and no session goes on."""
        self.life.seal()
        self._sessions.close_all()

    def has_session(self, session: int) -> bool:
        """Whether a session goes on."""
        return session in self._sessions

    def close_session(self, session: int) -> None:
        """End a session: its leases end, what it reserved and did not finish is retired."""
        self._sessions.close(session)

    def tick(self) -> None:
        """End sessions and leases whose time is up, and let freed slots be used again."""
        self._take_uses()
        self._sessions.tick()
        self.tier.tick()
        self.behind.tick()
        self.life.tick()
        for damage in self._suspects.take(DAMAGED_PER_CALL_MAX):
            self._discard_one(damage)

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
        self._take_uses()
        stamp = self._sessions.stamp_of(request.session, request.operation)
        reply.refusals[:] = Refusal.NONE
        held = self.tier.find_for_writing(request.keys, request.cells)
        reply.outcomes[held.held] = CellOutcome.PRESENT
        rows, ttl_s = held.held, self._ttl_s(request)
        self._touch(request.keys, request.cells, held.slots, rows, stamp, ttl_s)
        offer = Offer(
            request.keys, request.cells, request.tokens, request.lengths, request.depths,
            request.spans, ttl_s, stamp,
        )  # fmt: skip
        absent = np.flatnonzero(~(held.held | self._refuse_buried(request, held.held, reply)))
        names = offer.rows(absent).names()
        if len(set(names)) == len(names) and session.may_reserve(len(names)):
            self._reserve(session, offer, absent, reply)
        else:
            for row in absent.reshape(-1, 1):
                self._reserve(session, offer, row, reply)
        self.behind.keep_ahead()
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
        mine: dict[int, int] = {}
        again: list[tuple[int, int]] = []
        for row, (slot, generation) in enumerate(
            zip(slots.tolist(), generations.tolist(), strict=True)
        ):
            if slot in mine and generation == int(generations[mine[slot]]):
                again.append((row, mine[slot]))
            elif self.tier.table.is_current(slot, generation, SlotState.COMMITTED):
                outcomes[row] = CellOutcome.STORED
            elif found is not None and self._sessions.owns(found, slot, generation):
                del found.reserved[slot]
                mine[slot] = row
        rows = list(mine.values())
        done = self.tier.commit_all(list(mine), header_digests[rows].tolist())
        outcomes[rows] = [_COMMITTED[one] for one in done]
        for row, first in again:
            if outcomes[first] == CellOutcome.STORED:
                outcomes[row] = CellOutcome.STORED
        return outcomes

    def abort(self, session: int, slots: Slots, generations: Generations) -> None:
        """The writer will not write these any more; unknown ones are ignored."""
        _check_count(len(slots))
        for slot in self._sessions.take(session, slots, generations):
            self.tier.abort(slot)

    def abandon(self, session: int, slots: Slots, generations: Generations) -> None:
        """The writer can't say whether bytes may still arrive in these: retire them."""
        _check_count(len(slots))
        for slot in self._sessions.take(session, slots, generations):
            self.tier.retire(slot)

    def begin_acquire(self, keys: Keys, cells: Cells) -> Promotion:
        """Bring up from the NVMe tier what is there only: done once ``behind.poll`` has made it so.

        To be followed by ``end_acquire``: until then what has come stays in the arena.
        """
        self._take_uses()
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

        What is whole stays: a reader's word alone deletes nothing. What somebody else uses is
        looked at when nobody does.
        """
        if len(damaged) > DAMAGED_PER_CALL_MAX:
            raise UsageError(f"{len(damaged)} damaged cells are over {DAMAGED_PER_CALL_MAX}")
        return sum(self._discard_one(one) for one in damaged)

    def touch(self, keys: Keys, mask: int, session: int = 0, operation: int = 0) -> int:
        """Say that a prompt was used: one stamp for all its cells. Returns how many are here.

        With a ``session`` it is part of that one's ``operation``: the cells get the stamp that all
        calls of it get, and none of them is worth more to the disk by it.
        """
        spread = every_cell(keys, mask)
        found = self.tier.find(*spread)
        stamp = self._sessions.stamp_of(session, operation)
        below = self._touch(*spread, found.slots, found.held, stamp, is_use=not session)
        return int((found.held | below).sum())

    def stats(self) -> NodeStats:
        """A snapshot of the counters."""
        life = self.life
        return NodeStats(
            host=self.tier.stats,
            nvme=self.behind.stats,
            sessions=len(self._sessions),
            leases=len(self._leases),
            metadata_bytes=self.tier.metadata_bytes()
            + self.behind.metadata_bytes()
            + life.holds.metadata_bytes(),
            holds=len(life.holds),
            promised_bytes=life.holds.promised_bytes,
            promisable_bytes=life.holds.promisable_bytes,
            burials=len(life.burials),
            is_sealed=life.is_sealed,
            short_holds=life.holds.short,
            copied_cells=life.replication.copied_cells,
        )

    def drain_changes(self) -> Changes:
        """Cells that came and went since the last call, in order, for the directory."""
        return self.life.drain_changes()

    def snapshot(self) -> Changes:
        """Everything that may be found, as if it had just come."""
        return self.life.snapshot()

    def _take_uses(self) -> None:
        """Touch what was read without a word, as one use for each read."""
        records = self.tier.table.slots
        for noted in self.tier.uses.take():
            slots = noted[records["state"][noted] == SlotState.COMMITTED]
            if not len(slots):
                continue
            keys, every = self.tier.table.keys_of(slots), np.ones(len(slots), np.bool_)
            self._touch(keys, records["cell"][slots], slots, every, self.tier.next_stamp())

    def _touch(
        self,
        keys: Keys,
        cells: Cells,
        slots: Slots,
        rows: npt.NDArray[np.bool_],
        stamp: int,
        ttl_s: int | None = None,
        is_use: bool = True,
    ) -> npt.NDArray[np.bool_]:
        """Cells were used, those of ``rows`` from the arena. Answers which are on the disk."""
        self.tier.touch(slots[rows], stamp, ttl_s)
        below = self.behind.touch(keys, cells, stamp, ttl_s)
        if is_use:
            self.behind.want(slots[rows & ~below])
        return below

    def _ttl_s(self, request: ReserveRequest) -> int:
        return self._default_ttl_s if request.ttl_s is None else request.ttl_s

    def _refuse_buried(
        self, request: ReserveRequest, held: npt.NDArray[np.bool_], reply: ReserveReply
    ) -> npt.NDArray[np.bool_]:
        """Copies from elsewhere of what was deleted, which their sender has not heard of."""
        if request.burials is None:
            return np.zeros(len(held), np.bool_)
        buried = ~held & (self.life.newest_deletes(request.keys) > request.burials)
        reply.refusals[buried] = Refusal.BURIED
        return buried

    def _reserve(
        self, session: Session, offer: Offer, rows: npt.NDArray[np.intp], reply: ReserveReply
    ) -> None:
        """Give slots to these rows: cells that are not here, none of them twice."""
        names = offer.rows(rows).names()
        is_busy = np.array([self.tier.is_writing(*name) for name in names], np.bool_)
        reply.outcomes[rows[is_busy]] = CellOutcome.BUSY
        rows = rows[~is_busy]
        possible = offer.rows(rows).are_possible()
        reply.refusals[rows[~possible]] = Refusal.BAD_REQUEST
        rows = rows[possible]
        if not session.may_reserve(len(rows)):
            reply.refusals[rows] = Refusal.QUOTA
            return
        reserved = self.tier.reserve_all(offer.rows(rows))
        reply.refusals[rows] = reserved.refusals
        is_reserved = reserved.refusals == Refusal.NONE
        rows, slots = rows[is_reserved], reserved.slots[is_reserved]
        session.reserved |= dict.fromkeys(slots.tolist(), self._clock.monotonic_s())
        records = self.tier.table.slots[slots]
        reply.outcomes[rows] = CellOutcome.RESERVED
        reply.slots[rows] = slots
        reply.generations[rows] = records["generation"]
        reply.offsets[rows] = records["offset"]

    def _discard_one(self, damage: Damage) -> bool:
        key = as_keys(damage.key)
        found = self.tier.table.find(key, np.array([damage.cell], np.uint8))
        if not found.held[0]:
            return False
        suspicion = self.life.holds.discard(int(found.slots[0]), damage.leaf_bytes)
        if suspicion is Suspicion.OPEN:
            self._suspects.add(damage)
        elif suspicion is Suspicion.RIGHT:
            self.behind.drop(key)
            log.warning("the cell in slot %d was damaged: it is dropped", found.slots[0])
        return suspicion is Suspicion.RIGHT


def _check_count(count: int) -> None:
    if count > MAX_CELLS_PER_CALL:
        raise UsageError(f"{count} cells in one call are over {MAX_CELLS_PER_CALL}: split it")
