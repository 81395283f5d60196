"""The client: what an engine's side calls. One class, synchronous, for any number of threads.

    with Samovar.open(size_bytes=1 << 30) as tier:          # embedded: this process only
    with Samovar.connect() as tier:                         # what `samovar up` started here
    with Samovar.connect("10.0.0.7:50051") as tier:         # a storage node's gRPC address
        plan = tier.longest_prefix(namespace, tokens, boundaries=[600])
        got = tier.get_into(plan, rows)                     # got.stop tokens are in rows, verified
        ... the engine prefills the rest ...
        tier.put(namespace, tokens, rows, start=got.stop, boundaries=[600])

A miss, a dead node and a full tier are answers (``Plan``, ``Fetched``, ``Stored``), never
exceptions; ``UsageError`` and its kin are the caller's bugs. After a fork the child must open its
own.
"""

import itertools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from kvstore import keeping, reading, search, writing
from kvstore.answers import Deleted, Erased, Held, Inspected, Released
from kvstore.calls import HOLD_TTL_MS_MAX, REPLICAS_MAX, NodeStats
from kvstore.cell import BLOCK_TOKENS_DEFAULT, check_block_tokens
from kvstore.clock import Clock, Deadline, SystemClock
from kvstore.config import ClientConfig, load
from kvstore.embedded import embedded_tier
from kvstore.entry import enter
from kvstore.errors import UnavailableError, UsageError
from kvstore.key import Chain, Keys
from kvstore.machine import SHM_FOLDER
from kvstore.namespace import Namespace
from kvstore.plan import Fetched, Plan, Stored, merged
from kvstore.retention import TTL_S_MAX
from kvstore.routes import Routes, is_erased
from kvstore.rows import KVRows
from kvstore.tenants import tenant_digest

ERASED = "ERASED"
"""The reason for which nothing is stored for a tenant of before its erasure."""
UNTOLD = "no node says which tenants were erased"
READERS = 8
"""Nodes that one process reads from at the same time."""

TokenIds = Sequence[int] | npt.NDArray[np.integer]


class Samovar:
    """A tier of warm prompts, embedded or of a cluster."""

    def __init__(self, routes: Routes, clock: Clock, config: ClientConfig) -> None:
        self._routes = routes
        self._clock = clock
        self._config = config
        self._operations = itertools.count(1)
        self._workers = ThreadPoolExecutor(READERS, "samovar-read")
        self._process = os.getpid()
        self._closed = False

    @classmethod
    def open(
        cls,
        size_bytes: int,
        shm_folder: Path = SHM_FOLDER,
        clock: Clock | None = None,
        block_tokens: int = BLOCK_TOKENS_DEFAULT,
    ) -> Self:
        """An embedded tier of ``size_bytes`` of shared memory: no Ray, no server, no network.

        Its memory is this process's: it is gone when the tier is closed, or the process ends,
        however it ends. Goes by no setting.
        """
        clock = clock or SystemClock()
        check_block_tokens(block_tokens)
        routes = embedded_tier(size_bytes, shm_folder, clock, block_tokens)
        return cls(routes, clock, ClientConfig())

    @classmethod
    def connect(
        cls,
        address: str | None = None,
        host_id: str | None = None,
        token_file: Path | None = None,
        clock: Clock | None = None,
    ) -> Self:
        """A client of the cluster that the node at ``address`` ("host:port") belongs to.

        What is not given here is as the settings say (``ClientConfig``): variables, then the
        settings file. Without any address it is the tier that runs on this machine. Raises
        ``UnavailableError`` if no node answers.

        ``host_id`` is this process's host identity, by default the machine's: a node that has the
        same one is the own node, whose arena is mapped; all others are reached over sockets.
        """
        given = {"address": address, "host_id": host_id, "token_file": token_file}
        return cls.from_config(load(ClientConfig, given), clock)

    @classmethod
    def from_config(cls, config: ClientConfig, clock: Clock | None = None) -> Self:
        """``connect`` by these settings alone, whatever the environment says."""
        clock = clock or SystemClock()
        return cls(enter(config, clock), clock, config)

    @property
    def block_tokens(self) -> int:
        """Tokens in a full block of this tier: what a namespace's grid must have.

        Raises ``UnavailableError`` while the node that we are connected to is only starting.
        """
        known = self._routes.block_tokens
        if known is None:
            raise UnavailableError("the node knows no cluster map yet: ask again in a moment")
        return known

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
        self._check(namespace)
        chain = Chain.of(namespace, tokens, boundaries)
        is_current = self._is_current(namespace)
        return search.longest_prefix(
            namespace,
            chain,
            namespace.grid.full_mask if mask is None else mask,
            self._routes.own_table() if is_current else None,
            self._clock,
            self._routes.locate if is_current else None,
        )

    def get_into(
        self, plan: Plan, rows: KVRows, deadline_s: float | None = None, start: int = 0
    ) -> Fetched:
        """Fill ``rows`` with what was planned; see ``Fetched`` for what to rely on.

        ``start`` says how many first tokens the caller has in ``rows`` already: blocks wholly
        before it are neither read nor written, the block that contains it is loaded whole. With
        ``start`` at or beyond the plan's end nothing is read.

        Blocks until everything came or ``deadline_s`` (by default the setting ``get_deadline_s``,
        5 seconds) is over. When it returns,
        nobody writes into ``rows`` any more.
        """
        self._check()
        if not isinstance(start, int | np.integer) or start < 0:
            raise UsageError(f"start must be how many tokens the rows hold, 0 or more: {start!r}")
        wait_s = self._config.get_deadline_s if deadline_s is None else deadline_s
        deadline = Deadline.after(self._clock, wait_s)
        if not self._is_current(plan.namespace):
            plan = plan.behind(max(plan.tokens, int(start)))
        return reading.read(plan, rows, self._routes, self._workers, deadline, int(start))

    def put(
        self,
        namespace: Namespace,
        tokens: TokenIds,
        rows: KVRows,
        start: int = 0,
        boundaries: Sequence[int] = (),
        mask: int | None = None,
        ttl_s: int | None = None,
    ) -> Stored:
        """Store the full blocks of ``tokens`` that end behind ``start``, and named tails.

        ``tokens`` are those whose KV is in ``rows``, from the first on; ``start`` says how many of
        them are known to be in the tier: these are kept as young as those behind them, but only a
        read or ``touch`` counts as their use. Tails are stored at ``boundaries`` only. What is
        there already is touched, not sent. Blocks live for ``ttl_s`` after their last use, 0: as
        long as there is room; by default as the settings say. Returns when nobody reads ``rows``
        any more.
        """
        self._check(namespace)
        if ttl_s is not None and not 0 <= ttl_s <= TTL_S_MAX:
            raise UsageError(f"ttl_s must be 0 to {TTL_S_MAX} seconds, got {ttl_s}")
        _check_start(start, tokens)
        chain = Chain.of(namespace, tokens, boundaries)
        put = writing.Put(
            namespace=namespace,
            chain=chain,
            mask=namespace.grid.full_mask if mask is None else mask,
            start=start,
            operation=next(self._operations),
            ttl_s=self._config.default_ttl_s if ttl_s is None else ttl_s,
        )
        if not self._is_current(namespace):
            is_known = is_erased(namespace, self._routes)
            return writing.refused(put, ERASED) if is_known else writing.failed(put, UNTOLD)
        deadline = Deadline.after(self._clock, self._config.put_deadline_s)
        try:
            route = self._routes.write_route()
        except UnavailableError as fault:
            return writing.failed(put, str(fault))
        return merged(writing.write(put, rows, route.access, route.transport, deadline))

    def touch(self, plan: Plan, start: int = 0) -> None:
        """Say that a planned prefix was used, however the engine came by it.

        Of blocks wholly before ``start`` the same use was told before.
        """
        self._check()
        used = plan.behind(start)
        if not used.blocks:
            return
        with suppress(UnavailableError):  # one that is lost costs a little LRU order, nothing else
            access = self._routes.write_route().access
            access.touch(used.keys, plan.mask)
            if used.blocks < plan.blocks:
                # The same use: one stamp for the whole chain.
                access.touch(plan.keys, plan.mask, access.session, next(self._operations))

    def delete(
        self,
        namespace: Namespace,
        tokens: TokenIds,
        start: int = 0,
        boundaries: Sequence[int] = (),
    ) -> Deleted:
        """Delete the full blocks of ``tokens`` that end behind ``start``, and named tails.

        They are found nowhere from then on, and come back by no restart, whoever has a copy;
        see ``Deleted`` for nodes that do not answer. Raises ``UnavailableError`` if the own node,
        by which the others are told, gives no answer: it may or may not have begun.
        """
        self._check(namespace)
        _check_start(start, tokens)
        return self.delete_keys(keeping.keys_behind(Chain.of(namespace, tokens, boundaries), start))

    def delete_keys(self, keys: Keys) -> Deleted:
        """``delete`` of blocks by their keys, uint8 ``[n, 32]``."""
        self._check()
        return keeping.delete(keys, self._routes)

    def hold(
        self,
        namespace: Namespace,
        tokens: TokenIds,
        handle: str,
        ttl_s: float,
        boundaries: Sequence[int] = (),
        replicas: int = 1,
    ) -> Held:
        """Have the longest warm prefix of ``tokens`` kept for ``ttl_s``, under this handle.

        All of it is promised, or nothing is; see ``Held``. A second hold of the same tenant and
        handle adds to the first, and a promise once given is kept whatever becomes of the second.
        With ``replicas`` 2 the nodes see to it, from then on, that another node has a copy;
        ``inspect`` says whether one has.
        """
        _check_replicas(replicas)
        plan = self.longest_prefix(namespace, tokens, boundaries)
        return keeping.hold(plan, handle, _hold_ms(ttl_s), replicas, self._routes)

    def hold_keys(
        self, keys: Keys, handle: str, ttl_s: float, tenant: str = "", replicas: int = 1
    ) -> Held:
        """``hold`` of blocks by their keys, uint8 ``[n, 32]``: all cells that are there."""
        self._check()
        _check_replicas(replicas)
        return keeping.hold_keys(keys, tenant, handle, _hold_ms(ttl_s), replicas, self._routes)

    def release(self, handle: str, tenant: str = "") -> Released:
        """End a promise early: its blocks are ordinary again, its budget is free."""
        self._check()
        return keeping.release(handle, tenant, self._routes)

    def erase(self, tenant: str) -> Erased:
        """Erase a tenant: what was stored for it is out of everybody's reach, at once.

        From then on its namespaces need the new epoch (``renewed``): with an older one nothing is
        found, and nothing stored. Raises ``UnavailableError`` if the own node gives no answer.
        """
        self._check()
        return keeping.erase(tenant, self._routes)

    def renewed(self, namespace: Namespace) -> Namespace:
        """The namespace in its tenant's epoch now; the same one where it is current.

        Take it once for each request, for all its calls: what was computed before an erasure is
        then not stored after it. While no node answers it stays as it is.
        """
        self._check()
        if not is_erased(namespace, self._routes):
            return namespace
        return replace(namespace, tenant_epoch=self._epoch_of(namespace))

    def inspect(self, keys: Keys) -> Inspected:
        """What every node knows of blocks, by their keys, uint8 ``[n, 32]``."""
        self._check()
        return keeping.inspect(keys, self._routes)

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

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _epoch_of(self, namespace: Namespace) -> int:
        return self._routes.epoch_of(tenant_digest(namespace.tenant))

    def _is_current(self, namespace: Namespace) -> bool:
        """Whether its tenant was not erased since, and some node would have told us."""
        return self._routes.is_told() and not is_erased(namespace, self._routes)

    def _check(self, namespace: Namespace | None = None) -> None:
        if self._process != os.getpid():
            raise UsageError(
                f"this client was opened by process {self._process} before it forked this one: "
                "open another one here"
            )
        if self._closed:
            raise UsageError("this client is closed: open another one")
        known = self._routes.block_tokens
        if namespace is not None and known not in (None, namespace.grid.block_tokens):
            raise UsageError(
                f"the namespace has blocks of {namespace.grid.block_tokens} tokens, this tier "
                f"{known}: build its grid with the client's block_tokens"
            )


def _check_start(start: int, tokens: TokenIds) -> None:
    if not 0 <= start <= len(tokens):
        raise UsageError(f"start {start} is outside the {len(tokens)} tokens")


def _check_replicas(replicas: int) -> None:
    if not 1 <= replicas <= REPLICAS_MAX:
        raise UsageError(f"replicas must be 1 to {REPLICAS_MAX}, got {replicas}")


def _hold_ms(ttl_s: float) -> int:
    milliseconds = round(ttl_s * 1000)
    if not 0 < milliseconds <= HOLD_TTL_MS_MAX:
        raise UsageError(f"ttl_s must be over 0 and at most {HOLD_TTL_MS_MAX // 1000}: {ttl_s}")
    return milliseconds
