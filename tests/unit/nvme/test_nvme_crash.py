"""A crash at every step of disk and catalog: what was promised is there, nothing wrong comes back.

Does not cover: the same with a real process, file and LMDB (``tests/hold/test_hold_disk.py``).
"""

import random

import pytest

from kvstore.tiers.nvme.tier import RESTART_S
from tests.nvme_script import OPERATIONS, random_operation
from tests.nvme_world import Crash, NvmeWorld

FAST_SEEDS, SLOW_SEEDS = range(4), range(4, 24)
SEEDS = [*FAST_SEEDS, *(pytest.param(seed, marks=pytest.mark.slow) for seed in SLOW_SEEDS)]
STRIDE = 3
"""Of a fast seed every third step."""


def play(world: NvmeWorld, seed: int) -> None:
    script = random.Random(seed)
    world.queue.is_eager = False
    for _ in range(OPERATIONS):
        random_operation(world, script)
    world.queue.is_eager = True
    world.settle()


def restart_until_it_stays(world: NvmeWorld) -> None:
    """Begin anew; the power may go again, at any step of the recovery."""
    world.steps.crash_at = world.steps.taken + world.rng.randint(1, 40)
    try:
        world.restart()
    except Crash:
        world.steps.crash_at = 0
        world.restart()
    world.steps.crash_at = 0


@pytest.mark.parametrize("seed", SEEDS)
def test_a_crash_at_every_step(seed: int) -> None:
    stride = STRIDE if seed in FAST_SEEDS else 1
    crash_at, crashed = seed % stride, True
    while crashed:
        crash_at += stride
        world = NvmeWorld(seed, crash_at)
        try:
            world.start()
            play(world, seed)
            crashed = False
        except Crash:
            pass
        restart_until_it_stays(world)
        world.check_after_start()
    assert crash_at > 100, "the script does too little"


@pytest.mark.parametrize("seed", SEEDS)
def test_the_disk_process_ends_at_every_step(seed: int) -> None:
    """What it wrote is still there, synced or not; the tier goes on with what the disk says."""
    for end_at in range(seed % 9, OPERATIONS, 9):
        world = NvmeWorld(seed)
        world.start()
        world.queue.is_eager = False
        script = random.Random(seed)
        for step in range(OPERATIONS):
            if step == end_at:
                world.promised = world.held()
                world.queue.die()
                world.take(world.tier.poll())
                assert not world.held()
                assert not world.stores
                assert not world.loads
                world.clock.advance(RESTART_S[0])
                world.take(world.tier.tick())
                world.check_after_start()
                world.queue.is_eager = False
            random_operation(world, script)
        world.queue.is_eager = True
        world.settle()
        assert not world.deletes, "a delete was forgotten"
        world.check_accounting()
        world.check_all_load()


def test_what_a_rebuild_finds_is_made_durable() -> None:
    """A disk process that was killed had written a cell, and not yet synced it."""
    world = NvmeWorld(1)
    world.start()
    world.queue.is_eager = False
    world.store(0)
    world.queue.work()
    world.catalog.damage = "made to be lost"
    world.restart(power_lost=False)
    held = world.held()
    assert held
    world.disk.lose()
    world.restart(power_lost=False)
    world.check_all_load()
    assert world.held() == held
