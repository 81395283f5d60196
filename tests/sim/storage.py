"""Simulated machines, and the storage node that each of them carries.

Puts together what ``kvstore.server`` puts together: the real tiers, node, directory shard and
services, on a simulated event loop. Does not cover: sockets, the bulk process's own life, Ray,
what is simulated of the disk (``tests.sim.disks``).
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path

from kvstore.calls import NodeIdentity
from kvstore.cluster_map import ClusterMap, NodeInfo
from kvstore.directory import Directory
from kvstore.errors import ConfigError
from kvstore.lasting import Lasting
from kvstore.node import Node
from kvstore.replication import Pace
from kvstore.rpc.bulletin import Bulletin
from kvstore.rpc.cache_service import CacheService
from kvstore.rpc.cluster_service import ClusterService
from kvstore.rpc.directory_service import DirectoryService
from kvstore.rpc.life_service import LifeService
from kvstore.rpc.neighbourhood import Neighbourhood
from kvstore.rpc.peer import Peer
from kvstore.rpc.replicator import Replicator
from kvstore.tiers.behind import Behind
from kvstore.tiers.host import HostTier
from kvstore.tiers.nvme.tier import NvmeTier
from kvstore.tiers.start import open_tier
from tests.sim.copiers import SimCopier
from tests.sim.disks import DiskWork, MachineDisk
from tests.sim.edges import CELL_BYTES, Surroundings, WatchedNode, watched_in
from tests.sim.memory import MachineClock, MemoryFileSystem
from tests.sim.network import Endpoint, Network
from tests.sim.scheduler import Process, Scheduler

TICK_S = 0.18
BEAT_S = 0.18
ANNOUNCE_S = 0.25
HOLD_SHARE = 0.4
"""Of an arena, for one tenant: the arenas here are small."""
PACE = Pace(bytes_per_s=40 * CELL_BYTES, grace_s=2.0)
"""Of copies: slow, so that much happens meanwhile."""
ARENA_FOLDER = Path("/arena")
FOLDER = Path("/node")

log = logging.getLogger(__name__)


@dataclass
class Machine:
    """What a storage node's process leaves behind when it dies, and loses when the machine does."""

    index: int
    scheduler: Scheduler
    arena_bytes: int
    clock: MachineClock
    fs: MemoryFileSystem
    disk: MachineDisk
    has_tier: bool
    """Whether there is an NVMe tier on the disk."""
    incarnation: int = 0
    up: bool = True
    processes: list[Process] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"m{self.index}"

    def process(self, name: str) -> Process:
        """A new process here."""
        process = Process(self.scheduler, name, self.name)
        self.processes.append(process)
        return process

    def lose_power(self, network: Network) -> None:
        """Everything in memory is gone, nobody hears a last word. The disk stays."""
        self.up = False
        network.down.add(self.name)
        for process in self.processes:
            process.kill()
        self.processes.clear()
        self.disk.lose_power()

    def boot(self, network: Network) -> None:
        """Up again, with empty memory."""
        self.fs = MemoryFileSystem(self.scheduler.random)
        self.up = True
        network.down.discard(self.name)


class StorageNode:
    """One life of a storage node."""

    @classmethod
    def start(cls, world: Surroundings, machine: Machine, moves: bool) -> "StorageNode":
        """A new process; raises what keeps it from coming up, and ends it then."""
        machine.incarnation += 1
        process = machine.process(f"node{machine.index}.{machine.incarnation}")
        try:
            return cls(world, machine, process, moves)
        except (ConfigError, OSError):
            process.kill()
            raise

    def __init__(
        self, world: Surroundings, machine: Machine, process: Process, moves: bool
    ) -> None:
        self.index = machine.index
        self.machine = machine
        self.process = process
        tier = open_tier(
            machine.fs, machine.clock, ARENA_FOLDER, machine.arena_bytes, machine.incarnation
        )
        identity = NodeIdentity(
            f"node-{machine.index}", machine.incarnation, machine.name, str(ARENA_FOLDER)
        )
        port = 7000 + (machine.incarnation if moves else 0)
        self.control = f"{machine.name}:{port}"
        self._bulk_address = f"{machine.name}:{9000 + machine.incarnation}"
        self.nvme: NvmeTier | None = None
        self._work: DiskWork | None = None
        self._copier: SimCopier | None = None
        mapped = watched_in(world).map(machine.fs, ARENA_FOLDER)
        behind = self._behind(world, tier, mapped)
        lasting = Lasting(machine.disk.files, FOLDER)
        hold_bytes = int(HOLD_SHARE * machine.arena_bytes)
        self.node = Node(
            identity, tier, machine.clock, behind=behind, lasting=lasting, hold_bytes=hold_bytes,
            pace=PACE,
        )  # fmt: skip
        self.directory = Directory()
        self.bulletin = Bulletin(ClusterMap(0, ()))
        self.neighbourhood = Neighbourhood(
            self.node, self.directory, self.bulletin, machine.clock, lambda a: Peer(a, None)
        )
        cache = CacheService(self.node, self.bulletin)
        cache.bulk = self._bulk_address
        services = {
            "Cache": cache,
            "Directory": DirectoryService(self.directory, self.bulletin),
            "Cluster": ClusterService(self.neighbourhood, self.bulletin),
            "Life": LifeService(self.node, self.neighbourhood, self.bulletin, cache.audience),
        }
        self._bulk = machine.process(f"bulk{machine.index}.{machine.incarnation}")
        self.process.at_death.append(self._bulk.kill)
        world.network.listen(self.control, Endpoint(self.process, services))
        bulk = {"bulk": mapped, "clock": machine.clock}
        world.network.listen(self._bulk_address, Endpoint(self._bulk, bulk))
        self.process.every(TICK_S, self.node.tick)
        self.process.every(BEAT_S, self.neighbourhood.beat)
        self.process.every(ANNOUNCE_S, self.neighbourhood.announce)
        if world.replicates:
            self._copy()

    @property
    def disk_process(self) -> Process | None:
        """Where its disk work is done, if that lives."""
        return None if self._work is None else self._work.process

    @property
    def copier_process(self) -> Process | None:
        """Which sends copies, if it lives."""
        return None if self._copier is None else self._copier.process

    def _copy(self) -> None:
        machine, name = self.machine, f"copier{self.index}.{self.machine.incarnation}"
        self._copier = SimCopier(
            self.process, self.control, ARENA_FOLDER, machine.clock, lambda: machine.process(name)
        )
        replicator = Replicator(self.node, self.neighbourhood, self.bulletin, self._copier)
        self.process.create_task(replicator.run())

    def _behind(self, world: Surroundings, tier: HostTier, mapped: WatchedNode) -> Behind:
        machine, disk = self.machine, self.machine.disk
        if not machine.has_tier:
            return Behind.nothing(tier, machine.clock)
        name = f"disk{machine.index}.{machine.incarnation}"
        self._work = DiskWork(
            world.network, self.process, disk, mapped, lambda: machine.process(name)
        )
        self._work.nvme = self.nvme = NvmeTier(
            self._work, machine.clock, disk.cells_max, machine.incarnation
        )
        return Behind(tier, self.nvme, machine.clock)

    @property
    def info(self) -> NodeInfo:
        """What the coordinator learns of it."""
        identity = self.node.identity
        return NodeInfo(
            index=self.index,
            node_id=identity.node_id,
            host_id=identity.host_id,
            incarnation=identity.incarnation,
            control=self.control,
            bulk=self._bulk_address,
            arena_folder=identity.arena_folder,
        )
