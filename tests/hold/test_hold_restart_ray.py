"""A tier on a real Ray whose every process is killed and whose memory is gone: warm from NVMe."""

import os
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest

from tests.hold.warm_scene import BOUNDARIES, NEW_TOKENS, Scene
from tests.ray_tier import RayTier, eventually, ray_tier

pytestmark = [pytest.mark.cluster, pytest.mark.engine, pytest.mark.slow]

NVME_BYTES = 64 << 20


def is_written(tier: RayTier, index: int) -> bool:
    """Whether all that a node's arena holds is on its disk."""
    with tier.connect(index) as client:
        stats = client.stats()
    return 0 < stats.host.held_cells == stats.nvme.held_cells


def have_ended(tier: RayTier, processes: frozenset[int]) -> bool:
    return processes.isdisjoint(tier.living())


def end_all(tier: RayTier) -> None:
    """Every process of the tier is killed, and its memory is gone."""
    while living := tier.living():
        for pid in living:
            os.kill(pid, signal.SIGKILL)
        eventually(partial(have_ended, tier, frozenset(living)))
    for node in tier.nodes:
        shutil.rmtree(node.arena_folder)


def test_hold_a_tier_whose_processes_were_all_killed_is_warm_from_nvme(tmp_path: Path) -> None:
    scene = Scene("float32", BOUNDARIES[0], "all killed")
    with ray_tier(tmp_path, NVME_BYTES) as tier:
        scene.produce(tier, 0)
        with scene.engine(tier, 0) as again:  # what is used again is written down
            again.generate(scene.first, NEW_TOKENS, boundaries=[scene.boundary])
        eventually(lambda: is_written(tier, 0))
        end_all(tier)
        standing = tier.tier.up()
        assert standing.fresh
        successor = RayTier(standing.cluster_map.nodes, tier.tier)
        scene.assert_warm(successor, 1, "nvme")
