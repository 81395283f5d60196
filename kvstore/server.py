"""One storage node as a process has it: folders, arena, control port, bulk process, loops.

    start:  claim the folders -> next incarnation -> adopt or make the arena, open the disk -> Node
            -> thread with an event loop: gRPC server, bulk process, loops
    loops:  tick 100 ms (sessions, leases)   heartbeats 100 ms   announcements 50 ms   bulk 100 ms
            copies of what is held, on other nodes
    stop:   the same backwards; the arena stays, for the next incarnation

Everything that touches the ``Node`` runs on the event loop's thread: no locks. Usable without Ray
(``kvstore.cluster`` starts it in an actor; tests as a child process). Does not cover: who gives
the node its index and the map (the coordinator does).
"""

import asyncio
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from kvstore.calls import NodeIdentity
from kvstore.clock import Clock, Deadline, SystemClock
from kvstore.cluster_map import ClusterMap, NodeInfo
from kvstore.config import NodeConfig
from kvstore.copier_process import CopierProcess
from kvstore.directory import Directory
from kvstore.errors import StateError, UsageError
from kvstore.fs import FileSystem, LinuxFileSystem
from kvstore.lasting import Lasting
from kvstore.machine import default_arena_bytes, host_id
from kvstore.membership import TICK_INTERVAL_S
from kvstore.node import Node
from kvstore.node_folder import NodeFolder
from kvstore.replication import GRACE_S, Pace
from kvstore.rpc.bulletin import Bulletin
from kvstore.rpc.cache_service import CacheService
from kvstore.rpc.cluster_service import ClusterService
from kvstore.rpc.directory_service import DirectoryService
from kvstore.rpc.life_service import LifeService
from kvstore.rpc.neighbourhood import Neighbourhood
from kvstore.rpc.peer import Peer
from kvstore.rpc.replicator import Replicator
from kvstore.rpc.server import ControlServer
from kvstore.secret import read_secret
from kvstore.tiers.behind import Behind
from kvstore.tiers.host import HostTier
from kvstore.tiers.nvme.capacity import cells_for, default_bytes_in, extents_for
from kvstore.tiers.nvme.disk_process import DiskProcess, DiskSettings
from kvstore.tiers.nvme.slab import SLAB_FILE
from kvstore.tiers.nvme.tier import NvmeTier
from kvstore.tiers.start import open_tier
from kvstore.transport.bulk_process import BulkProcess

log = logging.getLogger(__name__)

NVME_FOLDER = "nvme"
"""In the node's own folder."""
TICK_S = 0.1
ANNOUNCE_S = 0.05
BULK_START_S = 20.0
BULK_PAUSE_S = 1.0
PATIENCE_S = 5.0
"""How long a predecessor may take to be gone: unmapping a large arena takes its time."""


@dataclass(frozen=True, slots=True)
class NodePlace:
    """Which node this is, and the folders that are its own.

    ``folder`` is on a disk and keeps the incarnation; ``arena_folder`` is on a tmpfs. A node takes
    maps of ``tier_id`` only, or of the first tier that names it.
    """

    index: int
    node_id: str
    folder: Path
    arena_folder: Path
    tier_id: str = ""


def nvme_folder_of(config: NodeConfig, folder: Path, node_id: str) -> Path:
    """Where a node with that folder of its own has its NVMe tier."""
    return folder / NVME_FOLDER if config.nvme_folder is None else config.nvme_folder / node_id


class NodeServer:
    """A storage node. ``start`` once, ``stop`` once; both block. Safe to call from any thread."""

    def __init__(
        self,
        config: NodeConfig,
        place: NodePlace,
        clock: Clock | None = None,
        fs: FileSystem | None = None,
        patience_s: float = PATIENCE_S,
        copy_grace_s: float = GRACE_S,
    ) -> None:
        self._config = config
        self._place = place
        self._clock = clock or SystemClock()
        self._fs = fs or LinuxFileSystem()
        self._patience_s = patience_s
        self._copy_grace_s = copy_grace_s
        self._claims: list[NodeFolder] = []
        self._up: Future[_Live] = Future()
        self._thread: threading.Thread | None = None

    def start(self) -> NodeInfo:
        """Everything up: answers where the node is to be found.

        Raises ``StateError`` when another process has one of the folders or a port, and
        ``ConfigError`` when the arena does not fit or the token file is of no use.
        """
        try:
            token = read_secret(self._config.token_file)
            node = self._open()
            self._thread = threading.Thread(
                target=lambda: asyncio.run(self._serve(node, token)), name="samovar-node"
            )
            self._thread.start()
            live = self._up.result()
            self._claims[0].keep_control_port(int(live.control.rpartition(":")[2]))
        except BaseException:
            self.stop()
            raise
        identity = node.identity
        log.info("node %s is up, incarnation %d", identity.node_id, identity.incarnation)
        return self.info

    @property
    def info(self) -> NodeInfo:
        """Where the node is to be found."""
        live = self._running()
        identity = live.node.identity
        return NodeInfo(
            index=self._place.index,
            node_id=identity.node_id,
            host_id=identity.host_id,
            incarnation=identity.incarnation,
            control=live.control,
            bulk=live.announced(live.bulk.port),
            arena_folder=identity.arena_folder,
        )

    @property
    def map(self) -> ClusterMap:
        """The map that this node goes by."""
        return self._running().bulletin.now.map

    @property
    def unreachable(self) -> frozenset[int]:
        """Indexes of the nodes that do not answer."""
        return self._running().bulletin.now.unreachable

    def set_map(self, cluster_map: ClusterMap) -> None:
        """Take a newer map; an older one, or the same, changes nothing."""
        live = self._running()

        async def follow() -> None:
            live.neighbourhood.follow(cluster_map)

        asyncio.run_coroutine_threadsafe(follow(), live.loop).result()

    def stop(self) -> None:
        """Everything down, in order; the arena stays for the next incarnation."""
        thread, self._thread = self._thread, None
        if thread is not None:
            with suppress(Exception):  # it did not come up, which ``start`` has told
                live = self._up.result()
                live.loop.call_soon_threadsafe(live.stopping.set)
            thread.join()
        while self._claims:
            self._claims.pop().release()

    def _open(self) -> Node:
        """Claim the folders before anything in them is opened."""
        place = self._place
        for folder in (place.folder, place.arena_folder):
            self._claims.append(NodeFolder.claim(folder, self._clock, self._patience_s))
        incarnation = self._claims[0].next_incarnation()
        size_bytes = self._config.arena_bytes or default_arena_bytes(self._config.shm_folder)
        tier = open_tier(self._fs, self._clock, place.arena_folder, size_bytes, incarnation)
        host = self._config.host_id or host_id()
        identity = NodeIdentity(place.node_id, incarnation, host, str(place.arena_folder))
        behind = self._open_behind(tier)
        lasting = Lasting(LinuxFileSystem(), place.folder)
        default_ttl_s, hold_bytes = self._config.default_ttl_s or 0, self._config.hold_bytes
        pace = Pace(self._config.replication_bytes_per_s, self._copy_grace_s)
        return Node(identity, tier, self._clock, default_ttl_s, behind, lasting, hold_bytes, pace)

    def _open_behind(self, tier: HostTier) -> Behind:
        """The NVMe tier, opened by a process of its own: a miss until that has read the disk."""
        place, wanted_bytes = self._place, self._config.nvme_bytes
        folder = nvme_folder_of(self._config, place.folder, place.node_id)
        size_bytes = default_bytes_in([folder]) if wanted_bytes is None else int(wanted_bytes)
        if not size_bytes:
            log.info("no NVMe tier: none is configured, or the disk is too small for a default")
            return Behind.nothing(tier, self._clock, is_left=(folder / SLAB_FILE).exists())
        if self._config.nvme_folder is not None:
            self._claims.append(NodeFolder.claim(folder, self._clock, self._patience_s))
        extent_bytes, extents = extents_for(size_bytes)
        cells_max = cells_for(size_bytes)
        settings = DiskSettings(
            folder, place.arena_folder, place.node_id, extent_bytes, extents, cells_max
        )
        nvme = NvmeTier(DiskProcess(settings), self._clock, cells_max, tier.incarnation)
        return Behind(tier, nvme, self._clock, self._config.nvme_daily_bytes)

    async def _serve(self, node: Node, token: str | None) -> None:
        """The life of the event loop; says when the node is up, or why it is not."""
        live = _Live(self._config, node, self._clock, token, self._place.tier_id)
        try:
            await live.start(self._claims[0].former_control_port())
            self._up.set_result(live)
            await live.stopping.wait()
        except Exception as fault:
            self._up.set_exception(fault)
        finally:
            await live.stop()

    def _running(self) -> "_Live":
        if self._thread is None:
            raise UsageError("the node is not running: start it first")
        return self._up.result()


class _Live:
    """What runs on the event loop between start and stop."""

    def __init__(
        self, config: NodeConfig, node: Node, clock: Clock, token: str | None, tier_id: str
    ) -> None:
        directory = Directory()
        self.loop = asyncio.get_running_loop()
        self.stopping = asyncio.Event()
        self.node = node
        self.control = ""
        self.bulletin = Bulletin(ClusterMap(0, (), tier_id=tier_id))
        self.neighbourhood = Neighbourhood(
            node, directory, self.bulletin, clock, lambda address: Peer(address, token)
        )
        self._config = config
        self._clock = clock
        self._bulk: BulkProcess | None = None
        self._copier: CopierProcess | None = None
        self._cache = CacheService(node, self.bulletin)
        self._life = LifeService(node, self.neighbourhood, self.bulletin, self._cache.audience)
        self._server = ControlServer(
            self._cache,
            DirectoryService(directory, self.bulletin),
            ClusterService(self.neighbourhood, self.bulletin),
            self._life,
            token,
        )
        self._loops: list[asyncio.Task[None]] = []

    @property
    def bulk(self) -> BulkProcess:
        """The process that moves the bytes."""
        assert self._bulk is not None, "asked before start"
        return self._bulk

    def announced(self, port: int) -> str:
        """Where others find a port of this node: what it listens on need not lead there."""
        host = (self._config.advertise_host or self._config.bind_host).strip("[]")
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    async def start(self, former_port: int) -> None:
        """Ports open, loops running."""
        self._bulk = await self._start_bulk(self._config.bulk_port)
        self._cache.bulk = self.announced(self._bulk.port)
        listening = await self._open_control(former_port)
        self.control = self.announced(int(listening.rpartition(":")[2]))
        for step, interval_s in (
            (self.node.tick, TICK_S),
            (self.neighbourhood.beat, TICK_INTERVAL_S),
            (self.neighbourhood.announce, ANNOUNCE_S),
        ):
            self._loops.append(asyncio.create_task(_every(interval_s, step)))
        self._loops.append(asyncio.create_task(self._mind_bulk()))
        folder = Path(self.node.identity.arena_folder)
        self._copier = CopierProcess(listening, folder, self._config.token_file)
        replicator = Replicator(self.node, self.neighbourhood, self.bulletin, self._copier)
        self._loops.append(asyncio.create_task(replicator.run()))

    async def stop(self) -> None:
        """The same backwards; also after a ``start`` that failed half-way."""
        for loop in self._loops:
            loop.cancel()
        await asyncio.gather(*self._loops, return_exceptions=True)
        await self.neighbourhood.close()
        await self._server.stop()
        await self._life.close()
        self.node.behind.stop()
        if self._copier is not None:
            await self._copier.stop()
        if self._bulk is not None:
            await asyncio.to_thread(self._bulk.stop)

    async def _open_control(self, former_port: int) -> str:
        """Listen where clients of the last start look for us, unless another port is asked for."""
        host, port = self._config.bind_host, self._config.control_port
        if former_port and not port:
            try:
                return await self._server.start(host, former_port)
            except StateError:
                log.warning("port %d is taken: clients of the last start lose us", former_port)
        return await self._server.start(host, port)

    async def _start_bulk(self, port: int) -> BulkProcess:
        config = self._config
        folder = Path(self.node.identity.arena_folder)
        deadline = Deadline.after(self._clock, BULK_START_S)
        return await asyncio.to_thread(
            BulkProcess.start, folder, config.bind_host, port, config.token_file, deadline
        )

    async def _mind_bulk(self) -> None:
        """Start the bulk process again when it has died, on the same port: the map names it."""
        while True:
            await asyncio.sleep(TICK_S)
            if self.bulk.is_alive():
                continue
            log.warning("the bulk process has died: starting another one")
            try:
                self._bulk = await self._start_bulk(self.bulk.port)
            except StateError as fault:
                log.error("no bulk process for now: %s", fault)
                await asyncio.sleep(BULK_PAUSE_S)


async def _every(interval_s: float, step: Callable[[], None]) -> None:
    """A step that fails is our bug; the next one may still do good, so the loop goes on."""
    while True:
        try:
            step()
        except Exception:
            log.exception("%s failed", step.__qualname__)
        await asyncio.sleep(interval_s)
