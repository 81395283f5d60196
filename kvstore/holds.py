"""Holds: what a node has promised to keep, to whom, until when.

    bound             of
    HOLDS_MAX         holds of a node
    hold_bytes        the arena, for one tenant's holds; else ``TENANT_SHARE`` of it
    ALL_SHARE_MAX     the arena, for the holds of all tenants together

Two holds of one tenant on a cell count its bytes once. A cell lives at least as long as its holds.
A hold ends by itself; what is deleted, or turns out damaged, leaves it before that.

Does not cover: where a cell is kept (``kvstore.protection``), holds on disk
(``kvstore.hold_files``), readers (``kvstore.leases``).
"""

import logging
from collections.abc import Sequence

import numpy as np

from kvstore.block import HEADER_BYTES
from kvstore.calls import (
    HANDLE_BYTES_MAX,
    HOLD_KEYS_MAX,
    HOLD_TTL_MS_MAX,
    HoldMark,
    HoldOutcome,
    HoldReply,
    HoldRequest,
    every_cell,
)
from kvstore.clock import Clock
from kvstore.errors import UsageError
from kvstore.hold import Hold, distinct_bytes
from kvstore.hold_files import HoldFiles
from kvstore.key import Keys
from kvstore.lasting import Lasting
from kvstore.protection import Protection
from kvstore.tenants import TENANT_BYTES
from kvstore.tiers.behind import Behind, as_keys
from kvstore.tiers.host import HostTier
from kvstore.tiers.nvme.record import PAGE_BYTES
from kvstore.tiers.tier import Suspicion

log = logging.getLogger(__name__)

HOLDS_MAX = 4096
TENANT_SHARE = 0.25
ALL_SHARE_MAX = 0.5
SETTLE_S = 1.0
"""How often it is looked where what is promised has got to."""


class Holds:
    """All holds of a node, and what they keep. ``hold_bytes`` is what one tenant may hold."""

    def __init__(
        self,
        host: HostTier,
        behind: Behind,
        clock: Clock,
        lasting: Lasting,
        hold_bytes: int | None = None,
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
        self._protection = Protection(host, behind)
        self._files = HoldFiles(lasting, clock)
        self._holds = {(hold.tenant, hold.handle): hold for hold in self._files.read()}
        self._settled_s = clock.monotonic_s()
        self._recount()

    def __len__(self) -> int:
        return len(self._holds)

    def grant(self, request: HoldRequest) -> HoldReply:
        """Promise to keep cells, all of them or none."""
        _check(request)
        outcome = self._grant(request)
        held_bytes = distinct_bytes(self._of(request.tenant))
        return HoldReply(outcome, held_bytes, self.tenant_bytes_max)

    def release(self, tenant: bytes, handle: str) -> bool:
        """End a hold early; ``False`` if there is none."""
        hold = self._holds.pop((tenant, handle), None)
        if hold is None:
            return False
        self._protection.take(hold.keys, hold.cells, self._clock.wall_ms())
        self._files.remove(hold)
        self._count()
        return True

    def release_all(self, tenant: bytes) -> None:
        """End all holds of a tenant."""
        for hold in self._of(tenant):
            self.release(tenant, hold.handle)

    def lose(self, keys: Keys) -> None:
        """These blocks are about to be deleted: no promise is about them any more."""
        for name, hold in list(self._holds.items()):
            rows = hold.on(keys)
            if rows.any():
                gone = hold.select(rows)
                self._protection.take(gone.keys, gone.cells, self._clock.wall_ms())
                self._keep(name, hold.select(~rows))
        self._count()

    def of_tenant(self, tenant: bytes) -> list[HoldMark]:
        """A tenant's holds."""
        return [self._mark(hold) for hold in self._of(tenant)]

    def on(self, keys: Keys) -> tuple[HoldMark, ...]:
        """The holds that cover any of these blocks."""
        return tuple(self._mark(hold) for hold in self._holds.values() if hold.on(keys).any())

    def tick(self) -> None:
        """End the holds whose time is up, and see to it that each cell is protected somewhere."""
        now_s = self._clock.monotonic_s()
        for hold in [hold for hold in self._holds.values() if hold.until_s <= now_s]:
            self.release(hold.tenant, hold.handle)
        if self._holds and now_s - self._settled_s >= SETTLE_S:
            self._settled_s = now_s
            if not self._protection.settle():
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

    def _grant(self, request: HoldRequest) -> HoldOutcome:
        name = request.tenant, request.handle
        former = self._holds.get(name)
        if former is None and len(self._holds) >= HOLDS_MAX:
            return HoldOutcome.TOO_MANY
        asked = self._asked(request)
        if asked is None:
            return HoldOutcome.NOT_HELD
        hold = asked if former is None else former.joined(asked)
        if not self._has_budget(hold):
            return HoldOutcome.OVER_BUDGET
        try:
            self._files.write(hold)
        except OSError as fault:
            log.warning("a hold is declined, it could not be written down: %s", fault)
            return HoldOutcome.FAILED
        if former is not None:
            self._protection.take(former.keys, former.cells, self._clock.wall_ms())
        self._protection.add(hold.keys, hold.cells, self._until_ms(hold))
        self._keep(name, hold)
        self._count()
        return HoldOutcome.GRANTED

    def _has_budget(self, hold: Hold) -> bool:
        """Whether what the tenant would hold then is no more than it may, or than now."""
        now = self._of(hold.tenant)
        bytes_now, bytes_then = distinct_bytes(now), distinct_bytes([*now, hold])
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
        return Hold(
            request.tenant, request.handle, keys, cells, (pages * PAGE_BYTES).astype(np.uint64),
            request.ttl_ms, self._clock.monotonic_s() + request.ttl_ms / 1000,
        )  # fmt: skip

    def _recount(self) -> None:
        """Protect what is promised, from nothing; what is nowhere any more leaves its holds."""
        self._protection.clear()
        waits = self._behind.has_disk and self._behind.disk is None
        for name, hold in list(self._holds.items()):
            here = self._protection.add(hold.keys, hold.cells, self._until_ms(hold))
            if not (waits or here.all()):
                lost = int((~here).sum())
                log.warning("%d cells of the hold %r are lost", lost, hold.handle)
                self._keep(name, hold.select(here))
        self._count()

    def _keep(self, name: tuple[bytes, str], hold: Hold) -> None:
        """A hold as it is now; one without cells is over."""
        if len(hold):
            self._holds[name] = hold
        elif self._holds.pop(name, None) is not None:
            self._files.remove(hold)

    def _count(self) -> None:
        tenants = {tenant for tenant, _ in self._holds}
        self.promised_bytes = sum(distinct_bytes(self._of(tenant)) for tenant in tenants)

    def _of(self, tenant: bytes) -> list[Hold]:
        return [hold for hold in self._holds.values() if hold.tenant == tenant]

    def _left_ms(self, hold: Hold) -> int:
        return max(0, round(1000 * (hold.until_s - self._clock.monotonic_s())))

    def _until_ms(self, hold: Hold) -> int:
        return self._clock.wall_ms() + self._left_ms(hold)

    def _mark(self, hold: Hold) -> HoldMark:
        return HoldMark(hold.handle, self._left_ms(hold))


def _check(request: HoldRequest) -> None:
    size_bytes = len(request.handle.encode())
    if len(request.tenant) != TENANT_BYTES:
        raise UsageError(f"a tenant has {TENANT_BYTES} bytes here: take its tenant_digest")
    if not 0 < size_bytes <= HANDLE_BYTES_MAX:
        raise UsageError(f"a handle has 1 to {HANDLE_BYTES_MAX} bytes, not {size_bytes}")
    if not 0 < len(request.keys) <= HOLD_KEYS_MAX:
        raise UsageError(f"a hold is for 1 to {HOLD_KEYS_MAX} blocks, not {len(request.keys)}")
    if not 0 < request.ttl_ms <= HOLD_TTL_MS_MAX:
        raise UsageError(f"a hold lasts 1 to {HOLD_TTL_MS_MAX} ms, not {request.ttl_ms}")
