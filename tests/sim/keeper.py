"""Keeper: what a client does about the life of blocks: hold, release, erase.

What came of it is told to the world's ``Vows`` and ``Epochs``. Deletes are in
``tests.sim.clients``, with puts and reads.
"""

from collections.abc import Callable
from random import Random
from typing import Any, Protocol

from kvstore.client import Samovar
from kvstore.errors import UnavailableError
from kvstore.rpc.wire import CALL_DEADLINE_S
from tests.sim.edges import Surroundings
from tests.sim.epochs import Epochs
from tests.sim.prompts import Prompt, delivered
from tests.sim.scheduler import Process
from tests.sim.storage import StorageNode
from tests.sim.vows import Asked, Vows, kept, lives_of

HOLDS_S = (1.0, 3.0, 6.0)
COPIED_S = (10.0, 40.0)
"""Of holds with a replica: what ends soon is not copied."""
SURE = 0.96
"""Of the time of a hold, which a node's clock measures."""
EDITIONS = 3
"""Of each prompt: its tenant is erased twice at most."""
ERASE_DEADLINE_S = 10.0

Timed = Callable[[str, float, Callable[[], Any]], Any]
"""Does an operation, which must end in time."""


class KeptWorld(Surroundings, Protocol):
    """What keeping needs of a world."""

    vows: Vows
    epochs: Epochs

    def alive_nodes(self) -> list[StorageNode]: ...

    def edition(self, prompt: Prompt, epoch: int) -> Prompt: ...

    def node_count(self) -> int: ...


class Keeper:
    """Of one client process."""

    def __init__(self, world: KeptWorld, process: Process, timed: Timed) -> None:
        self._world = world
        self._process = process
        self._timed = timed
        self.handles: list[tuple[str, str]] = []
        """Of the holds that it has, and their tenants."""
        self._number = 0

    def edition(self, tier: Samovar, prompt: Prompt, random: Random) -> Prompt:
        """The prompt in its tenant's epoch now; or now and then of one that is over."""
        epoch = tier.renewed(prompt.namespace).tenant_epoch
        if epoch and random.random() < 0.2:
            epoch = random.randrange(epoch)
        return self._world.edition(prompt, epoch)

    def keep(self, tier: Samovar, prompt: Prompt, random: Random) -> None:
        """Hold a prompt, release a hold, or erase a tenant."""
        choice = random.random()
        tenant = prompt.namespace.tenant
        if choice < 0.15 and self._world.epochs.begun[tenant] < EDITIONS - 1:
            self.erase(tier, tenant)
        elif choice < 0.35 and self.handles:
            self.release(tier, *self.handles.pop(random.randrange(len(self.handles))))
        else:
            has_copy = self._world.replicates and random.random() < 0.7
            ttl_s = random.choice(COPIED_S if has_copy else HOLDS_S)
            self.hold(tier, prompt, ttl_s, 1 + has_copy)

    def hold(self, tier: Samovar, prompt: Prompt, ttl_s: float, replicas: int) -> None:
        """Have what there is of a prompt kept."""
        world, tenant = self._world, prompt.namespace.tenant
        self._number += 1
        handle = f"{self._process.name}/{self._number}"
        nodes, begun_s = world.alive_nodes(), world.scheduler.now_s
        asked = Asked(tenant, handle, begun_s + SURE * ttl_s, lives_of(nodes))
        held = self._timed(
            "hold", self._calls_s(4),
            lambda: tier.hold(
                prompt.namespace, prompt.tokens, handle, ttl_s, prompt.boundaries, replicas
            ),
        )  # fmt: skip
        self._say(f"hold {prompt.number} as {handle}: {held.outcome.name} {held.tokens}")
        if not held.granted:
            if world.scheduler.now_s - begun_s < CALL_DEADLINE_S:  # nobody was silent
                self._end(tier, asked)
            return
        self.handles.append((handle, tenant))
        nodes = world.alive_nodes()
        if world.epochs.begun[tenant] > prompt.namespace.tenant_epoch:
            return  # a node may hear of that erasure at any time
        if nodes and (count := world.vows.grant(asked, delivered(prompt, held.tokens), nodes)):
            world.scheduler.fault(f"{count} blocks of the hold {handle} are kept by no node")

    def release(self, tier: Samovar, handle: str, tenant: str) -> None:
        """End a hold."""
        self._world.vows.release(handle)
        asked = Asked(tenant, handle, 0.0, lives_of(self._world.alive_nodes()))
        released = self._timed(
            "release", self._calls_s(1), lambda: tier.release(handle, tenant)
        )  # fmt: skip
        self._say(f"release {handle}: {released.found} {released.silent}")
        if not released.silent:
            self._end(tier, asked)

    def erase(self, tier: Samovar, tenant: str) -> None:
        """Have all that a tenant has stored out of reach."""
        world = self._world
        world.epochs.erase_begins(tenant)
        world.vows.erase(tenant)
        try:
            erased = self._timed("erase", ERASE_DEADLINE_S, lambda: tier.erase(tenant))
        except UnavailableError as fault:
            self._say(f"erase {tenant} unknown: {fault}")
            return
        self._say(f"erase {tenant}: epoch {erased.epoch} pending {erased.pending}")
        if erased.complete:
            world.epochs.erase_ends(tenant, erased.epoch)

    def _end(self, tier: Samovar, asked: Asked) -> None:
        """No node has such a promise; one that the client's map leaves out was not asked.

        What another node carries of it ends when it asks, unless nobody could write that down.
        """
        nodes = self._world.alive_nodes()
        if lives_of(nodes) != asked.lives or len(tier._routes.nodes) < len(nodes):
            return
        if left := kept(nodes, asked.tenant, asked.handle):
            self._world.scheduler.fault(f"the hold {asked.handle} is over, and {left} keep it")
        if not any(node.machine.disk.refusals.faults for node in nodes):
            self._world.vows.released(asked.handle)

    def _calls_s(self, rounds: int) -> float:
        """How long so many rounds of calls to all nodes may take."""
        return CALL_DEADLINE_S * rounds * (2 * self._world.node_count() + 1)

    def _say(self, what: str) -> None:
        self._world.scheduler.say(self._process.name, what)
