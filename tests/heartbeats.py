"""Nodes that send each other heartbeats, in a cluster that is simulated on one time line."""

import heapq
import random
from dataclasses import dataclass, field

from kvstore.cluster_map import ClusterMap, NodeInfo
from kvstore.membership import (
    TICK_INTERVAL_S,
    Heartbeat,
    Liveness,
    LivenessEvent,
    Membership,
)

DELAY_S = 0.01
DETECTED_WITHIN_S = 2.0


def cluster(epoch: int, incarnations: dict[int, int]) -> ClusterMap:
    return ClusterMap.of(
        epoch,
        [
            NodeInfo(index, f"node-{index}", "host", incarnation, "h:1", "h:2", "/arena")
            for index, incarnation in incarnations.items()
        ],
    )


@dataclass(order=True)
class _Due:
    at_s: float
    order: int
    what: tuple[object, ...] = field(compare=False)


class Simulation:
    """Nodes on one time line. A beat that arrives is answered; both travel ``DELAY_S``.

    A node that sleeps neither ticks nor reads: what arrives waits for it. A dead one is gone.
    """

    def __init__(self, count: int, seed: int = 1) -> None:
        self.random = random.Random(seed)
        self.now_s = 0.0
        self.map = cluster(1, dict.fromkeys(range(count), 1))
        self.nodes: dict[int, Membership] = {}
        self.log: list[tuple[float, int, LivenessEvent]] = []
        self.cut: set[frozenset[int]] = set()
        self.asleep_until_s: dict[int, float] = {}
        self.loss = 0.0
        self._queue: list[_Due] = []
        self._order = 0
        for index in range(count):
            self.start(index, 1)

    def start(self, index: int, incarnation: int) -> None:
        node = self.nodes[index] = Membership(index, incarnation, self.now_s)
        node.follow(self.map, self.now_s)
        self._at(self.now_s + self.random.uniform(0, TICK_INTERVAL_S), "tick", index, node)

    def kill(self, *indexes: int) -> None:
        for index in indexes:
            del self.nodes[index]

    def sleep(self, index: int, seconds: float) -> None:
        self.asleep_until_s[index] = self.now_s + seconds

    def isolate(self, index: int) -> None:
        self.cut |= {frozenset({index, other}) for other in self.nodes if other != index}

    def run(self, seconds: float) -> None:
        end_s = self.now_s + seconds
        while self._queue and self._queue[0].at_s <= end_s:
            due = heapq.heappop(self._queue)
            self.now_s = due.at_s
            kind, index, *rest = due.what
            assert isinstance(index, int)
            if self.now_s < self.asleep_until_s.get(index, 0.0):
                self._at(self.asleep_until_s[index], *due.what)
            elif kind == "tick":
                self._tick(index, rest[0])
            elif index in self.nodes:
                self._arrive(index, *rest)
        self.now_s = end_s

    def seen_unreachable_by_all(self, dead: int) -> bool:
        return all(dead in node.unreachable for node in self.nodes.values())

    def events(self, liveness: Liveness, of: int | None = None) -> list[tuple[float, int, int]]:
        return [
            (at_s, observer, event.node)
            for at_s, observer, event in self.log
            if event.liveness is liveness and of in (None, event.node)
        ]

    def _tick(self, index: int, life: object) -> None:
        node = self.nodes.get(index)
        if node is None or node is not life:
            return
        tick = node.tick(self.now_s)
        self._note(index, tick.events)
        for target in tick.targets:
            self._send(index, target, node.heartbeat(), True)
        self._at(self.now_s + TICK_INTERVAL_S, "tick", index, node)

    def _arrive(self, index: int, beat: object, answer_wanted: object) -> None:
        assert isinstance(beat, Heartbeat)
        node = self.nodes[index]
        self._note(index, node.received(beat, self.now_s))
        if answer_wanted:
            self._send(index, beat.sender, node.heartbeat(), False)

    def _send(self, source: int, target: int, beat: Heartbeat, answer_wanted: bool) -> None:
        lost = frozenset({source, target}) in self.cut or self.random.random() < self.loss
        if not lost:
            self._at(self.now_s + DELAY_S, "beat", target, beat, answer_wanted)

    def _note(self, index: int, events: tuple[LivenessEvent, ...]) -> None:
        self.log += [(self.now_s, index, event) for event in events]

    def _at(self, at_s: float, *what: object) -> None:
        self._order += 1
        heapq.heappush(self._queue, _Due(at_s, self._order, what))
