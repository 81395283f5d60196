"""What the simulation found, each as a scene of its own: it failed before the bug was mended.

``docs/reliability.md`` lists them. In a scene the network is quiet but for what it is about, and
at its end everything must hold that must hold at the end of any world.
"""

import errno
from functools import partial

import pytest

from kvstore.plan import Stored
from kvstore.tiers.tier import Refusal
from tests.sim.clients import SimClient
from tests.sim.disk_promises import readable_on_disk
from tests.sim.prompts import Prompt, Rows, delivered
from tests.sim.scheduler import current
from tests.sim.trouble import flip_bit
from tests.sim.world import FAR, World
from tests.worlds import new_cell


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


def test_a_node_that_the_map_leaves_out_shows_nothing_of_what_was_deleted() -> None:
    world = World(4, machines=2)
    early, late = sorted(world.prompts, key=lambda one: len(one.tokens))[-2:]

    def read(prompt: Prompt) -> int:
        found: list[int] = []
        world.act("m1", lambda client: found.append(client.get(prompt, 3, 1.0)))
        return found[0]

    def delete(prompt: Prompt) -> None:
        world.act("m0", lambda client: client.delete(prompt, 0))

    def scene() -> None:
        for prompt in (early, late):
            put = partial(SimClient.put, prompt=prompt, mask=3, start=0, ttl_s=0)
            world.act("m1", put)
        world.network.cut |= {("m0", "m1"), ("m1", "m0")}
        world.network.silenced.add("SetMap")
        world.start_coordinator([0])
        world.scheduler.run_until(world.scheduler.now_s + 3.0)
        delete(early)
        assert not world.graves.answered, "node 1 has not heard that it is left out"
        assert read(early) == len(early.tokens) - 1
        world.network.cut.clear()
        world.network.silenced.clear()
        world.scheduler.run_until(world.scheduler.now_s + 3.0)
        assert read(late) == 0
        delete(late)
        assert world.graves.answered
        assert read(late) == 0

    world.play(scene)


def test_clients_of_a_node_that_the_map_leaves_out_hear_of_an_erasure_from_others() -> None:
    world = World(4, machines=2)
    prompt = max(world.prompts, key=lambda one: len(one.tokens))

    found: list[int] = []

    def read(client: SimClient) -> None:
        found.append(client.get(prompt, 3, 1.0))

    def scene() -> None:
        world.act("m0", partial(SimClient.put, prompt=prompt, mask=3, start=0, ttl_s=0))
        world.act("m1", read)
        early = world.clients[-1]
        world.start_coordinator([0])
        world.scheduler.run_until(world.scheduler.now_s + 3.0)
        world.act("m0", lambda client: client.erase(prompt.namespace.tenant))
        world.act("m1", lambda client: None)
        late = world.clients[-1]
        for client in (early, late):
            client.process.start("read", partial(read, client))
        world.scheduler.run_until(world.scheduler.now_s + 3.0)
        assert found == [len(prompt.tokens) - 1, 0, 0]

    world.play(scene)


@pytest.mark.parametrize("delay_s", [0.02, 0.05, 0.2])
def test_a_client_that_comes_to_a_node_that_the_map_leaves_out_knows_of_an_erasure_at_once(
    delay_s: float,
) -> None:
    world = World(4, machines=2)
    prompt = max(world.prompts, key=lambda one: len(one.tokens))
    found: list[int] = []
    stored: list[Stored] = []

    def come(client: SimClient) -> None:
        tier = client.tier
        assert tier is not None
        found.append(tier.longest_prefix(prompt.namespace, prompt.tokens).tokens)
        stored.append(tier.put(prompt.namespace, prompt.tokens, Rows(prompt.kv, slice(0, 2))))
        found.append(client.get(prompt, 3, 1.0))

    def scene() -> None:
        world.act("m0", partial(SimClient.put, prompt=prompt, mask=3, start=0, ttl_s=0))
        world.start_coordinator([0])
        world.scheduler.run_until(world.scheduler.now_s + 3.0)
        world.act("m0", lambda client: client.erase(prompt.namespace.tenant))
        assert world.epochs.known(prompt.namespace.tenant) == 1
        world.network.weather.delay_s = delay_s
        world.act("m1", come)
        assert found == [0, 0]
        assert (stored[0].stored, stored[0].present) == (0, 0)

    world.play(scene)


def test_a_node_that_cannot_read_which_tenants_were_erased_remembers_it_all_the_same() -> None:
    world = World(6, machines=1)
    disk, prompt = world.machines[0].disk, max(world.prompts, key=lambda one: len(one.tokens))
    tenant = prompt.namespace.tenant
    found: list[int] = []

    def come(client: SimClient) -> None:
        client.put(prompt, mask=3, start=0, ttl_s=0)
        found.append(client.get(prompt, 3, 1.0))

    def scene() -> None:
        world.act("m0", come)
        world.act("m0", lambda client: client.erase(tenant))
        node = world.node(0)
        assert node is not None
        disk.refusals.faults, disk.refusals.share = {"file": errno.EIO}, 1.0
        node.process.kill()
        world.scheduler.run_until(world.scheduler.now_s + 3.0)
        world.act("m0", come)
        world.act("m0", lambda client: client.erase(tenant))
        assert world.epochs.known(tenant) == 1, "it can't say which epoch begins"
        disk.heal()
        world.scheduler.run_until(world.scheduler.now_s + 3.0)
        world.act("m0", come)
        world.act("m0", lambda client: client.erase(tenant))
        assert found[0] > 0
        assert found[1:] == [0, 0]
        assert world.epochs.known(tenant) == 2

    world.play(scene)


def test_a_tier_that_lost_its_memory_has_it_back_when_there_is_some() -> None:
    world = World(5, machines=1)
    machine, prompt = world.machines[0], world.prompts[0]
    machine.has_tier = True
    found: list[int] = []

    def read(client: SimClient) -> None:
        found.append(client.get(prompt, 3, 1.0))

    def scene() -> None:
        for _ in range(2):
            world.act("m0", lambda client: client.put(prompt, mask=3, start=0, ttl_s=0))
        world.scheduler.run_until(world.scheduler.now_s + 1.0)
        node = world.node(0)
        assert node is not None
        assert readable_on_disk(node)
        machine.fs.full = True
        tier, slots, number = node.node.tier, [], 0
        while not isinstance(slot := tier.reserve(new_cell(number), tier.next_stamp()), Refusal):
            slots.append(slot)
            number += 1
        for slot in slots:  # the writers are lost, each of them
            tier.retire(slot)
        world.act(FAR, read)
        world.scheduler.run_until(world.scheduler.now_s + 5.0)
        machine.fs.full = False
        world.scheduler.run_until(world.scheduler.now_s + 5.0)
        world.act(FAR, read)
        assert found == [0, len(prompt.tokens) - 1]

    world.play(scene)


@pytest.mark.parametrize("late_s", [0.6, 1.5, 20.0])
def test_a_copy_that_is_asked_for_before_a_release_and_late_ends_all_the_same(
    late_s: float,
) -> None:
    world = World(6, machines=2, replicates=True)
    prompt = max(world.prompts, key=lambda one: len(one.tokens))

    def hold_and_release(client: SimClient) -> None:
        client.hold(prompt, ttl_s=60.0, replicas=2)
        current(world.scheduler).wait(None, 1.0)
        client.release()

    def holding() -> list[int]:
        return [len(node.node.life.holds) for node in world.alive_nodes()]

    def scene() -> None:
        for machine in ("m0", "m1"):
            put = partial(SimClient.put, prompt=prompt, mask=3, start=0, ttl_s=0)
            world.act(machine, put)
        world.network.held_up_s["Carry"] = late_s
        world.act("m0", hold_and_release, look_s=0.01)
        assert holding() == [0, 0]
        world.network.held_up_s.clear()
        world.scheduler.run_until(world.scheduler.now_s + late_s)
        assert holding() == [0, 1], "it can't know"
        world.scheduler.run_until(world.scheduler.now_s + 2.0)
        assert holding() == [0, 0]

    world.play(scene)


def test_a_disk_that_refuses_to_read_for_a_while_loses_nothing_that_is_held() -> None:
    world = World(7, machines=1)
    machine, prompt = world.machines[0], max(world.prompts, key=lambda one: len(one.tokens))
    machine.has_tier = True
    found: list[int] = []

    def read(client: SimClient) -> None:
        found.append(client.get(prompt, 3, 1.0))

    def scene() -> None:
        put = partial(SimClient.put, prompt=prompt, mask=3, start=0, ttl_s=0)
        world.act("m0", put)
        world.act("m0", lambda client: client.hold(prompt, ttl_s=60.0, replicas=1))
        world.scheduler.run_until(world.scheduler.now_s + 2.0)
        node = world.node(0)
        assert node is not None
        assert len(readable_on_disk(node)) >= len(prompt.blocks)
        for slot in node.node.tier.held_slots().tolist():
            node.node.tier.evict(slot)
        machine.disk.refusals.faults = {"read": errno.EIO}
        world.act(FAR, read)
        machine.disk.heal()
        world.scheduler.run_until(world.scheduler.now_s + 5.0)
        world.act(FAR, read)
        assert found == [0, len(prompt.tokens) - 1]

    world.play(scene)
