"""A storage node as it runs in an actor: a thin shell round `kvstore.server.NodeServer`.

A plain class; `kvstore.cluster.ray_nodes` makes the actor. When the actor restarts, it is built
anew from the same plan and takes its folders up again with the next incarnation. Does not cover:
the node itself.
"""

import logging
from dataclasses import dataclass

from kvstore.cluster.plan import StoragePlan
from kvstore.cluster_map import ClusterMap, NodeInfo
from kvstore.logs import log_to
from kvstore.server import NodeServer

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StorageReport:
    """A storage node's answer to the coordinator."""

    info: NodeInfo
    map_epoch: int


class StorageNode:
    """Serves from construction until its process ends."""

    def __init__(self, plan: StoragePlan) -> None:
        log_to(plan.log_folder, f"node-{plan.place.index}", plan.config.log_level)
        self._server = NodeServer(plan.config, plan.place)
        try:
            self._info = self._server.start()
        except Exception as error:
            log.error("node %d cannot start: %s", plan.place.index, error)
            raise

    def report(self) -> StorageReport:
        """Where the node is found, and which map it goes by."""
        return StorageReport(self._info, self._server.map.epoch)

    def set_map(self, cluster_map: ClusterMap) -> None:
        """Take a newer map."""
        self._server.set_map(cluster_map)
