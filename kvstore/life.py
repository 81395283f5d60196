"""Life: what becomes of blocks that a node holds: deletes, promises, erasure, and what it says.

    delete ──> found no more ──> wiped for good ──> buried        a neighbour's gossip does the same
    hold   ──> kept ──> released, or its time is up               other nodes may carry a copy
    erase  ──> a tenant's next epoch: nobody computes its old keys any more

A node that was in a map with others is *sealed* at its start: they may have deleted blocks and
erased tenants meanwhile. So is one that a map leaves out, and one that can't read what was deleted
or erased. What it holds is not found, and not announced, until it has heard from all others and
is unsealed. Nor does it erase tenants or open sessions: whoever has one with any node is told of
all erasures, and nobody else stores anything.

Belongs to a ``kvstore.node.Node``, and is driven by its one thread. Does not cover: who is told
(``kvstore.rpc``), writing and reading.
"""

from collections.abc import Sequence

import numpy as np

from kvstore.burials import BurialBook, BurialPage, Ids
from kvstore.calls import (
    INSPECT_KEYS_MAX,
    CarryReply,
    CarryRequest,
    HoldMark,
    HoldOutcome,
    HoldReply,
    HoldRequest,
    Inspection,
)
from kvstore.changes import Changes
from kvstore.clock import Clock
from kvstore.deletes import Deletes, Deletion
from kvstore.errors import UnavailableError, UsageError
from kvstore.holds import Holds
from kvstore.key import Keys
from kvstore.lasting import Lasting
from kvstore.replication import DEFAULT_PACE, Pace, Replication
from kvstore.tenants import EpochPage, TenantEpochs
from kvstore.tiers.behind import Behind
from kvstore.tiers.copies import Copy, Where, copies_of
from kvstore.tiers.host import HostTier


class Life:
    """Deletes, holds, epochs of tenants, and the seal, of one node."""

    def __init__(
        self,
        tier: HostTier,
        behind: Behind,
        clock: Clock,
        lasting: Lasting,
        hold_bytes: int | None = None,
        node_id: str = "",
        pace: Pace = DEFAULT_PACE,
    ) -> None:
        self.tenants = TenantEpochs(lasting)
        self._tier = tier
        self._behind = behind
        self._clock = clock
        self._lasting = lasting
        self.holds = Holds(tier, behind, clock, lasting, hold_bytes, node_id)
        self._deletes = Deletes(tier, behind, self.holds, clock, lasting)
        self.replication = Replication(self.holds, self._deletes.newest, clock, node_id, pace)
        self._epochs_version = 0
        """Of the epochs that the holds go by."""
        self._unseals = 0
        self._awaits_others = lasting.had_company
        self._seal(self._awaits_others or not self._is_read)
        self._go_by_epochs()

    @property
    def is_sealed(self) -> bool:
        """Whether nothing that is held may be found yet."""
        return self._tier.table.is_sealed

    @property
    def epoch(self) -> int:
        """Grows when what is announced was replaced as a whole: ask for ``snapshot`` then."""
        return self._behind.epoch + self._unseals

    def seal(self) -> None:
        """This node hears of no deletes any more: nothing of what it holds may be found."""
        self._awaits_others = True
        self._seal(True)

    def unseal(self) -> None:
        """This node has heard of all that others know: what it holds may be found.

        It stays sealed for as long as it can't read what it knew itself.
        """
        self._awaits_others = False
        self._go_by_epochs()

    @property
    def had_company(self) -> bool:
        """Whether this node has been in a map with others, in whatever life."""
        return self._lasting.had_company

    def keep_company(self) -> None:
        """This node is in a map with others: after a restart it is sealed until ``unseal``."""
        self._lasting.keep_company()

    def drain_changes(self) -> Changes:
        """Cells that came and went since the last call, in order."""
        changes = self._behind.drain_changes()
        return Changes.empty() if self.is_sealed else changes

    def snapshot(self) -> Changes:
        """Everything that may be found, as if it had just come."""
        return Changes.empty() if self.is_sealed else self._behind.snapshot()

    @property
    def burials(self) -> BurialBook:
        """The deletes that this node remembers."""
        return self._deletes.book

    def delete(self, keys: Keys, delete_id: int | None = None) -> Deletion:
        """Let blocks be found no more, from now on; ``bury`` it when it is done.

        Without an id, this node makes one.
        """
        return self._deletes.begin(keys, delete_id)

    def bury(self, deletion: Deletion) -> bool:
        """Remember a deletion that is done; ``False``: the disk refused, it is tried again."""
        return self._deletes.bury(deletion)

    def burial_page(self, start: int, count: int) -> BurialPage:
        """Some of this node's burials, newest first."""
        return self.burials.page(start, count, self._clock.wall_ms())

    def deletes_from(self, page: BurialPage) -> None:
        """Do, and bury, what a neighbour has deleted and this node has not heard of."""
        self._deletes.hear(page)

    def newest_deletes(self, keys: Keys) -> Ids:
        """The newest delete of each block that this node has heard of; 0: none."""
        return self._deletes.newest(keys)

    def hold(self, request: HoldRequest) -> HoldReply:
        """Promise to keep blocks for a tenant, all of them or none."""
        if request.tenant_epoch < self.tenants.epoch_of(request.tenant):
            return self.holds.reply(request.tenant, HoldOutcome.NOT_HELD)
        return self.holds.grant(request)

    def carry(self, request: CarryRequest) -> CarryReply:
        """Keep, for another node, what is here of a hold of its own; says what is not."""
        nothing = np.zeros(len(request.cells), np.bool_)
        if self.is_sealed:
            return CarryReply(HoldOutcome.SEALED, nothing)
        if request.tenant_epoch < self.tenants.epoch_of(request.tenant):
            return CarryReply(HoldOutcome.RELEASED, nothing)
        return self.holds.carry(request)

    def release_hold(self, tenant: bytes, handle: str) -> bool:
        """End a promise early; ``False`` if there is none."""
        return self.holds.release(tenant, handle)

    def holds_of(self, tenant: bytes) -> list[HoldMark]:
        """What is promised to a tenant."""
        return self.holds.of_tenant(tenant)

    def erase(self, tenant: bytes) -> int:
        """Begin a new epoch of a tenant (``tenant_digest``), durable when this returns.

        Its old blocks are nobody's any more, so their holds are over. ``UnavailableError``: nothing
        was done, which epoch it is in is not known here. ``StateError``: the disk refused, it is
        tried again.
        """
        self._go_by_epochs()
        if self._awaits_others:
            raise UnavailableError(
                "this node has not heard from all others which tenants were erased: ask again, or "
                "ask another one"
            )
        epoch = self.tenants.erase(tenant)
        self._go_by_epochs()
        return epoch

    def raise_epochs(self, page: EpochPage) -> bool:
        """Take over what a neighbour knows; ``False``: the disk refused, it is tried again."""
        self.tenants.merge(page)
        return self._go_by_epochs()

    def inspect(self, keys: Keys) -> list[Inspection]:
        """What is known of each of some blocks."""
        if len(keys) > INSPECT_KEYS_MAX:
            raise UsageError(f"{len(keys)} keys are over {INSPECT_KEYS_MAX}: ask for fewer")
        wall_ms = self._clock.wall_ms()
        return [self._inspect_one(keys[row : row + 1], wall_ms) for row in range(len(keys))]

    def tick(self) -> None:
        """Go on with what waits for the disk, and end what is over."""
        self._deletes.step()
        self.holds.tick()
        self._go_by_epochs()

    def _go_by_epochs(self) -> bool:
        """Do what follows from all epochs that are known by now; whether they are durable."""
        is_durable = self.tenants.mend()
        if self._epochs_version != self.tenants.version:
            self._epochs_version = self.tenants.version
            self.holds.end_erased(self.tenants.epoch_of)
        if self.is_sealed and self._is_read and not self._awaits_others:
            self._behind.drain_changes()
            self._seal(False)
            self._unseals += 1
        return is_durable

    @property
    def _is_read(self) -> bool:
        """Whether this node knows again what it knew before its start."""
        return self.tenants.is_read and self._deletes.is_read

    def _seal(self, sealed: bool) -> None:
        self._tier.table.set_sealed(sealed)
        self._behind.seal(sealed)

    def _inspect_one(self, key: Keys, wall_ms: int) -> Inspection:
        copies = copies_of(self._tier, self._behind, key, wall_ms)
        burial = self.burials.get(key.tobytes())
        expiring = [copy for copy in copies if copy.expires_ms]
        first = min(expiring, key=lambda copy: copy.expires_ms, default=None)
        checks_ms = [copy.checked_ago_ms for copy in copies]
        known_ms = [ago_ms for ago_ms in checks_ms if ago_ms is not None]
        return Inspection(
            key=key.tobytes(),
            arena_mask=_mask(copies, Where.ARENA),
            disk_mask=_mask(copies, Where.DISK),
            size_bytes=sum(copy.length for copy in copies),
            ttl_s=0 if first is None else first.ttl_s,
            remaining_ms=0 if first is None else first.expires_ms - wall_ms,
            holds=self.holds.on(key),
            verified_ms_ago=max(known_ms) if copies and len(known_ms) == len(copies) else None,
            buried_ms_ago=None if burial is None else max(0, wall_ms - burial.when_ms),
        )


def _mask(copies: Sequence[Copy], where: Where) -> int:
    """Which cells are there."""
    return sum(1 << copy.cell for copy in copies if copy.where is where)
