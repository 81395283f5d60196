"""A node behind a real gRPC port on the loopback, without a bulk process or other nodes.

For tests of ``kvstore.rpc``: the clock is moved by hand, and the node's loops run only when the
test says so. Cells are written the way an engine of the same host does it.
"""

import asyncio
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from kvstore.arena import Arena
from kvstore.block import Header, header_digest
from kvstore.burials import BurialDigest
from kvstore.calls import CellOutcome, NodeIdentity, ReserveReply, ReserveRequest
from kvstore.client import Samovar
from kvstore.clock import Deadline, ManualClock, SystemClock
from kvstore.cluster_map import ClusterMap, NodeInfo
from kvstore.config import ClientConfig
from kvstore.directory import Directory
from kvstore.fs import LinuxFileSystem
from kvstore.key import Keys
from kvstore.lasting import Lasting
from kvstore.membership import BEAT_INTERVAL_S, Heartbeat
from kvstore.node import Node
from kvstore.rpc.bulletin import Bulletin
from kvstore.rpc.cache_service import CacheService
from kvstore.rpc.client import ControlClient
from kvstore.rpc.cluster_service import ClusterService
from kvstore.rpc.directory_service import DirectoryService
from kvstore.rpc.life_messages import Books
from kvstore.rpc.life_service import LifeService
from kvstore.rpc.neighbourhood import Neighbourhood
from kvstore.rpc.peer import Peer
from kvstore.rpc.server import ControlServer
from kvstore.tenants import EpochDigest
from kvstore.tiers.behind import Behind
from kvstore.tiers.host import HostTier
from kvstore.tiers.nvme.tier import NvmeTier
from tests.nvme_world import CELLS_MAX, InlineQueue, MemoryCatalog, SimulatedDisk, Steps

Value = TypeVar("Value")
Digests = npt.NDArray[np.uint64]

PAYLOAD_BYTES = 64
PATIENCE_S = 60.0  # what happens late on a busy machine has happened
TOKENS = 16
BOOKS = Books(BurialDigest(3, 5), EpochDigest(7, 11))


class Follower:
    """Posts maps, answers heartbeats with a fixed one, and has whatever neighbours it is given."""

    def __init__(self, bulletin: Bulletin) -> None:
        self._bulletin = bulletin
        self.heard: list[Heartbeat] = []
        self.heard_books: list[Books] = []
        self.books = BOOKS
        self.peers: dict[int, Peer] = {}
        self.leavers: frozenset[int] = frozenset()

    def follow(self, cluster_map: ClusterMap) -> None:
        self._bulletin.post_map(cluster_map)

    def received(self, beat: Heartbeat, books: Books) -> Heartbeat | None:
        self.heard.append(beat)
        self.heard_books.append(books)
        return Heartbeat(1, 7, self._bulletin.now.map.epoch, ((3, 2),))


class Served:
    """The node, its parts and its port, until ``stop``."""

    def __init__(
        self,
        folder: Path,
        token: str | None = None,
        port: int = 0,
        default_ttl_s: int = 0,
        has_disk: bool = False,
        index: int = 0,
        lasting: Lasting | None = None,
        tier: HostTier | None = None,
    ) -> None:
        """With an ``index`` the node is ready to ``join`` others: it really goes by maps."""
        self.index = index
        self.clock = ManualClock()
        tier = tier or HostTier.create(
            LinuxFileSystem(), self.clock, folder, 1 << 20, 256, incarnation=7
        )
        number = index or 1
        identity = NodeIdentity(f"node-{number}", tier.incarnation, f"host-{number}", str(folder))
        rng, steps = random.Random(7), Steps()
        arena = tier.arena.view(0, tier.stats.capacity_bytes)
        disk, catalog = SimulatedDisk(steps, rng), MemoryCatalog(steps, rng)
        self.disk = InlineQueue(disk, catalog, arena, rng)
        behind = None
        if has_disk:
            behind = Behind(tier, NvmeTier(self.disk, self.clock, CELLS_MAX, 7), self.clock)
        self.node = Node(identity, tier, self.clock, default_ttl_s, behind, lasting)
        self.directory = Directory()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self.bulletin = self.call(lambda: Bulletin(ClusterMap(0, ())))
        self.follower = Follower(self.bulletin)
        self.neighbourhood = Neighbourhood(
            self.node, self.directory, self.bulletin, self.clock, lambda at: Peer(at, token)
        )
        self.address = asyncio.run_coroutine_threadsafe(
            self._serve(token, port), self._loop
        ).result()

    async def _serve(self, token: str | None, port: int) -> str:
        follower = self.neighbourhood if self.index else self.follower
        cache = CacheService(self.node, self.bulletin)
        self._life = LifeService(self.node, follower, self.bulletin, cache.audience)
        self._server = ControlServer(
            cache,
            DirectoryService(self.directory, self.bulletin),
            ClusterService(follower, self.bulletin),
            self._life,
            token,
        )
        return await self._server.start("127.0.0.1", port)

    def call(self, function: Callable[[], Value]) -> Value:
        """Run something on the node's thread."""

        async def on_loop() -> Value:
            return function()

        return asyncio.run_coroutine_threadsafe(on_loop(), self._loop).result()

    def join(self, *nodes: "Served", epoch: int = 1) -> None:
        """Take a map of these nodes, this one among them."""
        self.join_map(ClusterMap.of(epoch, [node.info for node in nodes]))

    def join_map(self, cluster_map: ClusterMap) -> None:
        """Take any map."""
        self.call(lambda: self.neighbourhood.follow(cluster_map))

    def beats_until(self, condition: Callable[[], object]) -> None:
        """Send heartbeats to all neighbours until something comes of it: one may be lost."""

        def beat() -> object:
            self.clock.advance(BEAT_INTERVAL_S)
            self.call(self.neighbourhood.beat)
            return condition()

        eventually(beat)

    @property
    def info(self) -> NodeInfo:
        """Where it is, for a map. It has no bulk port."""
        identity = self.node.identity
        return NodeInfo(
            self.index, identity.node_id, identity.host_id, identity.incarnation, self.address,
            "127.0.0.1:2", identity.arena_folder,
        )  # fmt: skip

    def stop(self) -> None:
        """Close the port and end the thread; once is enough."""
        if self._loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        await self.neighbourhood.close()
        await self._server.stop()
        await self._life.close()
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)


@contextmanager
def two_served(folder: Path) -> Iterator[tuple[Served, Served]]:
    """Two nodes that have each other in their map, and as neighbours."""
    with ExitStack() as stack:
        nodes = []
        for index in (1, 2):
            (folder / str(index)).mkdir()
            nodes.append(Served(folder / str(index), index=index))
            stack.callback(nodes[-1].stop)
        for node in nodes:
            node.join(*nodes)
        yield nodes[0], nodes[1]


@contextmanager
def client_of(served: Served) -> Iterator[Samovar]:
    config = ClientConfig(address=(served.address,), host_id=served.node.identity.host_id)
    with Samovar.from_config(config) as client:
        yield client


def fill(arena: Arena, request: ReserveRequest, reply: ReserveReply) -> Digests:
    """Write every reserved cell in place; answers the header digests."""
    digests = []
    for row, offset in enumerate(reply.offsets.tolist()):
        header = Header(
            key=request.keys[row].tobytes(),
            cell=int(request.cells[row]),
            tokens=int(request.tokens[row]),
            payload_bytes=int(request.lengths[row]),
            depth=int(request.depths[row]),
            span=int(request.spans[row]),
            leaf_digests=(row,),
        ).pack()
        arena.view(offset, len(header))[:] = np.frombuffer(header, np.uint8)
        digests.append(header_digest(header))
    return np.array(digests, np.uint64)


def put(client: ControlClient, arena: Arena, keys: Keys) -> None:
    """Store cell 0 of each key, the way an engine of the node's host does it."""
    request = reserve_request(client.session, keys)
    reply = client.reserve(request)
    assert set(reply.outcomes) == {CellOutcome.RESERVED}
    digests = fill(arena, request, reply)
    outcomes = client.commit(request.session, reply.slots, reply.generations, digests)
    assert set(outcomes) == {CellOutcome.STORED}


def put_on(served: Served, keys: Keys) -> None:
    """``put`` by a client that comes for it."""
    with closing(ControlClient(served.address)) as client:
        put(client, served.node.tier.arena, keys)


def eventually(condition: Callable[[], object]) -> None:
    """Wait for something that another thread or process is about to do."""
    deadline = Deadline.after(SystemClock(), PATIENCE_S)
    pause = threading.Event()
    while not condition():
        assert not deadline.passed(), f"it did not happen within {PATIENCE_S:g} s"
        pause.wait(0.01)


def some_keys(count: int, first: int = 1) -> Keys:
    """Distinct keys."""
    return np.array([[i % 251 + 1, i // 251] * 16 for i in range(first, first + count)], np.uint8)


def reserve_request(session: int, keys: Keys, operation: int = 1) -> ReserveRequest:
    """Cell 0 of each key, as consecutive blocks of one prompt."""
    count = len(keys)
    return ReserveRequest(
        session=session,
        operation=operation,
        keys=keys,
        cells=np.zeros(count, np.uint8),
        lengths=np.full(count, PAYLOAD_BYTES, np.uint32),
        tokens=np.full(count, TOKENS, np.uint32),
        depths=np.arange(count, dtype=np.uint32),
        spans=np.full(count, 99, np.uint64),
    )


def two_nodes(epoch: int, control: str = "127.0.0.1:1") -> ClusterMap:
    """A map with the served node and another one."""
    first = NodeInfo(1, "node-1", "host-1", 7, control, "127.0.0.1:2", "/nowhere/1")
    other = NodeInfo(2, "node-2", "host-2", 3, "127.0.0.1:3", "127.0.0.1:4", "/nowhere/2")
    return ClusterMap(epoch, (first, other))
