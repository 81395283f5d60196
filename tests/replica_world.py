"""Some nodes in one process, which keep copies of each other's holds, and lose sight of each other.

The nodes are those of `tests.life_world`, on one clock. Calls between them go straight from one to
the other, unless the link is cut or one of them is down; any call can be made to fail. A node that
was down is sealed until it has read the books of all others, as it is in a real tier.
"""

import itertools
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvstore.burials import PAGE_BURIALS_MAX
from kvstore.calls import AcquireReply, CopyState
from kvstore.clock import Deadline, ManualClock
from kvstore.copying import Source, Target, copy
from kvstore.errors import UnavailableError
from kvstore.fs import LinuxFileSystem
from kvstore.key import Keys
from kvstore.leaf_sizes import LeafSizes
from kvstore.replication import Other, Pace, Parcel, Survey
from kvstore.table import Cells
from kvstore.tenants import PAGE_TENANTS_MAX
from kvstore.transport.local import LocalTransport
from kvstore.transport.mapped import MappedNode
from tests.life_world import LifeWorld, keys_of
from tests.worlds import shared_folder

STEP_S = 0.1
GRACE_S = 10.0
STEPS_AT_ONCE_MAX = 64
"""Of one node in one moment: more would be a loop without end."""


@dataclass
class Sent:
    """What has gone from one node to another."""

    when_s: float
    source: str
    target: str
    cells: int


class Call:
    """A node's calls as `kvstore.rpc.client` has them; each may fail."""

    def __init__(self, world: LifeWorld, step: Callable[[str], None]) -> None:
        self._world = world
        self._step = step

    @property
    def session(self) -> int:
        return self._world.session

    def acquire(self, session: int, keys: Keys, cells: Cells, lease_ms: int) -> AcquireReply:
        self._step("acquire")
        return self._world.lease(session, keys, cells, lease_ms)

    def __getattr__(self, name: str) -> Any:
        called = getattr(self._world.node, name)

        def call(*arguments: Any) -> Any:
            try:
                self._step(name)
            except UnavailableError:
                # As a client does who can't say what has become of its slots.
                self._world.node.close_session(self._world.session)
                self._world.session = self._world.node.open_session()
                raise
            return called(*arguments)

        return call


class ReplicaWorld:
    """Nodes by their names: a, b, c, ..."""

    def __init__(
        self, stack: ExitStack, names: Iterable[str] = "ab", bytes_per_s: int = 1 << 30, **how: Any
    ) -> None:
        self.clock = ManualClock()
        self.down: set[str] = set()
        self.cut: set[frozenset[str]] = set()
        self.near: set[str] = set()
        """Who is on the same host as whoever asks."""
        self.sent: list[Sent] = []
        self.calls = 0
        self.fail_at = 0
        self.fails_for_good = False
        self.is_lost: Callable[[str], bool] = lambda call: False
        self.during_parcel: Callable[[], None] = lambda: None
        self.is_slow = False
        """Surveys are not answered, and arrive with ``arrive``."""
        self._under_way: list[Survey] = []
        self._operations = itertools.count(1)
        self._sizes = LeafSizes()
        pace = Pace(bytes_per_s, GRACE_S)
        self.nodes: dict[str, LifeWorld] = {}
        for name in names:
            folder: Path = stack.enter_context(shared_folder())
            world = LifeWorld(folder, clock=self.clock, node_id=name, pace=pace, **how)
            world.life.keep_company()
            world.life.unseal()
            self.nodes[name] = world

    def up(self) -> list[str]:
        return [name for name in self.nodes if name not in self.down]

    def reach(self, one: str, other: str) -> bool:
        return not ({one, other} & self.down or frozenset((one, other)) in self.cut)

    def kill(self, name: str) -> None:
        self.down.add(name)

    def restart(self, name: str, adopt: bool = True) -> None:
        """Its successor, on the same arena, or on an empty one of the same folder."""
        self.down.discard(name)
        self.nodes[name].restart(adopt)
        assert (
            self.nodes[name].life.is_sealed or not adopt or not self.nodes[name].host.stats.adopted
        )
        self.unseal()

    def unseal(self) -> None:
        """Whoever can read all others' books does, and shows what it has."""
        for name in self.up():
            world = self.nodes[name]
            others = [other for other in self.nodes if other != name]
            if world.life.is_sealed and all(self.reach(name, other) for other in others):
                for other in others:
                    self._read_books(name, other)
                world.life.unseal()

    def gossip(self) -> None:
        """Everybody reads everybody's books."""
        for name, other in itertools.permutations(self.up(), 2):
            if self.reach(name, other):
                self._read_books(name, other)

    def delete(self, name: str, *numbers: int, forward: bool = True) -> set[str]:
        """Asked of one node, which tells the others; who has done it."""
        deletion = self.nodes[name].delete(*numbers)
        told = {name}
        for other in self.up():
            if forward and other != name and self.reach(name, other):
                node = self.nodes[other].node
                copied = node.life.delete(keys_of(*numbers), deletion.id)
                while not copied.is_done:
                    node.behind.poll()
                assert node.life.bury(copied)
                told.add(other)
        return told

    def pass_time(self, seconds: float, stands_still: Iterable[str] = ()) -> None:
        """Everybody ticks and replicates, but for those that stand still."""
        for _ in range(max(1, round(seconds / STEP_S))):
            self.clock.advance(STEP_S)
            for name in self.up():
                if name in stands_still:
                    continue
                world = self.nodes[name]
                world.node.beat(world.session)
                world.node.tick()
                self.replicate(name)

    def arrive(self) -> None:
        """The network is fast again, and what was on its way is there."""
        self.is_slow, late = False, self._under_way
        self._under_way = []
        for step in late:
            self.nodes[step.node].life.carry(step.request)

    def replicate(self, name: str) -> None:
        """All steps that a node has to do just now."""
        world = self.nodes[name]
        if world.life.is_sealed:
            return
        others = {
            other: Other(self.nodes[other].incarnation, is_near=other in self.near)
            for other in self.nodes
            if other != name and self.reach(name, other)
        }
        for _ in range(STEPS_AT_ONCE_MAX):
            step = world.life.replication.next(others)
            if step is None:
                return
            if isinstance(step, Survey):
                world.life.replication.surveyed(self._carry(step))
            else:
                world.life.replication.delivered(self._copied(name, step))
        raise AssertionError("it never ends")

    def state(self, name: str, number: int) -> CopyState:
        """What a node says about the copies of a hold on that block."""
        (mark,) = self.nodes[name].life.holds.on(keys_of(number))
        return mark.state

    def found(self, *numbers: int) -> dict[str, int]:
        """How many of these blocks each node shows."""
        return {name: sum(self.nodes[name].found(*numbers)) for name in self.up()}

    def held(self, *numbers: int) -> dict[str, int]:
        """How many of these blocks each node has promised to keep."""
        return {
            name: sum(bool(self.nodes[name].life.holds.on(keys_of(n))) for n in numbers)
            for name in self.up()
        }

    def _read_books(self, name: str, other: str) -> None:
        mine, theirs = self.nodes[name].life, self.nodes[other].life
        mine.deletes_from(theirs.burial_page(0, PAGE_BURIALS_MAX))
        mine.raise_epochs(theirs.tenants.page(0, PAGE_TENANTS_MAX))
        self.nodes[name].node.behind.poll()
        self.nodes[name].life.tick()

    def _carry(self, step: Survey) -> Any:
        try:
            self._step("carry")
        except UnavailableError:
            return None
        if not self.reach(step.request.origin, step.node):
            return None
        if self.is_slow:
            self._under_way.append(step)
            return None
        return self.nodes[step.node].life.carry(step.request)

    def _copied(self, name: str, step: Parcel) -> int:
        if not self.reach(name, step.node):
            return 0
        fs, here, there = LinuxFileSystem(), self.nodes[name], self.nodes[step.node]
        own: Any = Call(here, self._step)
        other: Any = Call(there, self._step)
        source = Source(own, MappedNode.map(fs, here.folder), here.host.table, self._sizes)
        target = Target(other, Filling(there, self))
        deadline = Deadline.after(self.clock, 10.0)
        try:
            arrived = copy(
                step.keys, step.cells, step.burials, source, target, deadline,
                next(self._operations),
            )  # fmt: skip
        except UnavailableError:
            return 0
        self.sent.append(Sent(self.clock.now_s, name, step.node, len(step.cells)))
        return arrived

    def _step(self, name: str) -> None:
        self.calls += 1
        beyond = self.calls - self.fail_at
        if self.is_lost(name) or (
            self.fail_at and (beyond == 0 or (self.fails_for_good and beyond > 0))
        ):
            raise UnavailableError(f"made to fail: call {self.calls}, {name}")


class Filling(LocalTransport):
    """Into the other node's arena; things may happen meanwhile."""

    def __init__(self, world: LifeWorld, replicas: ReplicaWorld) -> None:
        super().__init__(MappedNode.map(LinuxFileSystem(), world.folder))
        self._replicas = replicas

    def write(self, cells: Any, deadline: Deadline) -> Any:
        self._replicas.during_parcel()
        return super().write(cells, deadline)
