"""One world: a cluster, its clients, its trouble, and what must hold. A run follows from its seed.

    0 ─ start ─── trouble ───────────── calm ── settled ── everything is read once more
                  nodes checked every second       promises checked

``run`` raises ``SimulationFailure`` with the last events; a seed is repeated with
``python -m pytest tests/sim --sim-seed=SEED``. In two worlds of five clients also hold prompts, and
erase tenants: what they are promised is in ``tests.sim.vows`` and ``tests.sim.epochs``. In one of
ten they hold with replicas: what must become of the copies is in ``tests.sim.copies``.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from kvstore.cluster_map import ClusterMap
from kvstore.errors import ConfigError
from kvstore.fs import FileSystem
from kvstore.reading import UNLEASED_BYTES_MAX
from kvstore.tenants import tenant_digest
from tests.sim.bulk import SimBulk
from tests.sim.clients import SimClient
from tests.sim.coordination import start_coordinator
from tests.sim.copies import Copies
from tests.sim.disks import MachineDisk
from tests.sim.edges import CELL_BYTES, simulated
from tests.sim.epochs import Epochs
from tests.sim.graves import Graves
from tests.sim.keeper import EDITIONS
from tests.sim.memory import MachineClock, MemoryFileSystem
from tests.sim.network import Network
from tests.sim.promises import check_node, names_held, readable, right_payloads, unsettled
from tests.sim.prompts import Prompt, epochs_of, prompts_of
from tests.sim.scheduler import Process, Scheduler, SimulationFailure
from tests.sim.storage import Machine, StorageNode
from tests.sim.trouble import Trouble
from tests.sim.vows import Vows

START_S = 0.6
SETTLED_WITHIN_S = 25.0
LAST_PUT_WITHIN_S = 45.0
CHECK_S = 1.0
ACT_WITHIN_S = 60.0
READ_LOOK_S = 0.05
READ_TRIES = 6
"""What expires between two tries, but is announced, costs one of them."""
FAR = "far"
ROOMY_BYTES = 200 * CELL_BYTES
REPLICATED_CELLS = 12
"""Of an arena at least, where holds have replicas: in smaller ones there is no budget for any."""
KEEPING_WORLDS, COPYING_WORLDS = (2, 4, 7, 9), (7,)
"""Of ten, by their seeds: in these clients hold prompts, and erase tenants; in these of them they
hold with replicas, too."""


@dataclass(frozen=True)
class Ran:
    """What a run came to: the digest of its trace, and how much happened."""

    digest: str
    seconds: float
    lines: int


class World:
    """A cluster of a few machines, made by a seed."""

    def __init__(self, seed: int, machines: int = 0, replicates: bool = False) -> None:
        """``machines`` other than 0: so many, with room for everything and without trouble."""
        random = Random(seed)
        self.scheduler = Scheduler(random)
        self.network = Network(self.scheduler)
        self.calm = False
        self.hesitation = random.choice([0.0, 0.02, 0.1])
        self.hesitated_s = 0.0
        self.unleased_bytes_max = UNLEASED_BYTES_MAX if seed % 3 else 0
        self.flipped: set[tuple[str, int]] = set()
        self.kept_map = ClusterMap(0, ())
        self.prompts = prompts_of(random, random.randint(3, 7))
        self.clients: list[SimClient] = []
        self.graves = Graves()
        self.given_up: set[int] = set()
        self.deletes = random.choice([0.0, 0.03, 0.15])
        self._restarts = random.random() < 0.4
        self.vows, self.epochs = Vows(), Epochs()
        self.keeps = not machines and seed % 10 in KEEPING_WORLDS
        self.replicates = replicates or (not machines and seed % 10 in COPYING_WORLDS)
        epochs = range(1, EDITIONS if self.keeps else 1)
        self._editions = {
            (p.number, epoch): p.edition(epoch) for p in self.prompts for epoch in epochs
        }
        every = [*self.prompts, *self._editions.values()]
        self._right = right_payloads(every)
        self.copies = Copies(self.vows, self.epochs, epochs_of(every))
        self._moves = random.random() < 0.3
        self._disks = random.choice([0.0, 0.5, 1.0, 1.0])
        self._nodes: dict[int, StorageNode] = {}
        self._clocks = {FAR: MachineClock(self.scheduler, 3.0, 1.0)}
        self._client_number = 0
        count = machines or random.choice([1, 2, 2, 3, 3, 4])
        count = max(count, 2) if self.replicates else count
        self.machines = [self._machine(index) for index in range(count)]
        self.coordinator = Process(self.scheduler, "coordinator", "")
        self._trouble = Trouble(self, START_S + random.choice([2.0, 4.0, 6.0]))
        if machines:
            self.hesitation = 0.0
            self._trouble = Trouble.none(self)
            for machine in self.machines:
                machine.arena_bytes = ROOMY_BYTES

    def run(self) -> Ran:
        """The whole story; raises ``SimulationFailure``."""
        return self._in_here(self._tell)

    def play(self, scene: Callable[[], None]) -> Ran:
        """A scene of its own, on a cluster that has come up; then everything must hold."""

        def tell() -> None:
            self._begin()
            scene()
            self._end()

        return self._in_here(tell)

    def _in_here(self, tell: Callable[[], None]) -> Ran:
        listener = _Errors(self.scheduler)
        logger = logging.getLogger("kvstore")
        level = logger.level
        logger.setLevel(logging.ERROR)
        logger.addHandler(listener)
        try:
            with simulated(self, SimBulk):
                try:
                    tell()
                finally:
                    self.scheduler.end()
        except SimulationFailure as failure:
            raise SimulationFailure("\n".join([*self.scheduler.trace.last, str(failure)])) from None
        finally:
            logger.removeHandler(listener)
            logger.setLevel(level)
        trace = self.scheduler.trace
        return Ran(trace.digest(), self.scheduler.now_s, trace.lines)

    # What others need of a world.

    def file_system(self, machine: str) -> FileSystem:
        for found in self.machines:
            if found.name == machine:
                return found.fs
        return MemoryFileSystem(self.scheduler.random)

    def stopped(self, machine: str) -> None:
        """A process there was stopped between finding a slot and using it."""
        self._trouble.follow_up(machine)

    def entry(self, machine: str) -> str:
        """Where a client on that machine goes first: to its own node, or to the first there is."""
        own = [node for node in self._nodes.values() if node.machine.name == machine]
        return (own or list(self._nodes.values()))[0].control

    def alive_nodes(self) -> list[StorageNode]:
        """Those that are in the map or were."""
        return [node for node in self._nodes.values() if node.process.alive]

    def edition(self, prompt: Prompt, epoch: int) -> Prompt:
        """A prompt after its tenant was erased so often."""
        if not epoch:
            return self.prompts[prompt.number]
        return self._editions.get((prompt.number, epoch)) or prompt.edition(epoch)

    def node_count(self) -> int:
        return len(self.machines)

    def node(self, index: int) -> StorageNode | None:
        """The node of that index, if it lives."""
        found = self._nodes.get(index)
        return found if found is not None and found.process.alive else None

    def can_start(self, index: int) -> bool:
        return self.machines[index].up

    def start_node(self, index: int) -> None:
        """What Ray does: one node per machine; one that can't come up is tried again."""
        if self.can_start(index) and self.node(index) is None:
            try:
                node = StorageNode.start(self, self.machines[index], self._moves)
            except (ConfigError, OSError) as fault:
                self.scheduler.say(f"node{index}", f"does not start: {fault}")
                return
            self.scheduler.say(node.process.name, f"adopted {node.node.tier.stats.adopted}")
            if self.machines[index].disk.refusals.faults:
                # It may not have been able to read what it had promised, and what was released.
                self.vows.lose(index)
                self.vows.disk_lost()
            if self.machines[index].disk.is_new:
                self.machines[index].disk.is_new = False
                self.epochs.disk_lost()
            self._nodes[index] = node

    def start_coordinator(self, wanted: list[int]) -> None:
        self.coordinator.kill()
        self.coordinator = start_coordinator(self, wanted)

    def start_client(self) -> None:
        self.clients.append(self._client())
        self.clients[-1].start()

    def act(
        self, machine: str, work: Callable[[SimClient], object], look_s: float = CHECK_S / 2
    ) -> None:
        """Have a new, connected client do something, until it is done; it stays connected.

        Whether it is done is looked at every ``look_s``.
        """
        client = self._client(machine)
        self.clients.append(client)

        def connected() -> None:
            client.tier = client.connect()
            assert client.tier is not None, "no node answers"
            work(client)

        strand = client.process.start(f"{client.process.name}/act", connected)
        until_s = self.scheduler.now_s + ACT_WITHIN_S
        while not strand.done.done():
            if self.scheduler.now_s >= until_s:
                raise SimulationFailure(f"{strand.name} does not end")
            self.scheduler.run_until(self.scheduler.now_s + look_s)
        self._check_nodes()

    # The story.

    def _tell(self) -> None:
        self._begin()
        for _ in range(self.scheduler.random.randint(1, 4)):
            self.start_client()
        self._trouble.begin()
        while self.scheduler.now_s < self._trouble.stop_s:
            self.scheduler.run_until(self.scheduler.now_s + CHECK_S)
            self._check_nodes()
        self._end()

    def _begin(self) -> None:
        scheduler = self.scheduler
        scheduler.say("WORLD", f"{len(self.machines)} nodes, trouble: {self._trouble.described}")
        for machine in self.machines:
            self.start_node(machine.index)
        self.coordinator = start_coordinator(self, range(len(self.machines)))
        scheduler.run_until(START_S)

    def _end(self) -> None:
        self._trouble.end()
        self.calm = True
        self._settle()
        self._check_graves()
        self._read_everything()
        if self.graves.answered and self._restarts:
            self._restart_everything()

    def _settle(self) -> None:
        """Wait until the last operations have ended, and then until all is as it must become."""
        self._wait_for(self._working, LAST_PUT_WITHIN_S)
        self._wait_for(self._unsettled, SETTLED_WITHIN_S)

    def _wait_for(self, left_to_do: Callable[[], list[str]], within_s: float) -> None:
        until_s = self.scheduler.now_s + within_s
        while left := left_to_do():
            if self.scheduler.now_s >= until_s:
                raise SimulationFailure("never settled:\n" + "\n".join(left))
            self.scheduler.run_until(self.scheduler.now_s + CHECK_S / 2)
            self._check_nodes()

    def _alive(self) -> list[SimClient]:
        return [client for client in self.clients if client.process.alive]

    def _working(self) -> list[str]:
        return [f"{one.process.name} is at work" for one in self._alive() if one.busy]

    def _unsettled(self) -> list[str]:
        nodes = [self.node(index) for index in range(self._trouble.last_count)]
        # One connection to each node, and one to enter by; the process that copies has them, too.
        sessions = len(self._alive()) * (len(self.machines) + 1)
        sessions += len(nodes) * len(self.machines) if self.replicates else 0
        left = unsettled(nodes, sessions)
        alive = [node for node in nodes if node is not None]
        if self.replicates and not left:
            left += self.copies.unsettled(alive, len(nodes) == len(self.machines))
        return left

    def _read_everything(self) -> None:
        """New clients, on the first machine and far away, get all that is held."""
        members = map(self.node, range(self._trouble.last_count))
        nodes = [node for node in members if node is not None]
        epoch_of = nodes[0].node.life.tenants.epoch_of
        prompts = [
            self.edition(prompt, epoch_of(tenant_digest(prompt.namespace.tenant)))
            for prompt in self.prompts
        ]
        for machine in (self.machines[0].name, FAR):
            expected = readable(nodes, prompts, self.flipped)
            found: dict[int, int] = {}

            def read_all(
                client: SimClient,
                found: dict[int, int] = found,
                expected: dict[int, int] = expected,
            ) -> None:
                found.update(client.read_all(prompts, expected, READ_TRIES))

            self.act(machine, read_all, READ_LOOK_S)
            still = readable(nodes, prompts, self.flipped)
            for number, tokens in found.items():
                if tokens < min(expected[number], still[number]):
                    raise SimulationFailure(
                        f"a client on {machine} got {tokens} tokens of prompt {number}, "
                        f"{still[number]} are held"
                    )

    def _restart_everything(self) -> None:
        """In any order, by any way: what was deleted must not come back."""
        random = self.scheduler.random
        order = random.sample(range(self._trouble.last_count), self._trouble.last_count)
        for index in order:
            machine, node = self.machines[index], self.node(index)
            if random.random() < 0.3:
                machine.disk.lose_catalog()
            if random.random() < 0.5:
                machine.lose_power(self.network)
                machine.boot(self.network)
                self.vows.lose(index)
            elif node is not None:
                node.process.kill()
            if random.random() < 0.5:
                self.scheduler.run_until(self.scheduler.now_s + random.choice([0.3, 1.0, 3.0]))
        self._settle()
        self._check_graves()

    def _check_graves(self) -> None:
        """What was deleted is nowhere: also what only nodes knew that the map may leave out now."""
        gone = self.graves.gone(self._trouble.last_count == len(self.machines))
        for index in range(self._trouble.last_count):
            node = self.node(index)
            if node is not None and (risen := names_held(node) & gone):
                raise SimulationFailure(
                    f"{node.process.name} holds {len(risen)} deleted blocks: {min(risen).hex()[:8]}"
                )

    def _check_nodes(self) -> None:
        for node in self._nodes.values():
            if node.process.alive:
                for fault in check_node(node, self._right, self.flipped):
                    raise SimulationFailure(fault)
                for fault in self.vows.broken(node) if self.keeps else ():
                    raise SimulationFailure(f"{node.process.name}: {fault}")
        for fault in self.copies.broken(self.alive_nodes()) if self.replicates else ():
            raise SimulationFailure(fault)

    def _machine(self, index: int) -> Machine:
        random = self.scheduler.random
        clock = MachineClock(self.scheduler, random.uniform(0, 1e6), random.uniform(0.99, 1.01))
        clock.wall_offset_ms = random.choice([0, 0, random.randint(-2000, 2000)])
        self._clocks[f"m{index}"] = clock
        has_disk = random.random() < self._disks
        cells = random.choice([6, 8, 12, 20] if has_disk else [6, 12, 20, 60])
        cells = max(cells, REPLICATED_CELLS) if self.replicates else cells
        fs = MemoryFileSystem(random)
        disk = MachineDisk(random, random.choice([2, 4, 8]), random.choice([9, 40]))
        return Machine(index, self.scheduler, cells * CELL_BYTES, clock, fs, disk, has_disk)

    def _client(self, machine: str | None = None) -> SimClient:
        self._client_number += 1
        name = machine or self.scheduler.random.choice([FAR, *(m.name for m in self.machines)])
        at = next((m for m in self.machines if m.name == name), None)
        process_name = f"client{self._client_number}@{name}"
        process = (
            Process(self.scheduler, process_name, name) if at is None else at.process(process_name)
        )
        return SimClient(self, process, self._clocks[name])


class _Errors(logging.Handler):
    """What the tier itself calls an error is one of ours."""

    def __init__(self, scheduler: Scheduler) -> None:
        super().__init__(logging.ERROR)
        self._scheduler = scheduler

    def emit(self, record: logging.LogRecord) -> None:
        detail = record.exc_info[1] if record.exc_info else None
        self._scheduler.fault(f"logged as an error: {record.getMessage()} {detail!r}")
