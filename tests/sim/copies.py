"""Copies: what nodes say about the copies of a hold must be true, and both copies last.

    COMPLETE     the partner keeps all of it as well: from then on, either of the two may be lost
    DECLINED     no other node has the budget for it
    ALONE        there is no other node
    UNDER_WAY    not for long, when nothing is broken any more

What was released, or declined, is kept by nobody then, nor is anything of an epoch that is over:
no node that was away brings it back. That both copies last is a vow like any other
(``tests.sim.vows``), which a machine that is lost is absolved from.
"""

from collections.abc import Mapping, Sequence

from kvstore.calls import CopyState
from kvstore.hold import Hold
from kvstore.holds import LATER_S
from kvstore.tenants import tenant_digest
from tests.sim.disks import Name
from tests.sim.epochs import Epochs
from tests.sim.prompts import NAMESPACES
from tests.sim.storage import StorageNode
from tests.sim.vows import Asked, Vow, Vows, names_of, promised

SURE = 0.96
"""Of the time that a hold has left, which a node's clock measures."""


class Copies:
    """All holds with replicas of a world, as its nodes see them."""

    def __init__(self, vows: Vows, epochs: Epochs, epoch_of: Mapping[bytes, int]) -> None:
        """``epoch_of`` says of which epoch of its tenant each block is."""
        self.seen = 0
        """How often a copy was said to be complete that was not said so before."""
        self._vows = vows
        self._epochs = epochs
        self._epoch_of = epoch_of
        self._tenants = {tenant_digest(one.tenant): one.tenant for one in NAMESPACES}
        self._complete: set[tuple[int, str]] = set()

    def broken(self, nodes: Sequence[StorageNode]) -> list[str]:
        """What is not true of what living nodes say just now; what is, they must keep to."""
        return [
            f"{node.process.name}: {fault}" for node in nodes for fault in self._claims(node, nodes)
        ]

    def unsettled(self, nodes: Sequence[StorageNode], is_all: bool) -> list[str]:
        """What is not yet as it must become among the nodes of the map.

        ``is_all``: there are no others, so that nobody is missed who remembers what is over.
        """
        left = []
        for node in nodes:
            for hold in node.node.life.holds._holds.values():
                what = f"{node.process.name}: the hold {hold.handle!r} of {hold.granter!r}"
                left += [f"{what} {why}" for why in self._unfinished(node, hold, nodes)]
                if is_all and self._vows.is_over(hold.handle):
                    left.append(f"{what} was released")
                if self._epoch(hold) < node.node.life.tenants.epoch_of(hold.tenant):
                    left.append(f"{what} is of an epoch that is over")
        return left

    def _claims(self, node: StorageNode, nodes: Sequence[StorageNode]) -> list[str]:
        faults = []
        for hold in _copied(node):
            partner = _partner(node, hold, nodes)
            is_erased = self._epoch(hold) < self._epochs.begun[self._tenants[hold.tenant]]
            if partner is None or is_erased or self._vows.is_ending(hold.handle):
                continue
            names = self._vows.lasting(names_of(hold))
            lacking = names - promised(partner, hold.tenant, hold.handle)
            if lacking:
                faults.append(
                    f"the hold {hold.handle!r} has two copies, and {partner.process.name} does "
                    f"not keep {len(lacking)} of {len(names)} cells: {min(lacking)[0].hex()[:8]}"
                )
            else:
                self._vow(node, partner, hold, names)
        return faults

    def _vow(self, node: StorageNode, partner: StorageNode, hold: Hold, names: set[Name]) -> None:
        scheduler = node.process.scheduler
        name = node.index, f"{hold.handle} of {hold.granter}"
        self.seen += name not in self._complete
        self._complete.add(name)
        until_s = scheduler.now_s + SURE * (hold.until_s - node.machine.clock.monotonic_s())
        asked = Asked(self._tenants[hold.tenant], hold.handle, until_s, {})
        kept = {node.index: names, partner.index: set(names)}
        self._vows.add(f"{name[1]} at {node.index}", Vow(asked, kept))

    def _epoch(self, hold: Hold) -> int:
        """Of its tenant, when the oldest of its blocks were stored."""
        return min(self._epoch_of[key] for key, _ in names_of(hold))

    def _unfinished(self, node: StorageNode, hold: Hold, nodes: Sequence[StorageNode]) -> list[str]:
        """Why a hold has not all the copies that it can have."""
        left_s = hold.until_s - node.machine.clock.monotonic_s()
        if hold.replicas < 2 or left_s <= LATER_S or len(nodes) < 2:
            return []
        state = node.node.life.holds._state(hold)
        if state is CopyState.COMPLETE:
            return [] if _partner(node, hold, nodes) is not None else ["has lost its partner"]
        if state is CopyState.DECLINED:
            able = [o.process.name for o in nodes if o is not node and _has_budget(o, hold)]
            return [f"is declined, and {able} have the budget"] if able else []
        return [f"is {state.name}"]


def _copied(node: StorageNode) -> list[Hold]:
    """The holds of which a node says that both copies are there, while that is looked after."""
    life, now_s = node.node.life, node.machine.clock.monotonic_s()
    return [
        hold
        for hold in life.holds.with_copies()
        if life.holds._state(hold) is CopyState.COMPLETE and hold.until_s - now_s > LATER_S
    ]


def _partner(node: StorageNode, hold: Hold, nodes: Sequence[StorageNode]) -> StorageNode | None:
    """Who has the copy, if it lives, and has lived since it was asked last."""
    duty = node.node.life.replication._duties.get(hold.name)
    if duty is None or duty.hold is not hold:
        return None
    found = [one for one in nodes if one.node.identity.node_id == duty.partner]
    return found[0] if found and found[0].node.identity.incarnation == duty.incarnation else None


def _has_budget(node: StorageNode, hold: Hold) -> bool:
    """Whether a node could promise all of a hold as well."""
    holds = node.node.life.holds
    sizes: dict[bytes, dict[Name, int]] = {hold.tenant: {}}
    for one in [*holds._holds.values(), hold]:
        mine = zip(one.keys, one.cells.tolist(), one.sizes_bytes.tolist(), strict=True)
        sizes.setdefault(one.tenant, {}).update({(k.tobytes(), c): size for k, c, size in mine})
    each = {tenant: sum(cells.values()) for tenant, cells in sizes.items()}
    return (
        each[hold.tenant] <= holds.tenant_bytes_max and sum(each.values()) <= holds.promisable_bytes
    )
