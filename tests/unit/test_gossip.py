"""Books of deletes and epochs become alike, and who was away shows nothing before it has read them.

Real nodes and ports; a node that is started again finds its arena and its own folder as they were.
"""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from kvstore.clock import ManualClock
from kvstore.cluster_map import ClusterMap, NodeInfo
from kvstore.fs import LinuxFileSystem
from kvstore.lasting import Lasting
from kvstore.rpc import leavers
from kvstore.rpc.client import ControlClient
from kvstore.tenants import tenant_digest
from kvstore.tiers.start import open_tier
from tests.served import Served, eventually, put_on, some_keys
from tests.worlds import shared_folder

KEYS = some_keys(4)
GONE, KEPT = KEYS[:3], KEYS[3:]
NOBODY = "127.0.0.1:1"


@dataclass
class Company:
    """Nodes by their index, and the map that stands for a coordinator's."""

    folder: Path
    stack: ExitStack
    nodes: dict[int, Served] = field(default_factory=dict)
    lives: dict[int, int] = field(default_factory=dict)
    epoch: int = 0

    def start(self, index: int) -> Served:
        """Start a node, or its successor."""
        arena, own = self.folder / f"arena-{index}", self.folder / f"own-{index}"
        files = LinuxFileSystem()
        for each in (arena, own):
            files.make_folder(each)
        self.lives[index] = self.lives.get(index, 0) + 1
        tier = open_tier(files, ManualClock(), arena, 1 << 20, self.lives[index])
        served = Served(arena, index=index, lasting=Lasting(files, own), tier=tier)
        self.stack.callback(served.stop)
        self.nodes[index] = served
        return served

    def publish(self, *away: int) -> None:
        """Everybody takes a map of all; those ``away`` are not where it says, and are not told."""
        self.epoch += 1
        infos = [self._found(index, away) for index in self.nodes]
        for index, served in self.nodes.items():
            if index not in away:
                served.join_map(ClusterMap.of(self.epoch, infos))

    def leave_out(self, index: int, *told: int) -> None:
        """Those that are ``told`` take a map of all but one."""
        self.epoch += 1
        infos = [served.info for other, served in self.nodes.items() if other != index]
        for other in told:
            self.nodes[other].join_map(ClusterMap.of(self.epoch, infos))

    def _found(self, index: int, away: tuple[int, ...]) -> NodeInfo:
        info = self.nodes[index].info
        return replace(info, control=NOBODY) if index in away else info


@pytest.fixture
def company() -> Iterator[Company]:
    with shared_folder() as folder, ExitStack() as stack:
        yield Company(folder, stack)


def shown(served: Served) -> list[bool]:
    """Which of the blocks a look-up finds, in the table and by the node."""
    rows = [KEYS[row : row + 1] for row in range(len(KEYS))]
    by_node = served.call(lambda: [served.node.lookup(row, 1) == 1 for row in rows])
    announced = served.call(lambda: len(served.node.snapshot()))
    assert announced == sum(by_node), "what is found is what is announced"
    return by_node


def delete(served: Served) -> frozenset[int]:
    """Who has not heard of it; 0 is the node itself."""
    with closing(ControlClient(served.address)) as control:
        spread = control.life.delete(GONE)
        return spread.pending if spread.durable else spread.pending | {0}


def test_books_that_differ_become_alike_in_both_directions(company: Company) -> None:
    first, second = company.start(1), company.start(2)
    company.publish(2)
    put_on(second, KEYS)
    delete(first)
    tenant = tenant_digest("somebody")
    second.call(lambda: second.node.life.erase(tenant))
    company.publish()
    first.beats_until(lambda: shown(second) == [False] * 3 + [True])
    first.beats_until(lambda: first.node.life.tenants.epoch_of(tenant) == 1)
    second.call(second.node.tick)
    assert first.neighbourhood.books == second.neighbourhood.books


@pytest.mark.parametrize("deleted_while_down", [True, False])
def test_who_was_away_shows_nothing_before_it_has_read_the_others(
    company: Company, deleted_while_down: bool
) -> None:
    first, second = company.start(1), company.start(2)
    company.publish()
    put_on(second, KEYS)
    second.stop()
    if deleted_while_down:
        delete(first)
    second = company.start(2)
    assert second.node.life.is_sealed
    assert shown(second) == [False] * 4
    company.publish()
    eventually(lambda: not second.node.life.is_sealed)
    assert shown(second) == [not deleted_while_down] * 3 + [True]


def test_it_waits_for_every_node_of_the_map_and_says_so_once(
    company: Company, caplog: pytest.LogCaptureFixture
) -> None:
    first, second, third = (company.start(index) for index in (1, 2, 3))
    company.publish()
    put_on(second, KEYS)
    second.stop()
    third.stop()
    second = company.start(2)
    with caplog.at_level(logging.WARNING):
        company.publish(3)
        eventually(lambda: "node 3 has said" in caplog.text or "node 1, 3" in caplog.text)
        company.publish(3)
        assert caplog.text.count("nothing is shown or stored here before") == 1
    assert shown(second) == [False] * 4
    third = company.start(3)
    company.publish()
    eventually(lambda: not second.node.life.is_sealed)
    assert shown(second) == [True] * 4
    assert first.node.life.is_sealed is False


@pytest.mark.parametrize("order", [(1, 2), (2, 1)])
def test_deleted_blocks_stay_away_through_restarts_in_any_order(
    company: Company, order: tuple[int, int]
) -> None:
    first, second = company.start(1), company.start(2)
    company.publish()
    for served in (first, second):
        put_on(served, KEYS)
    second.stop()
    company.publish(2)
    delete(first)
    first.stop()
    early, late = order
    alone = company.start(early)
    company.publish(late)
    assert shown(alone) == [False] * 4
    company.start(late)
    company.publish()
    eventually(lambda: not any(node.node.life.is_sealed for node in company.nodes.values()))
    for served in company.nodes.values():
        assert shown(served) == [False] * 3 + [True]


def test_alone_in_its_map_a_node_shows_what_it_has(company: Company) -> None:
    first, _ = company.start(1), company.start(2)
    company.publish()
    put_on(first, KEYS)
    first.stop()
    del company.nodes[2]
    first = company.start(1)
    assert first.node.life.is_sealed
    company.publish()
    assert not first.node.life.is_sealed
    assert shown(first) == [True] * 4


def test_who_leaves_the_map_is_not_waited_for(company: Company) -> None:
    first, _ = company.start(1), company.start(2)
    company.publish()
    put_on(first, KEYS)
    first.stop()
    first = company.start(1)
    company.publish(2)
    assert first.node.life.is_sealed
    del company.nodes[2]
    company.publish()
    assert not first.node.life.is_sealed


@pytest.mark.parametrize("was_away_before", [False, True])
def test_who_is_left_out_shows_nothing_before_it_has_read_the_others_anew(
    company: Company, was_away_before: bool
) -> None:
    first, second = company.start(1), company.start(2)
    company.publish()
    put_on(second, KEYS)
    if was_away_before:
        second.stop()
        second = company.start(2)
        company.publish()
        eventually(lambda: not second.node.life.is_sealed)
    assert shown(second) == [True] * 4
    company.leave_out(2, 1, 2)
    assert shown(second) == [False] * 4
    eventually(lambda: not first.neighbourhood.leavers)
    assert delete(first) == frozenset()
    company.publish()
    eventually(lambda: not second.node.life.is_sealed)
    assert shown(second) == [False] * 3 + [True]


def test_who_is_left_out_has_no_sessions_until_it_is_back(company: Company) -> None:
    """Its clients would go by what it knew, and others do not wait for them."""
    _, second = company.start(1), company.start(2)
    company.publish()
    control = ControlClient(second.address)
    try:
        session = control.session
        company.leave_out(2, 1, 2)
        assert not second.call(lambda: second.node.has_session(session))
        eventually(lambda: not control.has_session())
        company.publish()
        eventually(control.has_session)
        assert control.session != session
    finally:
        control.close()


def test_who_was_left_out_waits_until_the_others_know_that_it_is_back(company: Company) -> None:
    """Who goes by an older map does not tell it of deletes."""
    first, second = company.start(1), company.start(2)
    company.publish()
    put_on(second, KEYS)
    company.leave_out(2, 1, 2)
    company.epoch += 1
    back = ClusterMap.of(company.epoch, [first.info, second.info])
    second.join_map(back)
    eventually(lambda: not second.node.life.is_sealed)
    assert first.bulletin.now.map == back
    assert set(first.neighbourhood.peers) == {2}


def test_who_is_left_out_is_told_so_and_named_until_it_knows(company: Company) -> None:
    first, second = company.start(1), company.start(2)
    company.publish()
    put_on(second, KEYS)
    company.leave_out(2, 1)
    eventually(lambda: not first.neighbourhood.leavers)
    assert second.node.life.is_sealed
    assert delete(first) == frozenset()
    company.publish()
    eventually(lambda: not second.node.life.is_sealed)
    second.stop()
    company.leave_out(2, 1)
    assert first.neighbourhood.leavers == {2}
    assert delete(first) == {2}
    second = company.start(2)
    company.publish()
    assert not first.neighbourhood.leavers
    eventually(lambda: not second.node.life.is_sealed)
    assert delete(first) == frozenset()


def test_who_does_not_answer_is_no_leaver_for_ever(
    company: Company, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(leavers, "LEAVER_S", 0.0)
    first, second = company.start(1), company.start(2)
    company.publish()
    second.stop()
    with caplog.at_level(logging.WARNING):
        company.leave_out(2, 1)
        eventually(lambda: not first.neighbourhood.leavers)
    assert "node 2 has not said that it knows" in caplog.text
    assert delete(first) == frozenset()


def test_who_has_heard_of_no_map_since_its_start_may_have_others_to_tell(company: Company) -> None:
    first, second = company.start(1), company.start(2)
    assert delete(first) == frozenset(), "always alone so far"
    company.publish()
    put_on(second, KEYS)
    first.stop()
    first = company.start(1)
    assert delete(first) == {0}
    assert shown(second) == [True] * 4
    company.publish()
    assert delete(first) == frozenset()
    assert shown(second) == [False] * 3 + [True]
