"""Announcers, a faulty network and directories, against what the nodes really hold.

Messages and answers are lost, repeated and late; nodes crash and come back with another
incarnation, join and leave; maps arrive at different times; homes are told of refusals, rightly
and wrongly. At all times a home names only what a node has held; once messages arrive again,
every home knows exactly the truth about its spans.
"""

from dataclasses import dataclass, field
from enum import Enum

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from kvstore.announce import Announcer
from kvstore.changes import Changes
from kvstore.cluster_map import ClusterMap, NodeInfo
from kvstore.directory import Announcement, Answer, Directory
from kvstore.key import Keys
from kvstore.placement import homes

NODES_MAX = 5
KEYS = 12
CELLS = 3
SPAN_OF_KEY = [1000 + key // 3 for key in range(KEYS)]
ALL_KEYS: Keys = np.random.default_rng(3).integers(0, 256, (KEYS, 32), np.uint8)

Held = set[tuple[int, int]]


def changes_of(events: list[tuple[int, int, bool]]) -> Changes:
    keys = [key for key, _, _ in events]
    return Changes(
        ALL_KEYS[keys] if keys else np.empty((0, 32), np.uint8),
        np.array([cell for _, cell, _ in events], np.uint8),
        np.array([SPAN_OF_KEY[key] for key in keys], np.uint64),
        np.array([added for _, _, added in events], np.bool_),
    )


class Fate(Enum):
    """What the network does to a message and its answer."""

    ARRIVES = 1
    LOST = 2
    DELAYED = 3
    REPEATED = 4
    REPEATED_LATER = 5
    ANSWER_LOST = 6
    ANSWER_DELAYED = 7


@dataclass
class Process:
    """One life of a node: a change source, its announcer and its directory."""

    index: int
    incarnation: int
    held: Held
    events: list[tuple[int, int, bool]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.announcer = Announcer(self.index, self.incarnation, self)
        self.directory = Directory()
        self.epoch = 0

    def toggle(self, key: int, cell: int) -> None:
        self.held ^= {(key, cell)}
        self.events.append((key, cell, (key, cell) in self.held))

    def drain_changes(self) -> Changes:
        events, self.events = self.events, []
        return changes_of(events)

    def snapshot(self) -> Changes:
        return changes_of([(key, cell, True) for key, cell in sorted(self.held)])

    def follow(self, cluster_map: ClusterMap) -> None:
        if cluster_map.epoch > self.epoch:
            self.epoch = cluster_map.epoch
            self.announcer.follow(cluster_map)
            self.directory.follow(cluster_map)

    def info(self) -> NodeInfo:
        name = f"node-{self.index}"
        return NodeInfo(self.index, name, name, self.incarnation, "h:1", "h:2", "/arena")


class Streams(RuleBasedStateMachine):
    @initialize(count=st.integers(1, 3))
    def start(self, count: int) -> None:
        self.processes: dict[int, Process] = {}
        self.next_index = 0
        self.ever_held: set[tuple[int, int, int]] = set()
        self.messages: list[tuple[int, Announcement]] = []
        self.answers: list[tuple[int, int, Answer]] = []
        self.map = ClusterMap(0, ())
        for _ in range(count):
            self.processes[self.next_index] = Process(self.next_index, 1, set())
            self.next_index += 1
        self.publish()
        for process in self.processes.values():
            process.follow(self.map)

    def publish(self) -> None:
        nodes = [process.info() for process in self.processes.values()]
        self.map = ClusterMap.of(self.map.epoch + 1, nodes)

    def pick(self, number: int) -> Process:
        indexes = sorted(self.processes)
        return self.processes[indexes[number % len(indexes)]]

    picks = st.integers(0, 59)
    fates = st.lists(st.sampled_from([Fate.ARRIVES, *Fate]), min_size=1, max_size=6)
    cells = st.lists(
        st.tuples(st.integers(0, KEYS - 1), st.integers(0, CELLS - 1)), min_size=1, max_size=10
    )

    @rule(who=picks, cells=cells)
    def hold_or_let_go(self, who: int, cells: list[tuple[int, int]]) -> None:
        process = self.pick(who)
        for key, cell in cells:
            process.toggle(key, cell)
            self.ever_held.add((process.index, key, cell))

    @rule(who=picks, cells=cells, fates=fates)
    def exchange(self, who: int, cells: list[tuple[int, int]], fates: list[Fate]) -> None:
        """A node changes and talks; each message in turn meets a fate."""
        process = self.pick(who)
        homes_now = process.announcer.homes
        for turn, fate in enumerate(fates):
            self.hold_or_let_go(who, cells[turn : turn + 2])
            for home in homes_now:
                message = process.announcer.message_for(home.index)
                if message is not None and home.index in self.processes:
                    self.meet(fate, process, home.index, message)

    def meet(self, fate: Fate, process: Process, home: int, message: Announcement) -> None:
        directory = self.processes[home].directory
        if fate in (Fate.DELAYED, Fate.REPEATED_LATER):
            self.messages.append((home, message))
        if fate in (Fate.LOST, Fate.DELAYED):
            return
        answer = directory.apply(message)
        if fate is Fate.REPEATED:
            directory.apply(message)
        if fate is Fate.ANSWER_DELAYED:
            self.answers.append((message.node, home, answer))
        elif fate is not Fate.ANSWER_LOST:
            process.announcer.answered(home, answer)

    @precondition(lambda self: self.messages)
    @rule(which=picks, again=st.booleans())
    def arrive_late(self, which: int, again: bool) -> None:
        at = which % len(self.messages)
        home, message = self.messages[at] if again else self.messages.pop(at)
        if home in self.processes:
            answer = self.processes[home].directory.apply(message)
            self.answers.append((message.node, home, answer))

    @precondition(lambda self: self.answers)
    @rule(which=picks, again=st.booleans())
    def answer_late(self, which: int, again: bool) -> None:
        at = which % len(self.answers)
        sender, home, answer = self.answers[at] if again else self.answers.pop(at)
        if sender in self.processes:
            self.processes[sender].announcer.answered(home, answer)

    @rule(home=picks)
    def replay(self, home: int) -> None:
        """Everything still under way arrives at one home, in the order in which it was sent."""
        index = self.pick(home).index
        for _, message in [entry for entry in self.messages if entry[0] == index]:
            self.processes[index].directory.apply(message)

    @rule(home=picks, who=picks)
    def forget(self, home: int, who: int) -> None:
        self.pick(home).directory.drop(self.pick(who).index)

    @rule(who=picks, keeps=st.booleans())
    def restart(self, who: int, keeps: bool) -> None:
        old = self.pick(who)
        held = set(old.held) if keeps else set()
        self.processes[old.index] = Process(old.index, old.incarnation + 1, held)
        self.publish()
        self.processes[old.index].follow(self.map)

    @precondition(lambda self: len(self.processes) < NODES_MAX)
    @rule()
    def join(self) -> None:
        process = self.processes[self.next_index] = Process(self.next_index, 1, set())
        self.next_index += 1
        self.publish()
        process.follow(self.map)

    @precondition(lambda self: len(self.processes) > 1)
    @rule(who=picks)
    def leave(self, who: int) -> None:
        del self.processes[self.pick(who).index]
        self.publish()

    @rule(who=picks)
    def learn_the_map(self, who: int) -> None:
        self.pick(who).follow(self.map)

    @rule(who=picks, number=picks, wrongly=st.booleans())
    def refuse(self, who: int, number: int, wrongly: bool) -> None:
        """A reader tells the homes that a node has not what it has just lost, or what it has."""
        process = self.pick(who)
        if not process.held:
            return
        key, cell = sorted(process.held)[number % len(process.held)]
        if not wrongly:
            process.toggle(key, cell)
        refused = changes_of([(key, cell, False)])
        for home in homes(SPAN_OF_KEY[key], self.map):
            self.processes[home].directory.remove(process.index, refused.keys, refused.cells)

    @rule()
    def check(self) -> None:
        for process in self.processes.values():
            process.announcer.check()

    @invariant()
    def names_only_what_was_held(self) -> None:
        for process in self.processes.values():
            for key, node, cell in self.remembered(process.directory):
                assert (node, key, cell) in self.ever_held

    @rule()
    def converge(self) -> None:
        for process in self.processes.values():
            process.follow(self.map)
        for _ in range(2):
            for process in self.processes.values():
                self.talk(process)
                process.announcer.check()
        for process in self.processes.values():
            self.talk(process)
            assert process.announcer.settled
        for process in self.processes.values():
            self.check_home(process)

    def teardown(self) -> None:
        if hasattr(self, "processes"):
            self.converge()

    def talk(self, process: Process) -> None:
        """Exchange messages with the homes that exist until there is nothing to say."""
        for home in process.announcer.homes:
            if home.index not in self.processes:
                continue
            directory = self.processes[home.index].directory
            for _ in range(20):
                message = process.announcer.message_for(home.index)
                if message is None:
                    break
                process.announcer.answered(home.index, directory.apply(message))
            else:
                raise AssertionError("no end of messages")

    def check_home(self, home: Process) -> None:
        truth = {
            (key, process.index, cell)
            for process in self.processes.values()
            for key, cell in process.held
            if home.index in homes(SPAN_OF_KEY[key], self.map)
        }
        known = self.remembered(home.directory)
        assert {entry for entry in known if entry[1] in self.processes} == truth
        for index in self.processes:
            cells = sum(entry[1] == index for entry in known)
            assert home.directory.digest(index).cells == cells

    def remembered(self, directory: Directory) -> set[tuple[int, int, int]]:
        """All (key, node, cell) that a directory names."""
        located = directory.locate(ALL_KEYS)
        rows = np.repeat(np.arange(KEYS), located.counts).tolist()
        return {
            (key, node, cell)
            for key, node, mask in zip(
                rows, located.nodes.tolist(), located.masks.tolist(), strict=True
            )
            for cell in range(64)
            if mask >> cell & 1
        }


TestStreams = Streams.TestCase
TestStreams.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
