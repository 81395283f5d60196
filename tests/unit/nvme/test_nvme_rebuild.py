"""A crash while slab and catalog are put in order: the next start has all that there was.

Does not cover: both catalog and first page damaged: then nothing says what the slab holds.
"""

import errno
import os
from collections.abc import Sequence

import pytest

from kvstore.fs import Mapped
from kvstore.tiers.nvme.spill import Phase, Result
from tests.nvme_world import Crash, NvmeWorld, SimulatedDisk

CELLS = 9


def filled(seed: int) -> NvmeWorld:
    world = NvmeWorld(seed)
    world.start()
    for number in range(CELLS):
        ticket = world.store(number, pages=1 + 2 * (number % 2))
        world.settle()
        assert isinstance(ticket, int)
        assert world.results[ticket] is Result.STORED
    world.delete(4)
    world.settle()
    return world


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("power_lost", [False, True])
@pytest.mark.parametrize("damage", ["none", "catalog", "first page"])
def test_a_crash_at_every_step_of_a_recovery(damage: str, power_lost: bool, seed: int) -> None:
    crash_at, crashed = 0, True
    while crashed:
        crash_at += 1
        world = filled(seed)
        world.promised, crashed = world.held(), False
        if damage == "catalog":
            world.catalog.damage = "made to be lost"
        elif damage == "first page":
            world.disk.flip(100)
        world.steps.crash_at = world.steps.taken + crash_at
        del world.tier
        try:
            world.start()
        except Crash:
            crashed = True
        world.steps.crash_at = 0
        if power_lost:
            world.disk.crash()
        world.start()
        world.check_after_start()
    assert crash_at > 3, "the recovery did too little"


def test_a_first_page_that_cannot_be_read_for_a_while_is_no_damaged_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = filled(0)
    world.promised = world.held()
    world.catalog.damage = "made to be lost"
    del world.tier

    def refuse(disk: SimulatedDisk, buffers: Sequence[Mapped], offset: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patched:
        patched.setattr(SimulatedDisk, "read", refuse)
        world.start()
    assert world.tier.phase is not Phase.OPEN
    world.start()
    world.check_after_start()
