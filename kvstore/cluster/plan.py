"""What a tier is to be, and what its parts are called in Ray.

Plain values that travel from `samovar up` to the coordinator and on to the storage nodes. Does not
cover: what is (`kvstore.cluster_map`, `kvstore.state`).
"""

from dataclasses import dataclass
from pathlib import Path

from kvstore.config import ClusterConfig, NodeConfig
from kvstore.server import NodePlace, nvme_folder_of
from kvstore.state import TierFolder

RAY_NAMESPACE = "samovar"


@dataclass(frozen=True, slots=True)
class StoragePlan:
    """All that a storage node needs to start, on whichever machine."""

    config: NodeConfig
    place: NodePlace
    log_folder: Path


@dataclass(frozen=True, slots=True)
class TierPlan:
    """All that the coordinator needs to make the tier."""

    name: str
    tier_id: str
    folder: TierFolder
    storage: tuple[StoragePlan, ...]
    block_tokens: int
    log_level: str


def nvme_folders(cluster: ClusterConfig, node: NodeConfig) -> list[Path]:
    """Where each node of a tier has its NVMe tier, if it has one."""
    folder = TierFolder.of(cluster.state_folder, cluster.name)
    return [
        nvme_folder_of(node, folder.node_folder(index), f"{cluster.name}-{index}")
        for index in range(cluster.nodes)
    ]


def node_resource(index: int) -> str:
    """The custom resource of the Ray node that is to carry this storage node."""
    return f"samovar-node-{index}"


def actor_name(tier: str, role: str) -> str:
    """What an actor of the tier is called in Ray: `coordinator`, `node-0`, `node-1`, ..."""
    return f"samovar-{tier}-{role}"
