"""Holds: what a node has promised to keep, to whom, until when.

    bound             of
    HOLDS_MAX         holds of a node
    hold_bytes        the arena, for one tenant's holds; else ``TENANT_SHARE`` of it
    ALL_SHARE_MAX     the arena, for the holds of all tenants together

Two holds of one tenant on a cell count its bytes once. A cell lives at least as long as its holds.
A hold ends by itself; what is deleted, or turns out damaged, leaves it before that. The erasure of
its tenant ends it, unless it is of the epoch that began then, or of a later one.

Another node may ask for a copy of a hold of its own (``carry``): it is a hold like any other,
within the same budget, and has its granter's id in its name. Up to which grant a hold with copies
was released is remembered for as long as it would have lasted, so that neither a node that was away
nor a message that is late brings it back.

Does not cover: where a cell is kept (``kvstore.protection``), holds on disk
(``kvstore.hold_files``), who is asked to carry (``kvstore.replication``), readers
(``kvstore.leases``).
"""

import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from kvstore.block import HEADER_BYTES
from kvstore.calls import (
    CARRY_CELLS_MAX,
    HOLD_KEYS_MAX,
    REPLICAS_MAX,
    CarryReply,
    CarryRequest,
    CopyState,
    HoldMark,
    HoldOutcome,
    HoldReply,
    HoldRequest,
    every_cell,
)
from kvstore.clock import Clock
from kvstore.errors import UsageError
from kvstore.hold import Hold, Name, Rows, check_promise, distinct_bytes
from kvstore.hold_files import HoldFiles
from kvstore.key import Keys, as_keys
from kvstore.lasting import Lasting
from kvstore.protection import Protection
from kvstore.tiers.behind import Behind
from kvstore.tiers.host import HostTier
from kvstore.tiers.nvme.record import PAGE_BYTES
from kvstore.tiers.tier import Suspicion

log = logging.getLogger(__name__)

HOLDS_MAX = 4096
TENANT_SHARE = 0.25
ALL_SHARE_MAX = 0.5
SETTLE_S = 1.0
"""How often it is looked where what is promised has got to."""
CLOCK_SET_MS = 500
"""Two clocks that run drift apart by less between two ticks."""
LATER_S = 5.0
"""So much longer a copy must be asked for before that is news: each call takes its time."""


class Holds:
    """All holds of a node, and what they keep. ``hold_bytes`` is what one tenant may hold."""

    def __init__(
        self,
        host: HostTier,
        behind: Behind,
        clock: Clock,
        lasting: Lasting,
        hold_bytes: int | None,
        node_id: str,
    ) -> None:
        capacity_bytes = host.stats.capacity_bytes
        self.tenant_bytes_max = int(TENANT_SHARE * capacity_bytes)
        if hold_bytes is not None:
            self.tenant_bytes_max = hold_bytes
        self.promisable_bytes = int(ALL_SHARE_MAX * capacity_bytes)
        """What may be promised to all tenants together."""
        self.promised_bytes = 0
        self._host = host
        self._behind = behind
        self._clock = clock
        self._node_id = node_id
        self._grants = itertools.count(host.incarnation << 32)
        """Later ones than those of all its former lives."""
        self._protection = Protection(host, behind)
        self._files = HoldFiles(lasting, clock)
        found = self._files.read()
        self._holds = {hold.name: hold for hold in found if len(hold)}
        self._released = {mark.name: mark for mark in found if not len(mark)}
        self._states: dict[Name, CopyState] = {}
        self._settled_s = clock.monotonic_s()
        self._apart_ms = self._clocks_apart_ms()
        self._recount()
        behind.follow(self._recount)

    def __len__(self) -> int:
        return len(self._holds)

    def grant(self, request: HoldRequest) -> HoldReply:
        """Promise to keep cells, all of them or none."""
        check_promise(request)
        if not 0 < len(request.keys) <= HOLD_KEYS_MAX:
            raise UsageError(f"a hold is for 1 to {HOLD_KEYS_MAX} blocks, not {len(request.keys)}")
        if not 0 < request.replicas <= REPLICAS_MAX:
            raise UsageError(f"a hold has 1 to {REPLICAS_MAX} copies, not {request.replicas}")
        asked = self._asked(request)
        outcome = HoldOutcome.NOT_HELD
        if asked is not None and not self._is_over(asked):
            outcome = self._enter(asked)
        return self.reply(request.tenant, outcome)

    def reply(self, tenant: bytes, outcome: HoldOutcome) -> HoldReply:
        """The answer to a tenant."""
        held_bytes = distinct_bytes(self._of(tenant))
        return HoldReply(outcome, held_bytes, self.tenant_bytes_max)

    def carry(self, request: CarryRequest) -> CarryReply:
        """Keep what is here of another node's hold, and say what is not; or decline all of it."""
        asked = self._carried(request)
        wanted = np.zeros(len(asked), np.bool_)
        if self._is_over(asked):
            return CarryReply(HoldOutcome.RELEASED, wanted)
        news = ~asked.within(
            hold
            for hold in self._of(request.tenant)
            if hold.name == asked.name
            and hold.grant >= asked.grant
            and hold.until_s >= asked.until_s - LATER_S
        )
        if not news.any():
            return CarryReply(HoldOutcome.GRANTED, wanted)
        wanted = news & ~self.are_here(asked)
        more_bytes = 0 if asked.name in self._holds else request.more_bytes
        if (refusal := self._refusal(asked.select(news), more_bytes)) is not None:
            return CarryReply(refusal, wanted)
        here = asked.select(news & ~wanted)
        return CarryReply(self._enter(here) if len(here) else HoldOutcome.GRANTED, wanted)

    def release(self, tenant: bytes, handle: str) -> bool:
        """End a hold early, and what is carried of it for others; ``False`` if there is none."""
        gone = [hold for hold in self._of(tenant) if hold.handle == handle]
        for hold in gone:
            self.end(hold)
            if hold.replicas > 1:
                self._remember_release(hold)
        return bool(gone)

    def end_erased(self, epoch_of: Callable[[bytes], int]) -> None:
        """End those that are of an epoch of before their tenants' last erasure."""
        for hold in list(self._holds.values()):
            if hold.tenant_epoch < epoch_of(hold.tenant):
                self.end(hold)

    def end(self, hold: Hold) -> None:
        """A hold is over, unless it has become another one meanwhile."""
        if self._holds.get(hold.name) is not hold:
            return
        del self._holds[hold.name]
        self._states.pop(hold.name, None)
        self._protection.take(hold.keys, hold.cells, self._clock.wall_ms())
        self._files.remove(hold)
        self._count()

    def with_copies(self) -> list[Hold]:
        """Those that are to have copies on other nodes."""
        return [hold for hold in self._holds.values() if hold.replicas > 1]

    def meet(self, hold: Hold, partner: str) -> Hold:
        """Remember which node has the copy of a hold; the hold as it is then."""
        if self._holds.get(hold.name) is not hold or hold.partner == partner:
            return hold
        met = self._holds[hold.name] = replace(hold, partner=partner)
        try:
            self._files.write(met)
        except OSError as fault:
            log.warning("after a restart, %r may be copied once more: %s", hold.handle, fault)
        return met

    def note_copies(self, hold: Hold, state: CopyState) -> None:
        """Remember how it is about a hold's copies, while there is one."""
        if hold.name in self._holds:
            self._states[hold.name] = state

    @property
    def short(self) -> int:
        """How many holds have fewer copies than were asked for."""
        return sum(self._state(hold) is not CopyState.COMPLETE for hold in self.with_copies())

    def are_here(self, hold: Hold) -> Rows:
        """Which of its cells can be read here, as far as that is known."""
        above = self._host.find(hold.keys, hold.cells).held
        here: Rows = above | self._behind.find(hold.keys, hold.cells)
        return here

    def lose(self, keys: Keys) -> None:
        """These blocks are about to be deleted: no promise is about them any more."""
        for hold in list(self._holds.values()):
            rows = hold.on(keys)
            if rows.any():
                gone = hold.select(rows)
                self._protection.take(gone.keys, gone.cells, self._clock.wall_ms())
                self._keep(hold.select(~rows))
        self._count()

    def of_tenant(self, tenant: bytes) -> list[HoldMark]:
        """A tenant's holds."""
        return self._marks(self._of(tenant))

    def on(self, keys: Keys) -> tuple[HoldMark, ...]:
        """The holds that cover any of these blocks."""
        return tuple(self._marks([hold for hold in self._holds.values() if hold.on(keys).any()]))

    def tick(self) -> None:
        """End the holds whose time is up, and see to it that each cell is protected somewhere."""
        now_s = self._clock.monotonic_s()
        for hold in [hold for hold in self._holds.values() if hold.until_s <= now_s]:
            self.end(hold)
        for mark in [mark for mark in self._released.values() if mark.until_s <= now_s]:
            del self._released[mark.name]
            self._files.remove(mark)
        is_set = self._is_clock_set()
        if self._holds and (is_set or now_s - self._settled_s >= SETTLE_S):
            self._settled_s = now_s
            if is_set or not self._protection.settle():
                self._recount()

    def discard(self, slot: int, leaf_bytes: Sequence[int]) -> Suspicion:
        """``HostTier.discard``, of a cell that may be promised: damaged, it keeps nobody's."""
        count = self._protection.lift(slot)
        found = self._host.discard(slot, leaf_bytes)
        self._protection.lower(slot, count, is_whole=found is not Suspicion.RIGHT)
        return found

    def metadata_bytes(self) -> int:
        """Memory for bookkeeping."""
        return self._protection.nbytes

    def _is_clock_set(self) -> bool:
        """Whether the wall clock was set since this was asked last.

        A promise lasts by the monotonic clock, and what it keeps must not expire by the other one.
        """
        before_ms, self._apart_ms = self._apart_ms, self._clocks_apart_ms()
        return abs(self._apart_ms - before_ms) > CLOCK_SET_MS

    def _clocks_apart_ms(self) -> float:
        return self._clock.wall_ms() - 1000 * self._clock.monotonic_s()

    def _enter(self, asked: Hold) -> HoldOutcome:
        """Promise cells that are here, besides what the hold of that name has already."""
        refusal = self._refusal(asked)
        if refusal is not None:
            return refusal
        former = self._holds.get(asked.name)
        hold = asked if former is None else former.joined(asked)
        try:
            self._files.write(hold)
        except OSError as fault:
            log.warning("a hold is declined, it could not be written down: %s", fault)
            return HoldOutcome.FAILED
        if former is not None:
            self._protection.take(former.keys, former.cells, self._clock.wall_ms())
        self._protection.add(hold.keys, hold.cells, self._until_ms(hold))
        self._keep(hold)
        self._states.pop(hold.name, None)  # what is new in it has no copy yet
        self._count()
        return HoldOutcome.GRANTED

    def _refusal(self, asked: Hold, more_bytes: int = 0) -> HoldOutcome | None:
        """Why these cells, and so much besides, can't be promised as well, if they can't."""
        former = self._holds.get(asked.name)
        if former is None and len(self._holds) >= HOLDS_MAX:
            return HoldOutcome.TOO_MANY
        hold = asked if former is None else former.joined(asked)
        return None if self._has_budget(hold, more_bytes) else HoldOutcome.OVER_BUDGET

    def _is_over(self, asked: Hold) -> bool:
        """Whether it was released, or is in a later epoch already: its tenant was erased since."""
        former = self._holds.get(asked.name)
        is_erased = former is not None and asked.tenant_epoch < former.tenant_epoch
        return is_erased or asked.grant <= self._last_released(asked.name)

    def _has_budget(self, hold: Hold, more_bytes: int) -> bool:
        """Whether what the tenant would hold then is no more than it may, or than now."""
        now = self._of(hold.tenant)
        others = [one for one in now if one.name != hold.name]
        bytes_now, bytes_then = distinct_bytes(now), distinct_bytes([*others, hold]) + more_bytes
        if bytes_then <= bytes_now:
            return True
        others_bytes = self.promised_bytes - bytes_now
        within = others_bytes + bytes_then <= self.promisable_bytes
        return within and bytes_then <= self.tenant_bytes_max

    def _asked(self, request: HoldRequest) -> Hold | None:
        """What is asked for as a hold of its own, ``None`` if some of it is not here."""
        distinct = dict.fromkeys(key.tobytes() for key in request.keys)
        keys, cells = every_cell(as_keys(b"".join(distinct)), request.mask)
        above = self._host.find(keys, cells)
        if not (above.held | self._behind.find(keys, cells)).all():
            return None
        lengths = np.where(above.held, above.lengths, self._behind.locate(keys, cells).lengths)
        pages = -(-(lengths.astype(np.int64) + HEADER_BYTES) // PAGE_BYTES)
        until_s = self._clock.monotonic_s() + request.ttl_ms / 1000
        released = self._last_released((request.tenant, request.handle, self._node_id))
        return Hold(
            request.tenant, request.handle, keys, cells, (pages * PAGE_BYTES).astype(np.uint64),
            request.ttl_ms, until_s, self._node_id, next(self._grants), released, request.replicas,
            tenant_epoch=request.tenant_epoch,
        )  # fmt: skip

    def _carried(self, request: CarryRequest) -> Hold:
        """What another node asks for as a hold of its own."""
        check_promise(request)
        until_s = self._clock.monotonic_s() + request.ttl_ms / 1000
        asked = Hold(
            request.tenant, request.handle, request.keys, request.cells, request.sizes_bytes,
            request.ttl_ms, until_s, request.granter, request.grant, request.released,
            REPLICAS_MAX, request.origin, request.tenant_epoch,
        )  # fmt: skip
        if not 0 < len(set(asked.names())) == len(asked) <= CARRY_CELLS_MAX:
            raise UsageError(f"1 to {CARRY_CELLS_MAX} different cells are carried in one call")
        if not (request.origin and request.granter and request.grant):
            raise UsageError("a copy has an origin and a grant: name the nodes, and number it")
        return asked

    def _last_released(self, name: Name) -> int:
        """The last grant of that name of which this node knows that it is over."""
        known = (self._released.get(name), self._holds.get(name))
        return max((hold.released for hold in known if hold is not None), default=0)

    def _remember_release(self, hold: Hold) -> None:
        """With all grants of before, for as long as the longest of them would have lasted."""
        longest = max(hold, self._released.get(hold.name, hold), key=lambda one: one.until_s)
        none = np.zeros(len(longest), np.bool_)
        mark = replace(longest.select(none), released=hold.grant, partner="")
        if mark.name not in self._released and len(self._released) >= HOLDS_MAX:
            first = min(self._released.values(), key=lambda one: one.until_s)
            del self._released[first.name]
            self._files.remove(first)
        self._released[mark.name] = mark
        try:
            self._files.write(mark)
        except OSError as fault:
            log.warning("a release may be forgotten at the next start: %s", fault)

    def _recount(self) -> None:
        """Protect what is promised, from nothing; what is nowhere any more leaves its holds."""
        self._protection.clear()
        waits = self._behind.has_disk and self._behind.disk is None
        for hold in list(self._holds.values()):
            here = self._protection.add(hold.keys, hold.cells, self._until_ms(hold))
            if not (waits or here.all()):
                lost = int((~here).sum())
                log.warning("%d cells of the hold %r are lost", lost, hold.handle)
                self._keep(hold.select(here))
        self._count()

    def _keep(self, hold: Hold) -> None:
        """A hold as it is now; one without cells is over."""
        if len(hold):
            self._holds[hold.name] = hold
        elif (former := self._holds.pop(hold.name, None)) is not None:
            self._states.pop(hold.name, None)
            self._files.remove(former)

    def _count(self) -> None:
        tenants = {hold.tenant for hold in self._holds.values()}
        self.promised_bytes = sum(distinct_bytes(self._of(tenant)) for tenant in tenants)

    def _of(self, tenant: bytes) -> list[Hold]:
        return [hold for hold in self._holds.values() if hold.tenant == tenant]

    def _left_ms(self, hold: Hold) -> int:
        return max(0, round(1000 * (hold.until_s - self._clock.monotonic_s())))

    def _until_ms(self, hold: Hold) -> int:
        return self._clock.wall_ms() + self._left_ms(hold)

    def _state(self, hold: Hold) -> CopyState:
        unknown = CopyState.UNDER_WAY if hold.replicas > 1 else CopyState.SINGLE
        return self._states.get(hold.name, unknown)

    def _marks(self, holds: Sequence[Hold]) -> list[HoldMark]:
        """One for each handle; what is carried under it for other nodes is part of it."""
        marks: dict[tuple[bytes, str], HoldMark] = {}
        for hold in holds:
            mark = HoldMark(hold.handle, self._left_ms(hold), hold.replicas, self._state(hold))
            former = marks.setdefault((hold.tenant, hold.handle), mark)
            if mark.remaining_ms > former.remaining_ms:
                marks[hold.tenant, hold.handle] = mark
        return list(marks.values())
