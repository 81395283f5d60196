"""All calls of Ray's API that concern storage nodes.

A node's actor is detached, named after tier and index, and bound to the Ray node that carries its
custom resource: a node's blocks are in that machine's memory. Ray restarts it in place; a new one
is made only where Ray has none by that name. Does not cover: when (`kvstore.cluster.coordinator`).
"""

import logging
import re
from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from kvstore.cluster.coordinator import Answered, Missing, Sight, Silent
from kvstore.cluster.detached import detached
from kvstore.cluster.plan import RAY_NAMESPACE, StoragePlan, actor_name, node_resource
from kvstore.cluster.storage import StorageNode, StorageReport
from kvstore.cluster_map import ClusterMap

log = logging.getLogger(__name__)

ANSWER_S = 1.0
_OUR_ERROR = re.compile(r"^kvstore\.errors\.\w+: ")


class RayNodes:
    """The storage nodes of one tier, as actors."""

    def __init__(self, tier: str, plans: Mapping[int, StoragePlan]) -> None:
        self._tier = tier
        self._plans = dict(plans)
        self._handles: dict[int, Any] = {}
        self._asked: dict[int, Any] = {}

    def look(self) -> dict[int, Sight]:
        """One sight per node. A node that has not answered yet is not asked again."""
        sights: dict[int, Sight] = {}
        for index in self._plans:
            if index not in self._asked:
                handle = self._handles.get(index) or self._find(index)
                if handle is None:
                    sights[index] = Missing()
                    continue
                self._handles[index] = handle
                self._asked[index] = handle.report.remote()
        refs = list(self._asked.values())
        if refs:
            ray.wait(refs, num_returns=len(refs), timeout=ANSWER_S, fetch_local=True)
        for index, ref in list(self._asked.items()):
            done, _ = ray.wait([ref], timeout=0)
            if done:
                del self._asked[index]
                sights[index] = self._answer(index, ref)
            else:
                sights[index] = Silent()
        return sights

    def start(self, index: int) -> None:
        """Make the actor, unless Ray has one by that name; nothing where its machine is away."""
        machine = self._machine(index)
        if machine is None:
            log.warning("no live machine carries %s", node_resource(index))
            return
        self._handles[index] = detached(
            StorageNode,
            self._name(index),
            self._plans[index],
            scheduling_strategy=NodeAffinitySchedulingStrategy(machine, soft=False),
        )

    def publish(self, index: int, cluster_map: ClusterMap) -> None:
        """Send the map and go on; the next report shows whether it arrived."""
        self._handles[index].set_map.remote(cluster_map)

    def _name(self, index: int) -> str:
        return actor_name(self._tier, f"node-{index}")

    def _find(self, index: int) -> Any | None:
        try:
            return ray.get_actor(self._name(index), namespace=RAY_NAMESPACE)
        except ValueError:  # Ray's word for: none by that name
            return None

    def _machine(self, index: int) -> str | None:
        nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
        for node in nodes:
            if node["Alive"] and node_resource(index) in node["Resources"]:
                return str(node["NodeID"])
        return None

    def _answer(self, index: int, ref: Any) -> Sight:
        try:
            report: StorageReport = ray.get(ref)
        except ActorUnavailableError:
            return Silent()
        except RayActorError as error:
            # Dead for good, unless Ray is just restarting it: then `start` finds it by name.
            del self._handles[index]
            return Missing(_last_line(error))
        except RayError as error:
            log.warning("node %d: %s", index, _last_line(error))
            return Silent()
        return Answered(report.info, report.map_epoch)


def _last_line(error: Exception) -> str:
    """The sentence at the end of what Ray tells of a remote error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return _OUR_ERROR.sub("", lines[-1]) if lines else repr(error)
