"""What the tier promises of its own cost and of noticing deaths, where no process is needed."""

import pytest

from kvstore.clock import ManualClock
from kvstore.fs import LinuxFileSystem
from kvstore.tiers.host import HostTier
from tests.heartbeats import DETECTED_WITHIN_S, Simulation
from tests.worlds import PAGE, new_cell, shared_folder, store

BYTES_PER_BLOCK_MAX = 400


@pytest.mark.parametrize("seed", range(3))
def test_hold_a_death_is_noticed_by_all_within_two_seconds(seed: int) -> None:
    world = Simulation(5, seed)
    world.run(5.0)
    world.kill(3)
    world.run(DETECTED_WITHIN_S)
    assert world.seen_unreachable_by_all(3)


def test_hold_a_nodes_metadata_is_at_most_400_bytes_per_block() -> None:
    """``make bench ARGS=node_metadata`` has the rest of the process and the directory too."""
    blocks = 512
    with shared_folder() as folder:
        capacity = blocks * 2 * PAGE
        tier = HostTier.create(LinuxFileSystem(), ManualClock(), folder, capacity, blocks, 1)
        for number in range(blocks):
            store(tier, new_cell(number))
        assert tier.stats.held_cells == blocks
        assert tier.metadata_bytes() <= BYTES_PER_BLOCK_MAX * blocks
