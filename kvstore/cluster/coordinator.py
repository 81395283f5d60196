"""The coordinator: wanted against actual storage nodes, and the numbered map that follows.

    look ──> step ──> keep the map (before anybody hears of it) ──> start, publish
      └────────────────────── every interval ───────────────────────────┘

`Coordinator.step` is pure; `Rounds` runs it in a thread against whatever answers for the nodes
(`Nodes`, which in a cluster is `kvstore.cluster.ray_nodes`).

A node is in the map from its first sign of life on. Silence never removes it: whether a node
answers is for the nodes' own heartbeats, and a map that moved with every hiccup would move the
directory's homes with it. Does not cover: liveness (`kvstore.membership`).
"""

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from kvstore.cell import BLOCK_TOKENS_DEFAULT
from kvstore.clock import Clock
from kvstore.cluster_map import ClusterMap, NodeInfo

log = logging.getLogger(__name__)

ROUND_S = 0.5
RESTART_FIRST_S = 1.0
RESTART_MAX_S = 30.0


@dataclass(frozen=True, slots=True)
class Missing:
    """No process is there for the node and its machine is: it can be started."""

    reason: str = ""


@dataclass(frozen=True, slots=True)
class Silent:
    """Starting, restarting, hung, or its machine is away: nothing to do but wait."""


@dataclass(frozen=True, slots=True)
class Answered:
    """What the node says of itself, and which map it goes by."""

    info: NodeInfo
    map_epoch: int


Sight = Missing | Silent | Answered


@dataclass(frozen=True, slots=True)
class Step:
    """What to do after one look."""

    cluster_map: ClusterMap
    start: tuple[int, ...]
    publish: tuple[int, ...]


@dataclass(slots=True)
class _Restarts:
    """When a node may be started again, and how long to wait the next time."""

    at_s: float = 0.0
    delay_s: float = RESTART_FIRST_S


class Coordinator:
    """Decides; calls nobody. `last` is the map of the coordinator's former life."""

    def __init__(
        self,
        wanted: Sequence[int],
        last: ClusterMap,
        clock: Clock,
        block_tokens: int = BLOCK_TOKENS_DEFAULT,
        tier_id: str = "",
    ) -> None:
        self._wanted = tuple(wanted)
        self._block_tokens = block_tokens
        self._map = replace(last, tier_id=tier_id)
        self._clock = clock
        self._restarts = {index: _Restarts() for index in wanted}

    def step(self, sights: dict[int, Sight]) -> Step:
        """What follows from the sights of all wanted nodes."""
        answered = {i: sight for i, sight in sights.items() if isinstance(sight, Answered)}
        self._map = self._next_map(answered)
        start = [
            index
            for index in self._wanted
            if isinstance(sights.get(index), Missing) and self._may_start(index)
        ]
        for index in answered:
            self._restarts[index] = _Restarts()
        behind = [i for i, sight in answered.items() if sight.map_epoch < self._map.epoch]
        return Step(self._map, tuple(start), tuple(behind))

    def _next_map(self, answered: dict[int, Answered]) -> ClusterMap:
        """The map with what changed, under a number that nobody has seen."""
        nodes = {node.index: node for node in self._map.nodes if node.index in self._wanted}
        for index, sight in answered.items():
            former = nodes.get(index)
            # An answer that was on its way for long may be of a former life.
            if former is None or sight.info.incarnation >= former.incarnation:
                nodes[index] = sight.info
        seen_epoch = max([self._map.epoch, *(sight.map_epoch for sight in answered.values())])
        fresh = ClusterMap.of(seen_epoch, nodes.values(), self._block_tokens, self._map.tier_id)
        return self._map if fresh == self._map else replace(fresh, epoch=seen_epoch + 1)

    def _may_start(self, index: int) -> bool:
        restarts = self._restarts[index]
        now_s = self._clock.monotonic_s()
        if now_s < restarts.at_s:
            return False
        delay_s = restarts.delay_s
        self._restarts[index] = _Restarts(now_s + delay_s, min(2 * delay_s, RESTART_MAX_S))
        return True


class Nodes(Protocol):
    """Whoever can reach the storage nodes. Nothing here raises for a node that is away."""

    def look(self) -> dict[int, Sight]:
        """One sight per wanted node; waits a bounded time for answers."""
        ...

    def start(self, index: int) -> None:
        """Ask for the node's process; its answer comes with a later look."""
        ...

    def publish(self, index: int, cluster_map: ClusterMap) -> None:
        """Send the map; whether it arrived shows in a later look."""
        ...


@dataclass(frozen=True, slots=True)
class Progress:
    """For whoever waits for the tier: the map, who goes by it, and why others are missing."""

    cluster_map: ClusterMap
    current: tuple[int, ...] = ()
    reasons: dict[int, str] = field(default_factory=dict)


class Rounds:
    """Runs a coordinator against its nodes until stopped."""

    def __init__(
        self, coordinator: Coordinator, nodes: Nodes, keep: Callable[[ClusterMap], None]
    ) -> None:
        self._coordinator = coordinator
        self._nodes = nodes
        self._keep = keep
        self._kept_epoch = -1
        self._sights: dict[int, Sight] = {}
        self._progress = Progress(ClusterMap(0, ()))
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="samovar-rounds", daemon=True)

    def start(self) -> None:
        """Begin, in a thread of its own."""
        self._thread.start()

    def stop(self) -> None:
        """End after the round that is under way."""
        self._stopped.set()
        self._thread.join()

    def progress(self) -> Progress:
        """How far the tier is, as of the last round."""
        return self._progress

    def round(self) -> None:
        """One round; raises what reaching the cluster raises."""
        sights = self._nodes.look()
        step = self._coordinator.step(sights)
        self._tell(sights, step.cluster_map)
        if step.cluster_map.epoch != self._kept_epoch:
            # Kept before anybody hears of it: a number names one map for good.
            self._keep(step.cluster_map)
            self._kept_epoch = step.cluster_map.epoch
            log.info("map %s", _described(step.cluster_map))
        for index in step.start:
            log.info("node %d is started", index)
            self._nodes.start(index)
        for index in step.publish:
            self._nodes.publish(index, step.cluster_map)

    def _tell(self, sights: dict[int, Sight], cluster_map: ClusterMap) -> None:
        for index, sight in sights.items():
            if type(sight) is not type(self._sights.get(index)):
                log.info("node %d: %s", index, type(sight).__name__.lower())
        self._sights = sights
        current = [
            index
            for index, sight in sights.items()
            if isinstance(sight, Answered) and sight.map_epoch == cluster_map.epoch
        ]
        reasons = {i: s.reason for i, s in sights.items() if isinstance(s, Missing) and s.reason}
        self._progress = Progress(cluster_map, tuple(current), reasons)

    def _run(self) -> None:
        troubled = False
        while not self._stopped.is_set():
            try:
                self.round()
            except Exception as error:
                # The cluster's head may be away for minutes; clients go on with the last map.
                if not troubled:
                    log.warning("cannot reach the cluster, trying on: %r", error)
                troubled = True
            else:
                if troubled:
                    log.info("the cluster can be reached again")
                troubled = False
            self._stopped.wait(ROUND_S)


def _described(cluster_map: ClusterMap) -> str:
    nodes = ", ".join(
        f"{node.node_id} incarnation {node.incarnation} at {node.control}"
        for node in cluster_map.nodes
    )
    return f"{cluster_map.epoch}: {nodes or 'no nodes yet'}"
