"""Where the system under test touches its process: threads, sockets, shared memory. Put aside here.

Production code is not changed for the simulation. Inside ``simulated`` the names by which it
reaches the operating system lead to the simulated world; everything between them is the real
thing, from ``Samovar.connect`` down to ``Node`` and back.
"""

import asyncio
import mmap
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar, Protocol, cast

import grpc
import numpy as np

from kvstore import client, cluster_routes, contacts, copier, reading, replication
from kvstore.fs import FileSystem, Mapped
from kvstore.key import Keys
from kvstore.rpc import cache_service, replicator, session
from kvstore.table import Cells, Found, SlotState
from kvstore.tiers import start
from kvstore.transport import local
from kvstore.transport.base import Transport
from kvstore.transport.mapped import MappedNode, write_header
from tests.sim.blocking import Blocking
from tests.sim.channels import AsyncChannel, BlockingChannel
from tests.sim.network import Network
from tests.sim.scheduler import Process, Scheduler, current

CELL_BYTES = 2 * mmap.PAGESIZE
"""What most cells of the simulated prompts take: a page for the header, one for the payload."""

DISK_POLL_S, COPIES_IDLE_S = 0.02, 0.3
"""Seldom enough that a call which waits for a slow disk, and looking for what is to be copied, cost
little to simulate."""

DECLINED_S, SURVEY_S = 3.0, 4.0
"""A world is over before anybody is asked again after a minute."""


class Surroundings(Protocol):
    """What the edges need of a world."""

    scheduler: Scheduler
    network: Network
    hesitation: float
    hesitated_s: float
    unleased_bytes_max: int
    replicates: bool
    """Whether clients hold with replicas, and nodes copy what they hold."""

    def file_system(self, machine: str) -> FileSystem: ...

    def stopped(self, machine: str) -> None:
        """A process there has just been stopped at a delicate moment."""
        ...


class WatchedNode(MappedNode):
    """A mapped arena in which nobody may write to what another holds.

    Between finding a slot and using it a thread may be put aside for long: that is where a writer
    that was stopped comes back late.
    """

    world: Surroundings
    claims: ClassVar[dict[int, tuple["WatchedNode", int, int]]] = {}
    """By their address, the slots that somebody may be about to write to, and by which right."""

    def populate_in_background(self) -> None:
        return

    def find(self, keys: Keys, cells: Cells, wall_ms: int) -> Found:
        self._hesitate()
        return super().find(keys, cells, wall_ms)

    def found_bytes(self, found: Found, row: int, length: int) -> Mapped | None:
        view = super().found_bytes(found, row, length)
        self._hesitate()
        return view

    def slot_bytes(
        self, state: SlotState, slot: int, generation: int, cell: int, offset: int, length: int
    ) -> Mapped | None:
        found = super().slot_bytes(state, slot, generation, cell, offset, length)
        self._hesitate()
        if found is not None and state is SlotState.RESERVED:
            self.claims[found.ctypes.data] = (self, generation, offset)
        return found

    @classmethod
    def write_header(cls, slot_bytes: Mapped, packed: bytes) -> None:
        """The end of a local write, right behind its payload."""
        node, generation, offset = cls.claims.pop(slot_bytes.ctypes.data)
        node.writing(generation, offset, len(slot_bytes))
        write_header(slot_bytes, packed)

    def writing(self, generation: int, offset: int, size_bytes: int) -> None:
        """Somebody writes there now, by right of the reservation of that generation."""
        records = self._table.slots
        others = np.flatnonzero(
            (records["offset"] < offset + size_bytes)
            & (records["offset"] + records["size_bytes"] > offset)
            & (records["generation"] != generation)
        )
        for slot in others.tolist():
            if int(records["state"][slot]) in (SlotState.RESERVED, SlotState.COMMITTED):
                self.world.scheduler.fault(f"a write reached slot {slot} of another")

    def _hesitate(self) -> None:
        """Now and then the thread is put aside, or its whole process stopped."""
        strand, random = self.world.scheduler.strand, self.world.scheduler.random
        if strand is None or random.random() >= self.world.hesitation:
            return
        seconds = random.choice([0.01, 0.3, 3.0])
        if seconds > 1.0:
            self.world.scheduler.say(strand.process.name, "stopped between finding and using")
            strand.process.pause()
            self.world.stopped(strand.process.machine)
            self.world.network.wire.call_later(seconds, strand.process.go_on)
            strand.wait(None, 0.0)
        else:
            self.world.hesitated_s += seconds
            strand.wait(None, seconds)


def _slots(capacity_bytes: int) -> int:
    """Few records, so that they are short now and then."""
    return capacity_bytes // CELL_BYTES + 8


def watched_in(world: Surroundings) -> type[WatchedNode]:
    """The class of the mapped arenas of one world."""
    return type("WatchedHere", (WatchedNode,), {"world": world, "claims": {}})


@contextmanager
def simulated(
    world: Surroundings, bulk: Callable[[Network, Process, str], Transport]
) -> Iterator[None]:
    """While it lasts, the tier's code lives in ``world``."""
    scheduler, network = world.scheduler, world.network
    blocking = Blocking(scheduler)

    def here() -> Process:
        if scheduler.strand is not None:
            return scheduler.strand.process
        return cast(Process, asyncio.get_running_loop())

    def blocking_channel(address: str, **_: object) -> BlockingChannel:
        return BlockingChannel(network, here(), address)

    def async_channel(address: str, **_: object) -> AsyncChannel:
        return AsyncChannel(network, here(), address)

    def transport(address: str, *_: object) -> Transport:
        return bulk(network, current(scheduler).process, address)

    def file_system() -> FileSystem:
        return world.file_system(current(scheduler).process.machine)

    watched = watched_in(world)
    replaced: list[tuple[Any, str, object]] = [
        (grpc, "insecure_channel", blocking_channel),
        (grpc.aio, "insecure_channel", async_channel),
        (session, "threading", blocking),
        (cluster_routes, "threading", blocking),
        (cluster_routes, "LinuxFileSystem", file_system),
        (contacts, "threading", blocking),
        (contacts, "TcpTransport", transport),
        (client, "ThreadPoolExecutor", blocking.ThreadPoolExecutor),
        (reading, "wait", blocking.wait),
        (reading, "UNLEASED_BYTES_MAX", world.unleased_bytes_max),
        (copier, "LinuxFileSystem", file_system),
        (copier, "TcpTransport", transport),
        (copier, "MappedNode", watched),
        (replication, "DECLINED_S", DECLINED_S),
        (replication, "SURVEY_S", SURVEY_S),
        (start, "default_slots", _slots),
        (cache_service, "DISK_POLL_S", DISK_POLL_S),
        (replicator, "IDLE_S", COPIES_IDLE_S),
        (local, "MappedNode", watched),
        (local, "write_header", watched.write_header),
    ]
    with ExitStack() as stack:
        for module, name, value in replaced:
            stack.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, value)
        yield
