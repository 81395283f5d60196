"""What the coordinator makes of what it sees, without a cluster."""

import pytest

from kvstore.clock import ManualClock
from kvstore.cluster.coordinator import Answered, Coordinator, Missing, Rounds, Sight, Silent
from kvstore.cluster_map import ClusterMap, NodeInfo

EMPTY = ClusterMap(0, ())


def info(index: int, incarnation: int = 1, port: int = 1000) -> NodeInfo:
    address = f"127.0.0.1:{port}"
    return NodeInfo(index, f"t-{index}", f"host:{index}", incarnation, address, address, "/a")


def both(epoch: int, first: NodeInfo | None = None) -> dict[int, Sight]:
    return {0: Answered(first or info(0), epoch), 1: Answered(info(1), epoch)}


def test_missing_nodes_are_started_and_silent_ones_left_alone() -> None:
    coordinator = Coordinator((0, 1), EMPTY, ManualClock())
    step = coordinator.step({0: Missing(), 1: Silent()})
    assert step.start == (0,)
    assert step.publish == ()
    assert step.cluster_map == EMPTY


def test_nodes_enter_the_map_with_their_first_answer() -> None:
    coordinator = Coordinator((0, 1), EMPTY, ManualClock())
    step = coordinator.step({0: Answered(info(0), 0), 1: Silent()})
    assert step.cluster_map == ClusterMap(1, (info(0),))
    assert step.publish == (0,)
    step = coordinator.step({0: Answered(info(0), 1), 1: Answered(info(1), 0)})
    assert step.cluster_map == ClusterMap(2, (info(0), info(1)))
    assert step.publish == (0, 1)
    step = coordinator.step(both(2))
    assert step.cluster_map.epoch == 2
    assert step.publish == ()


def test_other_blocks_make_a_new_map() -> None:
    last = ClusterMap(5, (info(0), info(1)), block_tokens=64)
    coordinator = Coordinator((0, 1), last, ManualClock(), block_tokens=128)
    step = coordinator.step(both(5))
    assert step.cluster_map == ClusterMap(6, last.nodes, block_tokens=128)
    assert step.publish == (0, 1)
    assert coordinator.step(both(6)).cluster_map == step.cluster_map


@pytest.mark.parametrize("sight", [Silent(), Missing()])
def test_silence_changes_no_map(sight: Sight) -> None:
    last = ClusterMap(5, (info(0), info(1)))
    coordinator = Coordinator((0, 1), last, ManualClock())
    assert coordinator.step(both(5)).cluster_map == last
    assert coordinator.step({0: sight, 1: Answered(info(1), 5)}).cluster_map == last


def test_next_incarnation_and_new_address_make_a_new_map() -> None:
    last = ClusterMap(5, (info(0), info(1)))
    coordinator = Coordinator((0, 1), last, ManualClock())
    restarted = info(0, incarnation=2, port=2000)
    step = coordinator.step(both(5, restarted))
    assert step.cluster_map == ClusterMap(6, (restarted, info(1)))
    assert step.publish == (0, 1)


def test_late_answer_of_a_former_life_changes_nothing() -> None:
    last = ClusterMap(5, (info(0, incarnation=2), info(1)))
    coordinator = Coordinator((0, 1), last, ManualClock())
    assert coordinator.step(both(5, info(0, incarnation=1))).cluster_map == last


def test_maps_are_of_the_tier_and_numbers_go_on_from_the_one_before() -> None:
    before = ClusterMap(5, (info(0), info(1)), tier_id="before")
    coordinator = Coordinator((0, 1), before, ManualClock(), tier_id="tier")
    step = coordinator.step(both(0, info(0, incarnation=2)))
    assert (step.cluster_map.tier_id, step.cluster_map.epoch) == ("tier", 6)


def test_number_goes_on_from_the_highest_that_any_node_has_seen() -> None:
    coordinator = Coordinator((0, 1), EMPTY, ManualClock())
    step = coordinator.step(both(41))
    assert step.cluster_map == ClusterMap(42, (info(0), info(1)))


def test_node_that_is_not_wanted_any_more_leaves_the_map() -> None:
    last = ClusterMap(5, (info(0), info(1)))
    step = Coordinator((0,), last, ManualClock()).step({0: Answered(info(0), 5)})
    assert step.cluster_map == ClusterMap(6, (info(0),))


def test_node_that_keeps_failing_is_started_ever_more_rarely() -> None:
    clock = ManualClock()
    coordinator = Coordinator((0,), EMPTY, clock)
    started_at: list[float] = []
    for _ in range(200):
        if coordinator.step({0: Missing("no room")}).start:
            started_at.append(clock.now_s - 1_000)
        clock.advance(0.5)
    assert started_at == [0, 1, 3, 7, 15, 31, 61, 91]
    coordinator.step({0: Answered(info(0), 0)})
    assert coordinator.step({0: Missing()}).start == (0,)


class ScriptedNodes:
    """Answers one scripted look after the other, and notes what it is asked to do."""

    def __init__(self, *looks: dict[int, Sight]) -> None:
        self.looks = list(looks)
        self.done: list[tuple[str, int]] = []

    def look(self) -> dict[int, Sight]:
        return self.looks.pop(0)

    def start(self, index: int) -> None:
        self.done.append(("start", index))

    def publish(self, index: int, cluster_map: ClusterMap) -> None:
        self.done.append((f"map {cluster_map.epoch}", index))


def test_map_is_kept_before_it_is_published_and_once() -> None:
    nodes = ScriptedNodes({0: Missing()}, {0: Answered(info(0), 0)}, {0: Answered(info(0), 1)})

    def keep(cluster_map: ClusterMap) -> None:
        nodes.done.append(("keep", cluster_map.epoch))

    rounds = Rounds(Coordinator((0,), EMPTY, ManualClock()), nodes, keep)
    for _ in range(3):
        rounds.round()
    assert nodes.done == [("keep", 0), ("start", 0), ("keep", 1), ("map 1", 0)]
    assert rounds.progress().current == (0,)


def test_progress_tells_why_a_node_is_missing() -> None:
    nodes = ScriptedNodes({0: Missing("no room")})
    rounds = Rounds(Coordinator((0,), EMPTY, ManualClock()), nodes, lambda _: None)
    rounds.round()
    assert rounds.progress().reasons == {0: "no room"}
    assert rounds.progress().current == ()


def test_map_that_cannot_be_kept_is_not_published() -> None:
    nodes = ScriptedNodes({0: Answered(info(0), 0)}, {0: Answered(info(0), 0)})
    failures = [OSError("disk full")]

    def keep(cluster_map: ClusterMap) -> None:
        if failures:
            raise failures.pop()

    rounds = Rounds(Coordinator((0,), EMPTY, ManualClock()), nodes, keep)
    with pytest.raises(OSError, match="disk full"):
        rounds.round()
    assert nodes.done == []
    rounds.round()
    assert nodes.done == [("map 1", 0)]
