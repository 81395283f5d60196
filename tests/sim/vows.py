"""Vows: what nodes have promised clients to keep (``Samovar.hold``), and must have until it ends.

    granted      each node that took part has its cells, alive, in either tier, until the time is up
    released, deleted, its tenant erased, found damaged        over before that
    its machine lost its memory or its disk                    that machine keeps nothing any more

A block that was ever to be deleted is in no vow: a node may hear of the delete at any time. Nor is
one of an epoch after which its tenant was to be erased. What is declined or over leaves nothing
behind: ``tests.sim.keeper`` looks at once, and pins that nobody has are found when the world
settles.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from kvstore.hold import Hold, distinct_bytes
from kvstore.tenants import tenant_digest
from kvstore.tiers.nvme.spill import Phase
from tests.sim.disk_promises import readable_on_disk
from tests.sim.disks import Name
from tests.sim.storage import StorageNode

OVERDUE_S = 1.0
CLOCK_SEEN_S = 1.0
"""Within that a node that runs has seen that its clock was set."""


@dataclass(frozen=True)
class Asked:
    """What somebody wants to have kept, and the lives of the nodes as it was asked for."""

    tenant: str
    handle: str
    until_s: float
    lives: Mapping[int, int]


@dataclass
class Vow:
    """What was promised: by machine, the cells that it keeps."""

    asked: Asked
    names: dict[int, set[Name]]


class Vows:
    """All promises of a world that last."""

    def __init__(self) -> None:
        self.granted = 0
        self._vows: dict[str, Vow] = {}
        self._deleted: set[bytes] = set()
        self._damaged: set[Name] = set()
        self._ending: set[str] = set()
        self._over: set[str] = set()
        self._clock_set_s: float | None = None

    def grant(self, asked: Asked, keys: Iterable[bytes], nodes: Sequence[StorageNode]) -> int:
        """It was promised just now; of how many blocks no node knows of that."""
        self.granted += 1
        vow = Vow(asked, {node.index: _promised(node, asked) for node in nodes})
        self._vows[asked.handle] = vow
        self._drop_lost()
        if lives_of(nodes) != asked.lives or nodes[0].process.scheduler.now_s >= asked.until_s:
            return 0
        there = {key for names in vow.names.values() for key, _ in names}
        lost = self._deleted | {key for key, _ in self._damaged}
        return sum(key not in there and key not in lost for key in keys)

    def add(self, name: str, vow: Vow) -> None:
        """Another one, or a newer one, of that name."""
        self._vows[name] = vow

    def release(self, handle: str) -> None:
        """It may be over from now on."""
        self._ending.add(handle)
        others = {h: vow for h, vow in self._vows.items() if vow.asked.handle != handle}
        self._vows = others

    def released(self, handle: str) -> None:
        """Some node at least has ended it, and will remember."""
        self._over.add(handle)

    def is_over(self, handle: str) -> bool:
        """Whether nobody may keep it for good."""
        return handle in self._over

    def is_ending(self, handle: str) -> bool:
        """Whether some nodes may have ended it by now."""
        return handle in self._ending

    def lasting(self, names: set[Name]) -> set[Name]:
        """Those of some cells that nobody has deleted, or found damaged."""
        return {name for name in names - self._damaged if name[0] not in self._deleted}

    def delete(self, keys: Iterable[bytes]) -> None:
        """Blocks are being deleted."""
        self._deleted.update(keys)
        self._drop_lost()

    def damage(self, damaged: Name) -> None:
        """Somewhere a cell is not what it was."""
        self._damaged.add(damaged)
        self._drop_lost()

    def erase(self, tenant: str) -> None:
        """A tenant is being erased: nodes end its promises of before as they hear of it."""
        others = {h: vow for h, vow in self._vows.items() if vow.asked.tenant != tenant}
        self._vows = others

    def lose(self, machine: int) -> None:
        """A machine has lost its memory, or its disk."""
        for vow in self._vows.values():
            vow.names.pop(machine, None)

    def forget(self, now_s: float) -> None:
        """A clock was set: until when promises last is another question now."""
        self._vows.clear()
        self._over.clear()
        self._clock_set_s = now_s

    def disk_lost(self) -> None:
        """A node may have forgotten what was released."""
        self._over.clear()

    def broken(self, node: StorageNode) -> list[str]:
        """What a node does not keep of what it must, or more than it may."""
        return [*_over(node), *self._missing(node)]

    def _missing(self, node: StorageNode) -> list[str]:
        now_s = node.process.scheduler.now_s
        if node.process.paused and self._clock_set_s is not None:
            self._clock_set_s = now_s
        if self._clock_set_s is not None and now_s < self._clock_set_s + CLOCK_SEEN_S:
            return []
        self._vows = {h: vow for h, vow in self._vows.items() if now_s < vow.asked.until_s}
        mine = [vow for vow in self._vows.values() if vow.names.get(node.index)]
        if not mine or (node.nvme is not None and node.nvme.phase is not Phase.OPEN):
            return []
        there = _alive(node)
        return [
            f"{len(lost)} cells of the hold {vow.asked.handle} are gone: {min(lost)[0].hex()[:8]}"
            for vow in mine
            if (lost := vow.names[node.index] - (there & _promised(node, vow.asked)))
        ]

    def _drop_lost(self) -> None:
        for vow in self._vows.values():
            for machine, names in vow.names.items():
                vow.names[machine] = self.lasting(names)


def kept(nodes: Iterable[StorageNode], tenant: str, handle: str) -> list[str]:
    """Which nodes have a promise of that handle that a client asked them for."""
    digest = tenant_digest(tenant)
    return [
        node.process.name
        for node in nodes
        if (digest, handle, node.node.identity.node_id) in node.node.life.holds._holds
    ]


def lives_of(nodes: Iterable[StorageNode]) -> dict[int, int]:
    """Which lives of which nodes these are."""
    return {node.index: node.machine.incarnation for node in nodes}


def names_of(hold: Hold) -> set[Name]:
    """The cells that a hold is about."""
    cells = hold.cells.tolist()
    return {(key.tobytes(), cell) for key, cell in zip(hold.keys, cells, strict=True)}


def promised(node: StorageNode, tenant: bytes, handle: str) -> set[Name]:
    """The cells that a node has promised to keep under a handle, itself or for other nodes."""
    holds = node.node.life.holds._holds.values()
    mine = [hold for hold in holds if (hold.tenant, hold.handle) == (tenant, handle)]
    return {name for hold in mine for name in names_of(hold)}


def _promised(node: StorageNode, asked: Asked) -> set[Name]:
    return promised(node, tenant_digest(asked.tenant), asked.handle)


def _alive(node: StorageNode) -> set[Name]:
    """All that is held in either tier, and not expired."""
    tier = node.node.tier
    slots = tier.held_slots()
    slots = slots[~tier.table.expired(slots, node.machine.clock.wall_ms())]
    cells = tier.table.slots["cell"][slots].tolist()
    above = {(tier.table.key_of(slot), cell) for slot, cell in zip(slots, cells, strict=True)}
    return above | readable_on_disk(node)


def _over(node: StorageNode) -> list[str]:
    """Promises beyond the bounds of memory and time."""
    holds = node.node.life.holds
    now_s = node.machine.clock.monotonic_s()
    faults = []
    tenants = {tenant for tenant, _, _ in holds._holds}
    each = [distinct_bytes(holds._of(tenant)) for tenant in tenants]
    if max(each, default=0) > holds.tenant_bytes_max or sum(each) > holds.promisable_bytes:
        faults.append(f"{each} bytes are promised")
    late = [hold.handle for hold in holds._holds.values() if hold.until_s < now_s - OVERDUE_S]
    if late and not node.process.paused:
        faults.append(f"the holds {late} do not end")
    return faults
