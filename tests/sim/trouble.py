"""Trouble: everything that goes wrong in a world, when, and how it ends.

Each world draws which kinds of trouble it knows at all and how often they come, so that some seeds
combine everything and others look long at one thing. Does not cover: who is hit by it (the real
code), what must hold nevertheless (``tests.sim.promises``).
"""

import errno
from collections.abc import Callable
from typing import Protocol

from kvstore.block import HEADER_BYTES
from tests.sim.clients import SimClient
from tests.sim.coordination import HEAD
from tests.sim.disks import MachineDisk, name_of
from tests.sim.edges import Surroundings
from tests.sim.epochs import Epochs
from tests.sim.graves import Graves
from tests.sim.network import Weather
from tests.sim.scheduler import Process
from tests.sim.storage import Machine, StorageNode
from tests.sim.vows import Vows

HOUR_MS = 3_600_000


class Troubled(Surroundings, Protocol):
    """What trouble can reach."""

    machines: list[Machine]
    clients: list[SimClient]
    coordinator: Process
    flipped: set[tuple[str, int]]
    graves: Graves
    vows: Vows
    epochs: Epochs

    def node(self, index: int) -> StorageNode | None: ...

    def start_client(self) -> None: ...

    def start_coordinator(self, wanted: list[int]) -> None: ...


class Trouble:
    """Makes trouble until ``stop_s``, then undoes what lasts."""

    def __init__(self, world: Troubled, stop_s: float) -> None:
        self._world = world
        self._random = world.scheduler.random
        self.stop_s = stop_s
        kinds = [
            self._cut, self._isolate, self._pause_node, self._pause_client, self._kill_node,
            self._lose_machine, self._kill_client, self._lose_coordinator, self._set_clock,
            self._flip, self._fill_memory, self._bad_weather, self._slow_down, self._resize,
            self._kill_disk_process, self._pause_disk_process, self._slow_disk, self._fail_disk,
            self._take_disk_away, self._rot_disk, self._lose_catalog, self._replace_disk,
        ]  # fmt: skip
        if world.replicates:
            kinds += [self._kill_copier, self._pause_copier]
        count = self._random.choice([0, 1, 2, 3, 5, len(kinds)])
        self._kinds = self._random.sample(kinds, count)
        self._pause_s = self._random.choice([0.2, 0.5, 1.5])
        self.last_count = len(world.machines)
        if self._resize in self._kinds:
            self.last_count = self._random.randint(1, self.last_count)

    @classmethod
    def none(cls, world: Troubled) -> "Trouble":
        """For scenes that make their own."""
        made = cls(world, 0.0)
        made._kinds, made.last_count = [], len(world.machines)
        return made

    @property
    def described(self) -> str:
        """Which kinds this world knows."""
        return " ".join(sorted(kind.__name__.strip("_") for kind in self._kinds)) or "none"

    def follow_up(self, machine: str) -> None:
        """Where a process was stopped at a delicate moment, its node may die as well."""
        deadly = self._kill_node in self._kinds and self._world.scheduler.now_s < self.stop_s
        if deadly and self._random.random() < 0.5:
            for index, found in enumerate(self._world.machines):
                node = self._world.node(index) if found.name == machine else None
                if node is not None:
                    self._after(0.0, node.process.kill)

    def begin(self) -> None:
        """From now on."""
        if self._kinds:
            self._after(self._random.expovariate(1 / self._pause_s), self._strike)

    def end(self) -> None:
        """Everything works again: what is down comes up, what is cut is joined.

        The tier stays as large as ``last_count`` says.
        """
        network = self._world.network
        network.cut.clear()
        network.slow_s.clear()
        network.weather = Weather()
        self._world.hesitation = 0.0
        for machine in self._world.machines:
            machine.fs.full = False
            machine.disk.heal()
            if not machine.up:
                machine.boot(network)
        for process in self._world.scheduler.processes:
            process.go_on()
        self._world.coordinator.kill()
        self._world.start_coordinator(list(range(self.last_count)))

    def _strike(self) -> None:
        if self._world.scheduler.now_s >= self.stop_s:
            return
        kind = self._random.choice(self._kinds)
        self._say(kind.__name__.strip("_"))
        kind()
        self._after(self._random.expovariate(1 / self._pause_s), self._strike)

    def _after(self, delay_s: float, then: Callable[[], object]) -> None:
        self._world.network.wire.call_later(delay_s, then)

    def _a_while(self) -> float:
        return self._random.choice([0.2, 0.8, 1.7, 2.6, 4.0])

    def _machine(self) -> Machine:
        return self._random.choice(self._world.machines)

    def _node(self) -> StorageNode | None:
        return self._world.node(self._machine().index)

    def _cut(self) -> None:
        names = [HEAD, *(machine.name for machine in self._world.machines)]
        one, other = self._random.sample(names, 2)
        links = {(one, other), (other, one)} if self._random.random() < 0.5 else {(one, other)}
        self._cut_links(links)

    def _isolate(self) -> None:
        lonely = self._machine().name
        names = [HEAD, "far", *(machine.name for machine in self._world.machines)]
        self._cut_links({link for name in names for link in ((lonely, name), (name, lonely))})

    def _cut_links(self, links: set[tuple[str, str]]) -> None:
        cut = self._world.network.cut
        cut |= links
        self._after(self._a_while(), lambda: cut.difference_update(links))

    def _pause_node(self) -> None:
        node = self._node()
        if node is not None:
            self._pause(node.process)

    def _pause_client(self) -> None:
        if self._world.clients:
            self._pause(self._random.choice(self._world.clients).process)

    def _pause(self, process: Process) -> None:
        process.pause()
        self._after(self._a_while(), process.go_on)

    def _kill_node(self) -> None:
        node = self._node()
        if node is not None:
            node.process.kill()

    def _lose_machine(self) -> None:
        self._lose_power_of(self._machine())

    def _lose_power_of(self, machine: Machine) -> None:
        network = self._world.network
        if machine.up:
            machine.lose_power(network)
            self._world.vows.lose(machine.index)

            def boot() -> None:
                if not machine.up:
                    machine.boot(network)

            self._after(self._a_while(), boot)

    def _disk(self) -> MachineDisk:
        return self._machine().disk

    def _disk_process(self) -> Process | None:
        node = self._node()
        return None if node is None else node.disk_process

    def _kill_disk_process(self) -> None:
        process = self._disk_process()
        if process is not None:
            process.kill()

    def _pause_disk_process(self) -> None:
        process = self._disk_process()
        if process is not None:
            self._pause(process)

    def _kill_copier(self) -> None:
        process = self._copier()
        if process is not None:
            process.kill()

    def _pause_copier(self) -> None:
        process = self._copier()
        if process is not None:
            self._pause(process)

    def _copier(self) -> Process | None:
        node = self._node()
        return None if node is None else node.copier_process

    def _slow_disk(self) -> None:
        disk = self._disk()
        disk.took_s = self._random.choice([(0.005, 0.05), (0.05, 0.5), (0.3, 3.0)])
        self._after(self._a_while(), disk.heal)

    def _fail_disk(self) -> None:
        """Some of its operations fail, or come short."""
        disk = self._disk()
        kinds = ["read", "write", "sync", "commit", "allocate", "open", "discard", "file"]
        chosen = self._random.sample(kinds, self._random.choice([1, 1, 2, len(kinds)]))
        number = self._random.choice([errno.EIO, errno.ENOSPC, errno.EROFS])
        disk.refusals.faults = dict.fromkeys(chosen, number)
        disk.refusals.share = self._random.choice([0.1, 1.0])
        disk.slab.is_short = self._random.random() < 0.3
        self._after(self._a_while(), disk.heal)

    def _take_disk_away(self) -> None:
        disk, process = self._disk(), self._disk_process()
        disk.is_away = True
        away = ["read", "write", "sync", "commit", "file"]
        disk.refusals.faults = dict.fromkeys(away, errno.ENODEV)
        disk.refusals.share = 1.0
        self._after(self._a_while(), disk.heal)
        if process is not None and self._random.random() < 0.5:
            process.kill()

    def _rot_disk(self) -> None:
        """One bit of a cell on a disk."""
        node = self._node()
        if node is not None and node.nvme is not None:
            held = node.nvme.held_records()
            if len(held):
                record = held[self._random.randrange(len(held))]
                bit = self._random.choice([self._random.randrange(8 * 80), -1, -8 * 101])
                node.machine.disk.rot(record, bit)
                self._world.vows.damage(name_of(record))

    def _lose_catalog(self) -> None:
        process = self._disk_process()
        self._disk().lose_catalog()
        if process is not None:
            process.kill()

    def _replace_disk(self) -> None:
        """A machine goes down and gets a new disk."""
        machine = self._machine()
        self._lose_power_of(machine)
        if not machine.up:
            machine.disk.replace()
            self._world.graves.disk_lost()
            self._world.epochs.disk_lost()
            self._world.vows.disk_lost()

    def _kill_client(self) -> None:
        if self._world.clients:
            self._random.choice(self._world.clients).process.kill()
            self._world.start_client()

    def _lose_coordinator(self) -> None:
        self._world.coordinator.kill()

        def start() -> None:
            over = self._world.scheduler.now_s >= self.stop_s
            count = self.last_count if over else len(self._world.machines)
            self._world.start_coordinator(list(range(count)))

        self._after(self._a_while(), start)

    def _resize(self) -> None:
        """The tier is given another size, by a coordinator with another plan."""
        count = self._random.randint(1, len(self._world.machines))
        self._world.coordinator.kill()
        self._world.start_coordinator(list(range(count)))

    def _set_clock(self) -> None:
        step_ms = self._random.choice([-HOUR_MS, -3_000, 1_500, 3_000, HOUR_MS])
        self._machine().clock.wall_offset_ms += step_ms
        self._world.vows.forget(self._world.scheduler.now_s)

    def _flip(self) -> None:
        """One bit of a held cell's header or payload."""
        node = self._node()
        if node is None:
            return
        held = node.node.tier.held_slots().tolist()
        if held:
            at = self._random.choice([self._random.randrange(80), -1 - self._random.randrange(200)])
            flip_bit(self._world, node, self._random.choice(held), at)

    def _fill_memory(self) -> None:
        fs = self._machine().fs
        fs.full = True

        def free() -> None:
            fs.full = False

        self._after(self._a_while(), free)

    def _bad_weather(self) -> None:
        random = self._random
        self._world.network.weather = Weather(
            delay_s=random.choice([0.0005, 0.005, 0.05]),
            late=random.choice([0.0, 0.05, 0.3]),
            late_s=random.choice([0.1, 1.0, 4.0]),
            loss=random.choice([0.0, 0.02, 0.2]),
            doubled=random.choice([0.0, 0.1, 0.4]),
            flips=random.choice([0.0, 0.0, 0.05]),
        )

    def _slow_down(self) -> None:
        slow, name = self._world.network.slow_s, self._machine().name
        slow[name] = self._random.choice([0.05, 0.4])
        self._after(self._a_while(), lambda: slow.pop(name, None))

    def _say(self, what: str) -> None:
        self._world.scheduler.say("TROUBLE", what)


def flip_bit(world: Troubled, node: StorageNode, slot: int, at: int) -> None:
    """Damage a held cell, ``at`` so many bytes from the start of its header or (-1) its end."""
    tier = node.node.tier
    record = tier.table.slots[slot]
    length = HEADER_BYTES + int(record["length"])
    tier.arena.view(int(record["offset"]), length)[at] ^= 1 << world.scheduler.random.randrange(8)
    world.flipped.add((node.machine.name, int(record["generation"])))
    name = tier.table.key_of(slot), int(record["cell"])
    node.machine.disk.tainted.add(name)
    world.vows.damage(name)
