"""Deletes while nodes are away, each as a scene: whoever comes back, in whatever order.

What a delete is to a node is in ``tests/unit/test_deletes.py``; deletes among all other trouble are
in the worlds (``tests/sim/test_worlds.py``).
"""

import pytest

from tests.sim.clients import SimClient
from tests.sim.promises import names_held
from tests.sim.prompts import Prompt
from tests.sim.world import FAR, World

MASK = 3


def world_of(machines: int) -> tuple[World, Prompt]:
    """Machines with disks, and the prompt that it is about."""
    world = World(5, machines=machines)
    for machine in world.machines:
        machine.has_tier = True
    return world, max(world.prompts, key=lambda one: len(one.tokens))


def put(world: World, prompt: Prompt, machine: str) -> None:
    """Have the prompt in that machine's arena, and on its disk."""

    def put_twice(client: SimClient) -> None:
        for _ in range(2):
            client.put(prompt, MASK, 0, 0)

    world.act(machine, put_twice)
    world.scheduler.run_until(world.scheduler.now_s + 1.0)
    node = world.machines[int(machine[1:])]
    assert node.disk.catalog.rows, "used twice, so it went to the disk"


def delete(world: World, prompt: Prompt) -> None:
    world.act("m0", lambda client: client.delete(prompt, 0))


def take_down(world: World, index: int, power: bool, catalog: bool) -> None:
    """A node's process, or its whole machine, is gone; it comes back when ``bring_up`` says so."""
    machine, node = world.machines[index], world.node(index)
    assert node is not None
    if catalog:
        machine.disk.lose_catalog()
    if power:
        machine.lose_power(world.network)
    else:
        machine.up = False  # so that it is not started again at once
        node.process.kill()


def bring_up(world: World, index: int) -> None:
    machine = world.machines[index]
    if machine.name in world.network.down:
        machine.boot(world.network)
    machine.up = True


def watch(world: World, prompt: Prompt, seconds: float) -> None:
    """Nobody is shown anything of it meanwhile."""

    def read_nothing(client: SimClient) -> None:
        assert client.get(prompt, MASK, 0.3) == 0

    for _ in range(int(seconds / 0.4)):
        world.act(FAR, read_nothing)
        world.scheduler.run_until(world.scheduler.now_s + 0.3)


@pytest.mark.parametrize("power", [False, True])
@pytest.mark.parametrize("catalog", [False, True])
def test_a_node_that_was_away_shows_nothing_of_what_was_deleted(power: bool, catalog: bool) -> None:
    world, prompt = world_of(2)

    def scene() -> None:
        put(world, prompt, "m1")
        take_down(world, 1, power, catalog)
        world.scheduler.run_until(world.scheduler.now_s + 2.0)
        delete(world, prompt)
        world.network.silenced.add("Burials")
        bring_up(world, 1)
        watch(world, prompt, 3.0)
        world.network.silenced.clear()
        world.scheduler.run_until(world.scheduler.now_s + 2.0)
        node = world.node(1)
        assert node is not None
        assert not names_held(node)

    world.play(scene)


@pytest.mark.parametrize("power", [False, True])
@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 1, 0)])
def test_all_that_know_of_a_delete_restart_before_the_one_that_does_not(
    order: tuple[int, ...], power: bool
) -> None:
    world, prompt = world_of(3)

    def scene() -> None:
        put(world, prompt, "m1")
        take_down(world, 1, power=True, catalog=False)
        world.scheduler.run_until(world.scheduler.now_s + 2.0)
        delete(world, prompt)
        for index in (0, 2):
            take_down(world, index, power, catalog=True)
        for index in order:
            world.scheduler.run_until(world.scheduler.now_s + 1.0)
            bring_up(world, index)
        world.scheduler.run_until(world.scheduler.now_s + 1.0)
        watch(world, prompt, 3.0)
        node = world.node(1)
        assert node is not None
        assert not names_held(node)

    world.play(scene)


def test_a_node_that_the_map_leaves_out_speaks_for_nobody_else() -> None:
    world, prompt = world_of(2)

    def scene() -> None:
        put(world, prompt, "m0")
        world.start_coordinator([0])
        world.scheduler.run_until(world.scheduler.now_s + 3.0)
        world.act("m1", lambda client: client.delete(prompt, 0))
        assert not world.graves.answered, "node 0 has not heard of it"

    world.play(scene)
    assert world.graves.gone(all_are_back=True), "it was done when node 1 was back in the map"
