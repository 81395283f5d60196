"""The sender's side: what is said to whom, when a stream starts over, and what stays bounded."""

import numpy as np
import pytest

from kvstore import announce
from kvstore.announce import Announcer
from kvstore.changes import Changes, Digest
from kvstore.cluster_map import ClusterMap, NodeInfo
from kvstore.directory import ANNOUNCEMENT_CHANGES_MAX, Answer, Directory, Reception
from kvstore.errors import UsageError
from kvstore.key import Keys
from kvstore.placement import homes

ME = 0
KEYS: Keys = np.random.default_rng(2).integers(0, 256, (6000, 32), np.uint8)


class Source:
    """A node that holds cell 0 of some of ``KEYS``; key ``i`` is in span ``i % 50``."""

    def __init__(self) -> None:
        self.held: list[int] = []
        self.undrained = Changes.empty()
        self.snapshots = 0

    def hold(self, *keys: int) -> None:
        self.held += keys
        self.undrained = Changes.concat([self.undrained, as_changes(list(keys), True)])

    def let_go(self, *keys: int) -> None:
        self.held = [key for key in self.held if key not in keys]
        self.undrained = Changes.concat([self.undrained, as_changes(list(keys), False)])

    def drain_changes(self) -> Changes:
        drained, self.undrained = self.undrained, Changes.empty()
        return drained

    def snapshot(self) -> Changes:
        self.snapshots += 1
        return as_changes(self.held, True)


def as_changes(keys: list[int], added: bool) -> Changes:
    count = len(keys)
    spans = np.array(keys, np.uint64) % np.uint64(50)
    return Changes(KEYS[keys], np.zeros(count, np.uint8), spans, np.full(count, added))


def cluster(epoch: int, *indexes: int, incarnation: int = 1) -> ClusterMap:
    return ClusterMap.of(
        epoch,
        [
            NodeInfo(index, f"node-{index}", "host", incarnation, "h:1", "h:2", "/arena")
            for index in indexes
        ],
    )


class World:
    """One sender and the directories of its homes, with a perfect network."""

    def __init__(self, *indexes: int) -> None:
        self.source = Source()
        self.announcer = Announcer(ME, 1, self.source)
        self.directories = {index: Directory() for index in indexes}
        self.map = cluster(1, *indexes)
        self.announcer.follow(self.map)

    def move(self, cluster_map: ClusterMap) -> None:
        self.map = cluster_map
        for node in cluster_map.nodes:
            self.directories.setdefault(node.index, Directory())
        self.announcer.follow(cluster_map)

    def step(self, home: int) -> Answer | None:
        message = self.announcer.message_for(home)
        if message is None:
            return None
        answer = self.directories[home].apply(message)
        self.announcer.answered(home, answer)
        return answer

    def talk(self) -> list[Answer]:
        answers = []
        for node in self.announcer.homes:
            while (answer := self.step(node.index)) is not None:
                answers.append(answer)
        return answers

    def check(self) -> list[Answer]:
        self.announcer.check()
        return self.talk()

    def known(self, home: int) -> set[int]:
        parts = [KEYS[start : start + 3000] for start in (0, 3000)]
        counts = np.concatenate([self.directories[home].locate(part).counts for part in parts])
        return set(np.flatnonzero(counts).tolist())

    def expected(self, home: int) -> set[int]:
        return {key for key in self.source.held if home in homes(key % 50, self.map)}

    def agrees(self) -> bool:
        names = [node.index for node in self.map.nodes]
        return self.announcer.settled and all(
            self.known(home) == self.expected(home) for home in names
        )


def test_tells_every_home_its_keys_only() -> None:
    world = World(0, 1, 2, 3)
    world.source.hold(*range(200))
    world.talk()
    assert world.agrees()
    world.source.let_go(*range(0, 200, 3))
    assert not world.announcer.settled
    world.talk()
    assert world.agrees()
    assert len(world.known(1)) not in (0, len(world.source.held))


def test_the_same_message_until_it_is_answered() -> None:
    world = World(0)
    world.talk()
    world.source.hold(1)
    first = world.announcer.message_for(0)
    world.source.hold(2)
    again = world.announcer.message_for(0)
    assert first is not None
    assert again is not None
    assert (again.stream, again.sequence) == (first.stream, first.sequence)
    assert again.changes is first.changes
    world.talk()
    assert world.agrees()


def test_a_silent_home_costs_no_memory_and_no_snapshot() -> None:
    world = World(0, 1)
    for start in range(0, 3000, 100):
        world.source.hold(*range(start, start + 100))
        message = world.announcer.message_for(1)
        assert message is not None
        assert (message.sequence, len(message.changes)) == (0, 0)
    assert world.source.snapshots == 0


def test_large_snapshots_are_cut_into_messages() -> None:
    world = World(0)
    world.source.hold(*range(2500))
    hello, *rest = world.talk()
    assert hello.digest.cells == 0
    assert [answer.digest.cells for answer in rest] == [
        ANNOUNCEMENT_CHANGES_MAX,
        2 * ANNOUNCEMENT_CHANGES_MAX,
        2500,
    ]


def test_too_much_waiting_starts_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(announce, "WAITING_CHANGES_MAX", 100)
    world = World(0, 1)
    world.source.hold(*range(60))
    world.talk()
    for key in range(60, 300):
        world.source.hold(key)
    message = world.announcer.message_for(0)
    assert message is not None
    assert (message.stream, message.sequence, len(message.changes)) == (2, 0, 0)
    world.talk()
    assert world.agrees()


def test_a_home_that_lost_its_memory_is_told_again() -> None:
    world = World(0, 1)
    world.source.hold(*range(100))
    world.talk()
    world.directories[1] = Directory()
    assert world.talk() == []
    receptions = [answer.reception for answer in world.check()]
    assert Reception.GAP in receptions
    assert world.agrees()


def test_what_was_replaced_as_a_whole_is_told_anew() -> None:
    world = World(0, 1)
    world.source.hold(*range(100))
    world.talk()
    world.source.held = list(range(50, 150))
    world.announcer.start_over()
    world.source.hold(200)
    world.talk()
    assert world.agrees()
    assert world.known(0) == {*range(50, 150), 200}


def test_checks_of_equal_homes_say_nothing_more() -> None:
    world = World(0, 1)
    world.source.hold(*range(100))
    world.talk()
    assert [answer.reception for answer in world.check()] == [Reception.APPLIED] * 2
    assert world.source.snapshots == 2


def test_a_wrong_refusal_is_repaired_and_a_right_one_needs_nothing() -> None:
    world = World(0, 1)
    world.source.hold(*range(100))
    world.talk()
    cell = np.zeros(1, np.uint8)
    world.source.let_go(7)
    for directory in world.directories.values():
        directory.remove(ME, KEYS[[7]], cell)
    world.talk()
    world.check()
    assert world.source.snapshots == 2
    world.directories[0].remove(ME, KEYS[[8]], cell)
    world.check()
    assert world.source.snapshots == 3
    assert world.agrees()


def test_a_refusal_while_its_change_waits_does_not_start_over() -> None:
    world = World(0)
    world.source.hold(*range(50))
    world.talk()
    world.source.hold(60)
    message = world.announcer.message_for(0)
    assert message is not None
    world.source.let_go(5)
    world.directories[0].remove(ME, KEYS[[5]], np.zeros(1, np.uint8))
    world.announcer.answered(0, world.directories[0].apply(message))
    world.talk()
    assert world.source.snapshots == 1
    assert world.agrees()


def test_a_newer_map_moves_spans() -> None:
    world = World(0, 1, 2)
    world.source.hold(*range(200))
    world.talk()
    world.move(cluster(2, 0, 1, 2, 5))
    world.source.hold(*range(200, 260))
    world.talk()
    assert world.agrees()
    world.move(cluster(3, 0, 5))
    world.source.let_go(*range(100))
    world.talk()
    assert world.agrees()
    assert world.directories[0].digest(ME).cells == len(world.expected(0))


def test_changes_around_a_snapshot_are_told_once() -> None:
    world = World(0, 1)
    hello = world.announcer.message_for(0)
    assert hello is not None
    world.source.hold(*range(20))
    world.announcer.answered(0, world.directories[0].apply(hello))
    world.talk()
    world.source.hold(*range(20, 40))
    world.move(cluster(2, 0, 1, 2))
    taken = world.source.snapshots
    world.talk()
    world.check()
    assert world.source.snapshots == taken + 1, "one for the node that joined"
    assert world.agrees()


@pytest.mark.parametrize(("stream", "expected", "next_stream"), [(1, 1, 2), (6, 2, 7), (0, 0, 2)])
def test_starts_over_when_a_home_is_elsewhere(stream: int, expected: int, next_stream: int) -> None:
    world = World(0)
    world.source.hold(1)
    world.talk()
    world.announcer.answered(0, Answer(Reception.GAP, 1, stream, expected, Digest()))
    message = world.announcer.message_for(0)
    assert message is not None
    assert (message.stream, message.sequence) == (next_stream, 0)
    world.talk()
    assert world.agrees()


def test_an_older_map_changes_nothing() -> None:
    world = World(0, 1)
    world.announcer.follow(cluster(1, 0, 1, 2))
    assert [node.index for node in world.announcer.homes] == [0, 1]
    with pytest.raises(UsageError, match="no home"):
        world.announcer.message_for(2)


def test_a_restarted_home_gets_a_new_stream() -> None:
    world = World(0, 1)
    world.source.hold(*range(100))
    world.talk()
    world.directories = {0: Directory(), 1: Directory()}
    world.move(cluster(2, 0, 1, incarnation=2))
    world.talk()
    assert world.agrees()


def test_late_answers_do_no_harm() -> None:
    world = World(0)
    world.source.hold(1)
    answers = world.talk()
    world.source.hold(2)
    world.talk()
    for answer in answers:
        world.announcer.answered(0, answer)
    world.announcer.answered(9, answers[0])
    world.talk()
    assert world.agrees()


def test_a_superseded_sender_falls_silent() -> None:
    world = World(0)
    world.talk()
    world.source.hold(1)
    successor = Announcer(ME, 2, Source())
    successor.follow(world.map)
    hello = successor.message_for(0)
    assert hello is not None
    world.directories[0].apply(hello)
    answer = world.step(0)
    assert answer is not None
    assert answer.reception is Reception.STALE
    assert world.announcer.message_for(0) is None
