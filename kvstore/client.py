"""The client: what an engine's side calls. One class, synchronous, for any number of threads.

    with Samovar.open(size_bytes=1 << 30) as tier:          # embedded: this process only
    with Samovar.connect("127.0.0.1:50051") as tier:        # a storage node's gRPC address
        plan = tier.longest_prefix(namespace, tokens, boundaries=[600])
        got = tier.get_into(plan, rows)                     # got.tokens are in rows, verified
        ... the engine prefills the rest ...
        tier.put(namespace, tokens, rows, start=got.tokens, boundaries=[600])

A miss, a dead node and a full tier are answers (``Plan``, ``Fetched``, ``Stored``), never
exceptions; ``UsageError`` and its kin are the caller's bugs. After a fork the child must open its
own.
"""

import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from kvstore import reading, search, writing
from kvstore.access import InProcessNode
from kvstore.calls import NodeIdentity, NodeStats
from kvstore.clock import Clock, Deadline, SystemClock
from kvstore.cluster_routes import ClusterRoutes
from kvstore.errors import UnavailableError, UsageError
from kvstore.fs import LinuxFileSystem
from kvstore.key import Chain
from kvstore.machine import host_id as machine_host_id
from kvstore.namespace import Namespace
from kvstore.node import Node
from kvstore.plan import Fetched, Plan, Stored, merged
from kvstore.routes import OneNode, Routes
from kvstore.rows import KVRows
from kvstore.tiers.host import HostTier, default_slots
from kvstore.transport.local import LocalTransport

GET_DEADLINE_S = 5.0
PUT_DEADLINE_S = 30.0
SHM_FOLDER = Path("/dev/shm")
READERS = 8
"""Nodes that one process reads from at the same time."""

TokenIds = Sequence[int] | npt.NDArray[np.integer]


class Samovar:
    """A tier of warm prompts, embedded or of a cluster."""

    def __init__(
        self, routes: Routes, clock: Clock, on_close: Callable[[], None] | None = None
    ) -> None:
        self._routes = routes
        self._clock = clock
        self._on_close = on_close
        self._operations = itertools.count(1)
        self._workers = ThreadPoolExecutor(READERS, "samovar-read")
        self._process = os.getpid()
        self._closed = False

    @classmethod
    def open(
        cls, size_bytes: int, shm_folder: Path = SHM_FOLDER, clock: Clock | None = None
    ) -> Self:
        """An embedded tier of ``size_bytes`` of shared memory: no Ray, no server, no network.

        It lives in a private folder below ``shm_folder`` and is gone when it is closed.
        """
        clock = clock or SystemClock()
        fs = LinuxFileSystem()
        folder = Path(tempfile.mkdtemp(prefix="samovar-embedded-", dir=shm_folder))
        try:
            slots = default_slots(size_bytes)
            tier = HostTier.create(fs, clock, folder, size_bytes, slots, incarnation=1)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        identity = NodeIdentity("embedded", 1, machine_host_id(), str(folder))
        access = InProcessNode(Node(identity, tier, clock))
        routes = OneNode(access, LocalTransport.open(fs, folder), tier.table)
        return cls(routes, clock, on_close=lambda: shutil.rmtree(folder, ignore_errors=True))

    @classmethod
    def connect(
        cls,
        address: str,
        host_id: str | None = None,
        token_file: Path | None = None,
        clock: Clock | None = None,
    ) -> Self:
        """A client of the cluster that the node at ``address`` ("host:port") belongs to.

        ``host_id`` is this process's host identity, by default the machine's: a node that has the
        same one is the own node, whose arena is mapped; all others are reached over sockets.
        """
        clock = clock or SystemClock()
        token = token_file.read_text().strip() if token_file else None
        routes = ClusterRoutes.open(address, host_id or machine_host_id(), token, clock)
        return cls(routes, clock)

    def longest_prefix(
        self,
        namespace: Namespace,
        tokens: TokenIds,
        boundaries: Sequence[int] = (),
        mask: int | None = None,
    ) -> Plan:
        """The longest warm prefix of ``tokens``, at most one token short of all of them.

        Tails are looked for at ``boundaries`` only. ``mask`` names the cells that this reader
        needs (default all of the grid). Neither pins nor touches.
        """
        self._check()
        chain = Chain.of(namespace, tokens, boundaries)
        return search.longest_prefix(
            namespace,
            chain,
            namespace.grid.full_mask if mask is None else mask,
            self._routes.own_table(),
            self._clock,
            self._routes.locate,
        )

    def get_into(self, plan: Plan, rows: KVRows, deadline_s: float | None = None) -> Fetched:
        """Fill ``rows`` with what was planned; see ``Fetched`` for what to rely on.

        Blocks until everything came or ``deadline_s`` (default 5) is over. When it returns,
        nobody writes into ``rows`` any more.
        """
        self._check()
        deadline = Deadline.after(self._clock, GET_DEADLINE_S if deadline_s is None else deadline_s)
        return reading.read(plan, rows, self._routes, self._workers, deadline)

    def put(
        self,
        namespace: Namespace,
        tokens: TokenIds,
        rows: KVRows,
        start: int = 0,
        boundaries: Sequence[int] = (),
        mask: int | None = None,
        ttl_s: int = 0,
    ) -> Stored:
        """Store the full blocks of ``tokens`` that end behind ``start``, and named tails.

        ``tokens`` are those whose KV is in ``rows``, from the first on; ``start`` says how many of
        them are known to be in the tier. Tails are stored at ``boundaries`` only. What is there
        already is touched, not sent. Returns when nobody reads ``rows`` any more.
        """
        self._check()
        if not 0 <= start <= len(tokens):
            raise UsageError(f"start {start} is outside the {len(tokens)} tokens")
        chain = Chain.of(namespace, tokens, boundaries)
        put = writing.Put(
            namespace=namespace,
            chain=chain,
            mask=namespace.grid.full_mask if mask is None else mask,
            start=start,
            operation=next(self._operations),
            ttl_s=ttl_s,
        )
        deadline = Deadline.after(self._clock, PUT_DEADLINE_S)
        try:
            route = self._routes.write_route()
        except UnavailableError as fault:
            return writing.failed(put, str(fault))
        return merged(writing.write(put, rows, route.access, route.transport, deadline))

    def touch(self, plan: Plan) -> None:
        """Say that a planned prefix was used, however the engine came by it."""
        self._check()
        if not plan.blocks:
            return
        with suppress(UnavailableError):  # one that is lost costs a little LRU order, nothing else
            self._routes.write_route().access.touch(plan.keys, plan.mask)

    def stats(self) -> NodeStats:
        """What the node that this client writes to holds; raises ``UnavailableError``."""
        self._check()
        return self._routes.write_route().access.stats()

    def close(self) -> None:
        """Finish what is under way and hang up. In a forked child: nothing to do."""
        if self._closed or self._process != os.getpid():
            return
        self._closed = True
        self._workers.shutdown()
        self._routes.close()
        if self._on_close is not None:
            self._on_close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _check(self) -> None:
        if self._process != os.getpid():
            raise UsageError(
                f"this client was opened by process {self._process} before it forked this one: "
                "open another one here"
            )
        if self._closed:
            raise UsageError("this client is closed: open another one")
