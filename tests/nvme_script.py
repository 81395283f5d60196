"""What the owner of an NVMe tier does, at random, from a seed: for sweeps over crashes."""

import random

from tests.nvme_world import NvmeWorld

OPERATIONS = 120
NAMES = 7


def random_operation(world: NvmeWorld, script: random.Random) -> None:
    """One thing that an owner does, or a bit of disk work."""
    number, cell = script.randrange(NAMES), script.randrange(2)
    choice = script.random()
    room = len(world.free_arena) > 2
    if choice < 0.35 and room:
        world.store(number, cell, pages=script.choice((1, 1, 1, 3)), ttl_s=script.choice((0, 60)))
    elif choice < 0.45 and room:
        world.load(number, cell)
    elif choice < 0.55:
        world.delete(number)
    elif choice < 0.60:
        found = world.find(number, cell)
        world.tier.touch(found.slots[found.held], world.tier.next_stamp())
    elif choice < 0.65:
        world.clock.advance(script.choice((1, 10, 90)))
        world.take(world.tier.tick())
    elif choice < 0.95:
        if world.queue.has_work():
            world.queue.work()
        world.take(world.tier.poll())
    else:
        world.queue.is_eager = True
        world.settle()
        world.queue.is_eager = False
