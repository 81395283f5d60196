"""Holds with a replica, and the loss of one node, each as a scene: the chain is read from the rest.

Copies among all other trouble are in the worlds (``tests/sim/test_worlds.py``), how they are made
in ``tests/unit/test_replication.py``.
"""

import pytest

from tests.sim.clients import SimClient
from tests.sim.prompts import Prompt
from tests.sim.storage import PACE
from tests.sim.world import World

MASK, TTL_S = 3, 60.0


def held_twice(machines: int) -> tuple[World, Prompt]:
    """A world, and a prompt of it that ``hold`` is about."""
    world = World(6, machines, replicates=True)
    return world, max(world.prompts, key=lambda one: len(one.tokens))


def hold(world: World, prompt: Prompt) -> int:
    """Have the prompt on the first machine, and a copy of it on another one; its tokens."""

    def put_and_hold(client: SimClient) -> None:
        client.put(prompt, MASK, 0, 0)
        client.hold(prompt, TTL_S, replicas=2)

    world.act("m0", put_and_hold)
    world.scheduler.run_until(world.scheduler.now_s + 3.0)
    assert len(keepers(world)) == 2
    return read(world, prompt)


def keepers(world: World) -> set[int]:
    """Which machines keep something."""
    return {node.index for node in world.alive_nodes() if len(node.node.life.holds)}


def lose(world: World, index: int) -> None:
    world.machines[index].lose_power(world.network)
    world.vows.lose(index)


def read(world: World, prompt: Prompt) -> int:
    """Somebody on a machine that lives reads it; how many tokens."""
    found: list[int] = []
    alive = world.alive_nodes()[-1].machine.name
    world.act(alive, lambda client: found.append(client.get(prompt, MASK, 5.0, persistent=True)))
    return found[0]


@pytest.mark.parametrize("is_first", [True, False])
def test_either_node_may_be_lost_and_a_third_gets_a_copy(is_first: bool) -> None:
    world, prompt = held_twice(3)

    def scene() -> None:
        tokens = hold(world, prompt)
        assert tokens
        before = keepers(world)
        lost = 0 if is_first else max(before)
        lose(world, lost)
        world.scheduler.run_until(world.scheduler.now_s + PACE.grace_s / 2)
        assert read(world, prompt) == tokens
        assert keepers(world) == before - {lost}
        world.scheduler.run_until(world.scheduler.now_s + PACE.grace_s + 2.0)
        assert keepers(world) == {0, 1, 2} - {lost}

    world.play(scene)


def test_one_after_the_other_may_be_lost() -> None:
    world, prompt = held_twice(3)

    def scene() -> None:
        tokens = hold(world, prompt)
        first = min(keepers(world))
        lose(world, first)
        world.scheduler.run_until(world.scheduler.now_s + PACE.grace_s + 4.0)
        lose(world, ({0, 1, 2} - {first}).pop())
        world.scheduler.run_until(world.scheduler.now_s + 1.0)
        assert read(world, prompt) == tokens

    world.play(scene)
