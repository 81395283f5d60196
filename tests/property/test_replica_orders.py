"""What was deleted never comes back from a copy, in whatever order things happen.

Two nodes and every order of a copy, a delete, a death, restarts and gossip; three nodes and many
orders of more than that. A node that has heard of the delete never shows the block again, and in
the end nobody does, nor after any further restart.
"""

import itertools
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from tests.replica_world import GRACE_S, ReplicaWorld
from tests.worlds import PAGE

GONE, KEPT = 2, 3
BLOCKS = (1, GONE, KEPT)
EVENTS = ("copy", "delete", "b dies", "b restarts", "a restarts", "gossip")
ORDERS = [
    order
    for order in itertools.permutations(EVENTS)
    if order.index("b dies") < order.index("b restarts")
]
DELETES = [("a", True), ("b", True), ("a", False), ("b", False)]
"""Who is asked, and whether the other one is told at once or by gossip."""
SEEDS = 40
LENGTH = 14


class Story:
    """A world in which node a holds blocks, and the delete of one of them."""

    def __init__(self, world: ReplicaWorld) -> None:
        self.world = world
        self.told: set[str] = set()
        world.nodes["a"].put(*BLOCKS)
        world.nodes["a"].hold(*BLOCKS, replicas=2, ttl_s=3600)

    def delete(self, at: str, forward: bool) -> None:
        world = self.world
        up = [name for name in (at, *world.nodes) if name not in world.down]
        if not self.told:
            self.told = world.delete(up[0], GONE, forward=forward)

    def gossip(self) -> None:
        self.world.gossip()
        self._hear()

    def restart(self, name: str, adopt: bool = True) -> None:
        self.world.restart(name, adopt)
        self._hear()

    def check(self) -> None:
        found = self.world.found(GONE)
        assert not any(found.get(name) for name in self.told), (self.told, found)

    def end(self) -> None:
        """Everybody is back and has heard; then everybody restarts, in both orders."""
        world = self.world
        world.cut.clear()
        for name in sorted(world.down):
            world.restart(name)
        world.unseal()
        world.gossip()
        world.pass_time(2)  # a disk has to let go of it first
        self.gossip()
        if self.told:
            assert self.told == set(world.nodes)
        self.check()
        for order in (sorted(world.nodes), sorted(world.nodes, reverse=True)):
            for name in order:
                world.kill(name)
            for name in order:
                world.restart(name)
                self.check()
            world.unseal()
            world.pass_time(1)
            self.check()

    def _hear(self) -> None:
        """Who knows of the delete now, and shows what it has."""
        if self.told:
            for name in self.world.up():
                life = self.world.nodes[name].life
                if len(life.burials):
                    self.told.add(name)


@contextmanager
def story(names: str, has_disk: bool = False) -> Iterator[Story]:
    with ExitStack() as stack:
        how = {"has_disk": has_disk, "arena_pages": 32, "hold_bytes": 16 * PAGE}
        yield Story(ReplicaWorld(stack, names, **how))


def test_orders_of_two_nodes() -> None:
    """Some of them; all of them below."""
    for order, (at, forward) in zip(ORDERS[::3], itertools.cycle(DELETES), strict=False):
        tell(order, at, forward)


@pytest.mark.slow
@pytest.mark.parametrize(("at", "forward"), DELETES)
def test_every_order_of_two_nodes(at: str, forward: bool) -> None:
    for order in ORDERS:
        tell(order, at, forward)


def tell(order: tuple[str, ...], at: str, forward: bool) -> None:
    with story("ab") as told:
        for event in order:
            happen(told, event, at, forward)
            told.check()
        told.end()
        assert sum(told.world.found(KEPT).values()), order


def happen(told: Story, event: str, at: str, forward: bool) -> None:
    match event:
        case "copy":
            told.world.pass_time(0.8)
        case "delete":
            told.delete(at, forward)
        case "b dies":
            told.world.kill("b")
        case "b restarts":
            told.restart("b")
        case "a restarts":
            told.world.kill("a")
            told.restart("a")
        case "gossip":
            told.gossip()


@pytest.mark.parametrize("seed", range(SEEDS))
def test_many_orders_of_three_nodes(seed: int) -> None:
    rng = random.Random(seed)
    with story("abc", has_disk=bool(seed % 2)) as told:
        world = told.world
        for _ in range(LENGTH):
            name, other = rng.sample("abc", 2)
            match rng.choice(["copy", "copy", "wait", "delete", "die", "die", "cut", "gossip"]):
                case "copy":
                    world.pass_time(0.8)
                case "wait":
                    world.pass_time(GRACE_S + 2)
                case "delete":
                    told.delete(name, forward=rng.random() < 0.5)
                case "die" if name in world.down:
                    told.restart(name, adopt=rng.random() < 0.8)
                case "die":
                    world.kill(name)
                case "cut":
                    world.cut ^= {frozenset((name, other))}
                case "gossip":
                    told.gossip()
            told.check()
        told.end()
