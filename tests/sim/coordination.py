"""The coordinator's process: real rounds of the real coordinator, over the simulated network.

``SimNodes`` does what Ray does for the real one: it reaches the nodes' processes, says which are
missing, and starts them where their machine is up. The map that was kept outlives the process.
"""

import asyncio
from collections.abc import Sequence
from typing import Protocol

from kvstore.cluster.coordinator import (
    ROUND_S,
    Answered,
    Coordinator,
    Missing,
    Rounds,
    Sight,
    Silent,
)
from kvstore.cluster_map import ClusterMap, NodeInfo
from tests.sim.edges import Surroundings
from tests.sim.memory import MachineClock
from tests.sim.network import Endpoint, Refused
from tests.sim.prompts import BLOCK_TOKENS
from tests.sim.scheduler import Process, current
from tests.sim.storage import StorageNode

ANSWER_S = 1.0
START_S = 0.4
HEAD = "head"
TIER_ID = "simulated"


class Tier(Surroundings, Protocol):
    """What a coordinator works on."""

    kept_map: ClusterMap

    def node(self, index: int) -> StorageNode | None: ...

    def start_node(self, index: int) -> None: ...

    def can_start(self, index: int) -> bool: ...


class SimNodes:
    """Implements ``kvstore.cluster.coordinator.Nodes``."""

    def __init__(self, tier: Tier, process: Process, wanted: Sequence[int]) -> None:
        self._tier = tier
        self._process = process
        self._wanted = tuple(wanted)

    def look(self) -> dict[int, Sight]:
        asked: dict[int, asyncio.Future[tuple[NodeInfo, int]]] = {}
        sights: dict[int, Sight] = {}
        for index in self._wanted:
            node = self._tier.node(index)
            if node is None:
                sights[index] = Missing() if self._tier.can_start(index) else Silent()
            else:
                asked[index] = self._ask(node)
        deadline_s = self._tier.scheduler.now_s + ANSWER_S
        for index, answer in asked.items():
            left_s = max(0.0, deadline_s - self._tier.scheduler.now_s)
            sights[index] = Silent()
            if current(self._tier.scheduler).wait(answer, left_s):
                try:
                    info, epoch = answer.result()
                except Refused:
                    sights[index] = Missing()
                else:
                    sights[index] = Answered(info, epoch)
        return sights

    def start(self, index: int) -> None:
        self._tier.network.wire.call_later(START_S, self._tier.start_node, index)

    def publish(self, index: int, cluster_map: ClusterMap) -> None:
        node = self._tier.node(index)
        if node is None:
            return

        async def follow(_: Endpoint) -> None:
            node.neighbourhood.follow(cluster_map)

        self._tier.network.call(self._process, node.control, follow)

    def _ask(self, node: StorageNode) -> "asyncio.Future[tuple[NodeInfo, int]]":
        async def report(_: Endpoint) -> tuple[NodeInfo, int]:
            return node.info, node.bulletin.now.map.epoch

        return self._tier.network.call(self._process, node.control, report)


def start_coordinator(tier: Tier, wanted: Sequence[int]) -> Process:
    """A new coordinator, going on from the map that the last one kept."""
    process = Process(tier.scheduler, "coordinator", HEAD)
    clock = MachineClock(tier.scheduler, 5.0, 1.0)

    def keep(cluster_map: ClusterMap) -> None:
        tier.kept_map = cluster_map

    coordinator = Coordinator(wanted, tier.kept_map, clock, BLOCK_TOKENS, TIER_ID)
    rounds = Rounds(coordinator, SimNodes(tier, process, wanted), keep)

    def work() -> None:
        while True:
            rounds.round()
            current(tier.scheduler).wait(None, ROUND_S)

    process.start("coordinator/rounds", work)
    return process
