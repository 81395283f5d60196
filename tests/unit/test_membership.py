"""Who notices what in a cluster whose nodes die, starve, lose their link and restart."""

import pytest

from kvstore.membership import (
    TICK_INTERVAL_S,
    Heartbeat,
    Liveness,
    LivenessEvent,
    Membership,
)
from tests.heartbeats import DETECTED_WITHIN_S, Simulation, cluster


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 20])
def test_a_healthy_cluster_has_no_events(count: int) -> None:
    simulation = Simulation(count)
    simulation.run(20)
    assert simulation.log == []


@pytest.mark.parametrize("count", [2, 3, 4, 6, 9, 16])
@pytest.mark.parametrize("seed", range(5))
def test_everybody_knows_of_a_death_within_two_seconds(count: int, seed: int) -> None:
    simulation = Simulation(count, seed)
    simulation.run(5 + simulation.random.random())
    died_s, dead = simulation.now_s, simulation.random.randrange(count)
    simulation.kill(dead)
    simulation.run(DETECTED_WITHIN_S)
    assert simulation.seen_unreachable_by_all(dead)
    simulation.run(20)
    assert simulation.seen_unreachable_by_all(dead)
    unreachable = simulation.events(Liveness.UNREACHABLE)
    assert {event.node for _, _, event in simulation.log} == {dead}
    assert len(unreachable) == count - 1, "once per survivor, without flapping"
    assert min(at_s for at_s, _, _ in unreachable) - died_s >= 1.0


@pytest.mark.parametrize("dead", [(0, 1), (3, 4), (0, 5)])
def test_two_deaths_at_once_are_known_within_two_seconds(dead: tuple[int, ...]) -> None:
    simulation = Simulation(10)
    simulation.run(5)
    simulation.kill(*dead)
    simulation.run(DETECTED_WITHIN_S)
    assert all(simulation.seen_unreachable_by_all(index) for index in dead)


@pytest.mark.parametrize(("count", "dead"), [(3, (0, 2)), (4, (1, 2, 3)), (12, (3, 4, 5, 6, 7, 8))])
def test_most_of_a_cluster_may_die(count: int, dead: tuple[int, ...]) -> None:
    simulation = Simulation(count)
    simulation.run(5)
    simulation.kill(*dead)
    simulation.run(8)
    for node in simulation.nodes.values():
        assert node.unreachable == set(dead)


@pytest.mark.parametrize("count", [2, 3, 6])
@pytest.mark.parametrize("seed", range(4))
def test_a_starved_node_condemns_nobody_and_is_back_at_its_next_beat(count: int, seed: int) -> None:
    simulation = Simulation(count, seed)
    simulation.run(5)
    simulation.sleep(1, 5.0)
    simulation.run(4.9)
    assert all(1 in node.unreachable for index, node in simulation.nodes.items() if index != 1)
    simulation.run(0.1 + 2 * TICK_INTERVAL_S)
    assert all(node.unreachable == set() for node in simulation.nodes.values())
    simulation.run(10)
    assert all(node.suspected == set() for node in simulation.nodes.values())
    blamed = {event.node for _, observer, event in simulation.log if observer == 1}
    assert blamed == set()
    assert len(simulation.events(Liveness.BACK, of=1)) == count - 1


def test_a_whole_machine_that_sleeps_suspects_nobody() -> None:
    simulation = Simulation(4)
    simulation.run(5)
    for index in range(4):
        simulation.sleep(index, 5.0)
    simulation.run(20)
    assert simulation.log == []


def test_one_broken_link_condemns_nobody() -> None:
    simulation = Simulation(6)
    simulation.run(5)
    simulation.cut.add(frozenset({2, 3}))
    simulation.run(10)
    assert {(observer, node) for _, observer, node in simulation.events(Liveness.SUSPECT)} == {
        (2, 3),
        (3, 2),
    }
    assert simulation.events(Liveness.UNREACHABLE) == []
    simulation.cut.clear()
    simulation.run(1)
    assert all(node.suspected == set() for node in simulation.nodes.values())


@pytest.mark.parametrize("count", [2, 3, 8])
def test_a_node_without_a_link_is_unreachable_until_the_link_is_back(count: int) -> None:
    simulation = Simulation(count)
    simulation.run(5)
    simulation.isolate(1)
    simulation.run(DETECTED_WITHIN_S)
    for index, node in simulation.nodes.items():
        assert index == 1 or node.unreachable == {1}
    simulation.run(10)
    simulation.cut.clear()
    simulation.run(1)
    assert all(node.unreachable == node.suspected == set() for node in simulation.nodes.values())


def test_what_i_hear_beats_what_i_am_told() -> None:
    simulation = Simulation(3)
    simulation.run(5)
    node = simulation.nodes[0]
    now_s = simulation.now_s
    assert node.received(Heartbeat(1, 1, 1, ((2, 1),)), now_s) == ()
    assert node.unreachable == set()
    assert node.received(Heartbeat(2, 1, 1, ((0, 1),)), now_s) == ()


def far_away(now_s: float) -> Membership:
    """Node 0 of ten; its neighbours are 1, 2, 8 and 9."""
    node = Membership(0, 1, now_s)
    node.follow(cluster(1, dict.fromkeys(range(10), 1)), now_s)
    return node


def test_a_suspicion_is_told_to_everybody_at_once() -> None:
    node = far_away(0.0)
    for step in range(1, 40):
        now_s = step / 10
        tick = node.tick(now_s)
        for other in range(2, 10):
            node.received(Heartbeat(other, 1, 1, ()), now_s)
        if step == 3:
            node.received(Heartbeat(1, 1, 1, ()), now_s)
        if tick.events:
            assert tick.events == (LivenessEvent(1, Liveness.SUSPECT),)
            assert tick.targets == tuple(range(1, 10))
            assert 1.75 < now_s < 1.95
            return
    raise AssertionError("no suspicion")


def test_hearsay_lapses_unless_repeated() -> None:
    node = far_away(0.0)
    log = []
    for step in range(1, 60):
        now_s = step / 10
        log += [(now_s, event) for event in node.tick(now_s).events]
        for other in (1, 2, 8, 9):
            events = node.received(Heartbeat(other, 1, 1, ()), now_s)
            log += [(now_s, event) for event in events]
        for voter in (4, 6):
            if step == 20:
                events = node.received(Heartbeat(voter, 1, 1, ((5, 1),)), now_s)
                log += [(now_s, event) for event in events]
    assert log == [
        (2.0, LivenessEvent(5, Liveness.UNREACHABLE)),
        (4.0, LivenessEvent(5, Liveness.BACK)),
    ]


def test_a_beat_of_a_stranger_or_a_predecessor_is_ignored() -> None:
    node = Membership(0, 1, 0.0)
    node.follow(cluster(1, {0: 1, 1: 4}), 0.0)
    for step in range(16):
        node.tick(step / 10)
    assert node.tick(1.6).events == ()
    assert node.unreachable == {1}
    assert node.received(Heartbeat(1, 3, 1, ()), 1.7) == ()
    assert node.received(Heartbeat(7, 1, 1, ()), 1.7) == ()
    assert node.unreachable == {1}
    assert node.received(Heartbeat(1, 5, 1, ()), 1.7) == (LivenessEvent(1, Liveness.BACK),)


def test_a_restarted_node_begins_as_alive() -> None:
    simulation = Simulation(4)
    simulation.run(5)
    simulation.kill(2)
    simulation.run(5)
    simulation.map = cluster(2, {0: 1, 1: 1, 2: 2, 3: 1})
    for index, node in simulation.nodes.items():
        assert node.follow(simulation.map, simulation.now_s) == (
            LivenessEvent(2, Liveness.BACK),
        ), index
        assert node.follow(simulation.map, simulation.now_s) == ()
    simulation.start(2, 2)
    simulation.log.clear()
    simulation.run(10)
    assert simulation.log == []


def test_a_node_outside_the_map_watches_nobody() -> None:
    node = Membership(5, 1, 0.0)
    node.follow(cluster(1, {0: 1, 5: 1}), 0.0)
    node.follow(cluster(2, {0: 1, 1: 1}), 0.0)
    assert node.tick(0.1).targets == ()
    assert node.tick(10.0).events == ()
    assert node.heartbeat() == Heartbeat(5, 1, 2, ())


def test_a_large_ring_stays_quiet() -> None:
    simulation = Simulation(40)
    simulation.run(3)
    node = simulation.nodes[7]
    beaten = [node.tick(simulation.now_s + step / 10).targets for step in range(10)]
    assert [targets for targets in beaten if targets] == [(5, 6, 8, 9)] * 2


@pytest.mark.parametrize("seed", range(4))
def test_lost_messages_leave_no_trace_once_they_arrive_again(seed: int) -> None:
    simulation = Simulation(7, seed)
    simulation.loss = 0.7
    simulation.run(60)
    assert simulation.log, "so much loss must show"
    simulation.loss = 0.0
    simulation.run(3)
    assert all(node.unreachable == node.suspected == set() for node in simulation.nodes.values())
