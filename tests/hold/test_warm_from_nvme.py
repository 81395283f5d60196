"""The warm answer equals the engine's own bit for bit when its blocks come from an NVMe tier.

Real node processes: the engine's prompt is written down, every node is killed and its arena
discarded, and a new engine asks again. Does not cover: Ray (``test_hold_restart``).
"""

import shutil
from pathlib import Path

import pytest

from kvstore.client import Samovar
from tests.hold.processes import StorageNode, Tier, stats_of
from tests.hold.warm_scene import BOUNDARIES, DTYPES, NEW_TOKENS, Scene
from tests.served import eventually

pytestmark = pytest.mark.engine


class Nodes:
    """Two nodes with an NVMe tier each, and clients of them."""

    def __init__(self, tier: Tier, disk: Path) -> None:
        self._tier = tier
        self._nodes: list[StorageNode] = [
            tier.node(index, arena_bytes=32 << 20, nvme_folder=disk) for index in range(2)
        ]
        self._publish()

    def connect(self, index: int) -> Samovar:
        info = self._nodes[index].info
        return Samovar.connect(info.control, host_id=info.host_id)

    def restart_cold(self) -> None:
        """Kill every node, discard the arenas, start successors on the disks."""
        for node in self._nodes:
            node.kill()
            shutil.rmtree(node.info.arena_folder)
        self._nodes = [self._tier.started(node.restarted()) for node in self._nodes]
        self._publish()

    def written(self, index: int) -> bool:
        """Whether all that a node's arena holds is on its disk."""
        stats = stats_of(self._nodes[index])
        return 0 < stats.host.held_cells == stats.nvme.held_cells

    def _publish(self) -> None:
        self._tier.publish(*(node.info for node in self._nodes))


@pytest.mark.parametrize("reader", [0, 1])
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_hold_warm_from_nvme_equals_own_hit(
    tier: Tier, tmp_path: Path, dtype: str, reader: int
) -> None:
    nodes = Nodes(tier, tmp_path)
    scene = Scene(dtype, BOUNDARIES[0], "from nvme")
    scene.produce(nodes, 0)
    with scene.engine(nodes, 0) as again:  # what is used again is written down
        again.generate(scene.first, NEW_TOKENS, boundaries=[scene.boundary])
    eventually(lambda: nodes.written(0))
    nodes.restart_cold()
    scene.assert_warm(nodes, reader, "nvme")
