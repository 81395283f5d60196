"""A tiny tier in this process, with clients that can be cut off in the middle of a put.

The bytes of a prompt's KV follow from namespace and tokens alone, so whoever is given some can say
whether they are right. The node is a real one on a real arena, over a file system that can be made
to fail; only its thread is missing: whoever moves the clock ticks.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from contextlib import ExitStack
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from kvstore.calls import (
    AcquireReply,
    Damage,
    NodeIdentity,
    NodeStats,
    Outcomes,
    ReserveReply,
    ReserveRequest,
)
from kvstore.cell import Grid
from kvstore.client import Samovar
from kvstore.clock import Deadline, ManualClock
from kvstore.config import ClientConfig
from kvstore.errors import UnavailableError
from kvstore.fs import LinuxFileSystem
from kvstore.key import Keys
from kvstore.life_access import InProcessLife
from kvstore.namespace import Namespace
from kvstore.node import Node
from kvstore.routes import OneNode
from kvstore.table import Cells, Generations, KeyTable, Slots
from kvstore.tiers.host import HostTier
from kvstore.transport.base import CellRead, CellWrite, ReadOutcome, WriteOutcome, Written
from kvstore.transport.local import LocalTransport
from kvstore.transport.mapped import MappedNode
from tests.faults import FaultyFileSystem
from tests.worlds import PAGE, shared_folder

LAYERS, HEADS, BLOCK, ROW_BYTES = 2, 2, 16, 8
CELL_BYTES = 2 * PAGE
CELLS = 24
"""How many the arena has room for: 12 blocks of two cells."""
GRID = Grid((ROW_BYTES,) * LAYERS, HEADS, BLOCK, head_groups=2)
NAMESPACES = [Namespace("w", "form", "float32", "gqa", GRID, tenant=t) for t in ("", "other")]
TICK_S = 0.25
REAL = LinuxFileSystem()


class WriterGoneError(Exception):
    """The process that was putting died there."""


@lru_cache(100_000)
def row_digest(tenant: str, prefix: tuple[int, ...]) -> bytes:
    """What the KV of the last token of ``prefix`` depends on: all that comes before it."""
    before = row_digest(tenant, prefix[:-1]) if prefix else tenant.encode()
    return blake3(before + bytes(prefix[-1:])).digest(LAYERS * HEADS * ROW_BYTES)


class Rows:
    """One prompt's KV, ``[layer][head, token, row]``."""

    def __init__(self, tokens: int) -> None:
        self.kv = np.full((LAYERS, HEADS, tokens, ROW_BYTES), 0xEE, np.uint8)

    @classmethod
    def right(cls, namespace: Namespace, tokens: Sequence[int]) -> "Rows":
        """The only right bytes for these tokens."""
        made = cls(len(tokens))
        for at in range(len(tokens)):
            digest = row_digest(namespace.tenant, tuple(tokens[: at + 1]))
            row = np.frombuffer(digest, np.uint8).reshape(LAYERS, HEADS, ROW_BYTES)
            made.kv[:, :, at] = row
        return made

    def rows(self, layer: int, start: int, stop: int) -> npt.NDArray[np.uint8]:
        view: npt.NDArray[np.uint8] = self.kv[layer][:, start:stop]
        return view


class AtOnce(Executor):
    """What a client leaves to others is done when it says so: every run is the same."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **named: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(fn(*args, **named))
        return done


class World:
    """A node in a folder, killed and adopted as often as one likes."""

    def __init__(self) -> None:
        self.held_open = ExitStack()
        self.folder = self.held_open.enter_context(shared_folder())
        self.clock = ManualClock()
        self.fs = FaultyFileSystem(REAL)
        self.incarnation = 1
        capacity = CELLS * CELL_BYTES
        tier = HostTier.create(self.fs, self.clock, self.folder, capacity, CELLS + 4, 1)
        self.node = self.node_of(tier)
        self.clients = [Client(self) for _ in range(2)]
        self.late: list[tuple[int, int]] = []

    @property
    def tier(self) -> HostTier:
        return self.node.tier

    def node_of(self, tier: HostTier) -> Node:
        identity = NodeIdentity("n", self.incarnation, "h", str(self.folder))
        return Node(identity, tier, self.clock)

    def restart(self, fail_at: int = 0) -> None:
        """Killed with -9; successors try until one has adopted the folder."""
        self.fs.fail_at = self.fs.operations + fail_at if fail_at else 0
        for _ in range(2):
            self.incarnation += 1
            try:
                tier = HostTier.adopt(
                    self.fs, self.clock, self.folder, CELLS * CELL_BYTES, self.incarnation
                )
            except OSError:
                continue
            self.node = self.node_of(tier)
            return
        raise AssertionError("a second try failed though only one operation did")

    def pass_time(self, ticks: int) -> None:
        for _ in range(ticks):
            self.clock.advance(TICK_S)
            for client in self.clients:
                self.node.beat(client.access.known_session)
            self.node.tick()

    def close(self) -> None:
        for client in self.clients:
            client.samovar.close()
        self.held_open.close()


class Client:
    """A client, and what may happen to it before its bytes or its word arrive."""

    def __init__(self, world: World) -> None:
        self.access = Access(world)
        local = LocalTransport(MappedNode.map(REAL, world.folder))
        self.transport = InterruptedTransport(local)
        table = KeyTable.map(REAL, world.folder)
        routes = OneNode(self.access, self.transport, table, BLOCK)
        self.samovar = Samovar(routes, world.clock, ClientConfig())
        self.samovar._workers.shutdown()
        self.samovar._workers = AtOnce()  # type: ignore[assignment]


class InterruptedTransport:
    """``before_write`` and ``after_write`` happen once; ``lost`` says that nobody knows the end."""

    def __init__(self, local: LocalTransport) -> None:
        self._local = local
        self.before_write: Callable[[], None] = nothing
        self.after_write: Callable[[], None] = nothing
        self.lost = False
        self.wrote: list[CellWrite] = []

    def read(self, cells: Sequence[CellRead], deadline: Deadline) -> list[ReadOutcome]:
        return self._local.read(cells, deadline)

    def write(self, cells: Sequence[CellWrite], deadline: Deadline) -> list[Written]:
        before, after, lost = self.before_write, self.after_write, self.lost
        self.before_write = self.after_write = nothing
        self.lost, self.wrote = False, list(cells)
        before()
        written = self._local.write(cells, deadline)
        after()
        return [Written(WriteOutcome.UNCERTAIN)] * len(cells) if lost else written

    def close(self) -> None:
        self._local.close()


class Access:
    """One client's way to whatever node has the folder now; a new session when one is needed."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.known_session = 0
        self.cut_off = False

    @property
    def node(self) -> Node:
        if self.cut_off:
            raise UnavailableError("cut off")
        return self._world.node

    @property
    def identity(self) -> NodeIdentity:
        return self.node.identity

    @property
    def life(self) -> InProcessLife:
        return InProcessLife(self._world.node, threading.Lock())

    @property
    def session(self) -> int:
        if not self.node.beat(self.known_session):
            self.known_session = self.node.open_session()
        return self.known_session

    def reserve(self, request: ReserveRequest) -> ReserveReply:
        return self.node.reserve(request)

    def commit(
        self,
        session: int,
        slots: Slots,
        generations: Generations,
        header_digests: npt.NDArray[np.uint64],
    ) -> Outcomes:
        return self.node.commit(session, slots, generations, header_digests)

    def abort(self, session: int, slots: Slots, generations: Generations) -> None:
        self.node.abort(session, slots, generations)

    def abandon(self, session: int, slots: Slots, generations: Generations) -> None:
        self.node.abandon(session, slots, generations)

    def acquire(self, session: int, keys: Keys, cells: Cells, lease_ms: int) -> AcquireReply:
        return self.node.acquire(session, keys, cells, lease_ms)

    def release(self, session: int, lease: int) -> None:
        self.node.release(session, lease)

    def discard(self, damaged: Sequence[Damage]) -> int:
        return self.node.discard(damaged)

    def touch(self, keys: Keys, mask: int, session: int = 0, operation: int = 0) -> int:
        return self.node.touch(keys, mask, session, operation)

    def stats(self) -> NodeStats:
        return self.node.stats()

    def close(self) -> None:
        self._world.node.close_session(self.known_session)


def nothing() -> None:
    """No interruption."""
