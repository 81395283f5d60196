"""What the simulation found, each as a scene of its own: it failed before the bug was mended.

``docs/reliability.md`` lists them. In a scene the network is quiet but for what it is about, and
at its end everything must hold that must hold at the end of any world.
"""

import pytest

from tests.sim.clients import SimClient
from tests.sim.prompts import delivered
from tests.sim.trouble import flip_bit
from tests.sim.world import FAR, World


@pytest.mark.parametrize("lost", ["Reserve answer", "Commit", "Commit answer"])
def test_a_put_that_lost_an_answer_leaves_no_reservation(lost: str) -> None:
    world = World(1, machines=1)

    def put(client: SimClient) -> None:
        client.put(world.prompts[0], mask=3, start=0, ttl_s=0)

    def scene() -> None:
        world.network.silenced.add(lost)
        world.act("m0", put)
        world.network.silenced.clear()
        world.scheduler.run_until(world.scheduler.now_s + 1.0)
        world.act("m0", put)
        node = world.node(0)
        assert node is not None
        assert node.node.stats().host.reserved_cells == 0, "the writer is connected, and gave up"

    world.play(scene)


def test_an_expired_copy_does_not_hide_a_living_one() -> None:
    world = World(2, machines=2)
    prompt = max(world.prompts, key=lambda one: len(one.tokens))
    whole = len(prompt.tokens) - 1

    def scene() -> None:
        world.act("m0", lambda client: client.put(prompt, mask=3, start=0, ttl_s=2))
        world.act("m1", lambda client: client.put(prompt, mask=3, start=0, ttl_s=0))
        world.scheduler.run_until(world.scheduler.now_s + 3.0)
        found: list[int] = []
        for _ in range(4):
            world.act(FAR, lambda client: found.append(client.get(prompt, 3, 5.0)))
            world.scheduler.run_until(world.scheduler.now_s + 6.0)
        assert found[1:] == [whole] * 3, "the first read finds out, the others get everything"

    world.play(scene)


def test_a_damaged_cell_goes_although_its_release_is_late() -> None:
    world = World(3, machines=1)
    world.machines[0].has_tier = False  # a cell on its way to the disk stays until the next report
    prompt = world.prompts[0]

    def scene() -> None:
        world.act("m0", lambda client: client.put(prompt, mask=3, start=0, ttl_s=0))
        node = world.node(0)
        assert node is not None
        held = node.node.stats().host.held_cells
        first, *_ = delivered(prompt, len(prompt.tokens) - 1)
        slots = node.node.tier.held_slots().tolist()
        slot = next(one for one in slots if node.node.tier.table.key_of(one) == first)
        flip_bit(world, node, slot, at=-1)
        world.network.held_up_s["Release"] = 0.2
        world.act(FAR, lambda client: client.get(prompt, 3, 5.0))
        world.scheduler.run_until(world.scheduler.now_s + 1.0)
        assert node.node.stats().host.held_cells == held - 1

    world.play(scene)
