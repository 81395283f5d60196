"""Contacts: the nodes of a cluster that one client is connected to over sockets.

    first use ──> connected ── failed ──> resting, left alone for ``REST_S`` ──> tried again
                      ├── moved ────────> hung up on, connected anew
                      └── left the map ─> hung up on, once no call to it is under way

What a contact has told of erased tenants outlives the connection. Does not cover: which nodes there
are, the own node's arena (``kvstore.cluster_routes``).
"""

import logging
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from kvstore.clock import Clock
from kvstore.cluster_map import ClusterMap, NodeInfo
from kvstore.errors import UnavailableError
from kvstore.rpc.client import ControlClient
from kvstore.rpc.wire import CONTACT_S
from kvstore.transport.tcp import TcpTransport

log = logging.getLogger(__name__)

REST_S = 1.0
"""How long a node that failed is left alone: the breaker's open time."""


@dataclass(slots=True)
class Contact:
    """Connections to one node, and until when to leave it alone."""

    info: NodeInfo
    control: ControlClient
    bulk: TcpTransport
    rest_until_s: float = 0.0


class Contacts:
    """All of them, by their indexes in the map. May be used from many threads."""

    def __init__(
        self, entry: ControlClient, token: str | None, clock: Clock, call_deadline_s: float
    ) -> None:
        """``entry`` is a connection that is there already; whoever opened it closes it."""
        self._entry = entry
        self._token = token
        self._clock = clock
        self._call_deadline_s = call_deadline_s
        self._lock = threading.Lock()
        self._by_index: dict[int, Contact] = {}
        self._calls: Counter[int] = Counter()
        """How many are under way to each node."""
        self._told: dict[bytes, int] = {}
        """Tenants' epochs, by nodes that are no contacts any more."""

    @property
    def indexes(self) -> frozenset[int]:
        """Of those that there is a connection to."""
        with self._lock:
            return frozenset(self._by_index)

    def at(self, info: NodeInfo) -> Contact:
        """A usable contact; connects on first use, and anew when the node has moved."""
        moved = None
        with self._lock:
            contact = self._by_index.get(info.index)
            if contact is not None and contact.info != info:
                moved, contact = self._take_out(info.index), None
            if contact is None:
                contact = self._by_index[info.index] = self._connected(info)
        if moved is not None:
            self._hang_up(moved)  # which may take a while: nobody is to wait for the lock
        if contact.rest_until_s > self._clock.monotonic_s():
            raise UnavailableError(f"node {info.index} failed a moment ago")
        return contact

    def resting(self) -> frozenset[int]:
        """Nodes that failed a moment ago."""
        now_s = self._clock.monotonic_s()
        with self._lock:
            found = self._by_index.items()
            return frozenset(index for index, one in found if one.rest_until_s > now_s)

    def told_epoch_of(self, tenant: bytes) -> int:
        """A tenant's epoch, as far as any contact has told; never waits."""
        with self._lock:
            told = [self._told, *(one.control.told_epochs for one in self._by_index.values())]
        return max(epochs.get(tenant, 0) for epochs in told)

    @contextmanager
    def guarding(self, node: int) -> Iterator[None]:
        """Around calls to a node. Its failure within the block makes it rest, and ends the block;
        that it leaves the map does not."""
        with self._lock:
            self._calls[node] += 1
        try:
            yield
        except UnavailableError as fault:
            self._rest(node, fault)
        else:
            self._rested(node)
        finally:
            with self._lock:
                self._calls[node] -= 1

    def part(self, cluster_map: ClusterMap) -> None:
        """Hang up on nodes that have left the map, unless a call is under way."""
        with self._lock:
            self._calls = +self._calls
            left = [
                contact
                for index, contact in self._by_index.items()
                if cluster_map.by_index(index) is None and index not in self._calls
            ]
        for contact in left:
            self._hang_up(contact)
            with self._lock:  # it may be back, and moved
                if self._by_index.get(contact.info.index) is contact:
                    self._take_out(contact.info.index)

    def close(self) -> None:
        """Hang up on all."""
        with self._lock:
            contacts, self._by_index = list(self._by_index.values()), {}
        for contact in contacts:
            self._hang_up(contact)

    def _connected(self, info: NodeInfo) -> Contact:
        control = self._entry
        if info.node_id != control.identity.node_id:
            control = ControlClient(
                info.control, self._token, self._call_deadline_s, CONTACT_S, self._clock
            )
        bulk = TcpTransport(info.bulk, self._token.encode() if self._token else None)
        return Contact(info, control, bulk)

    def _take_out(self, index: int) -> Contact:
        """Forget a connection, and nothing that was told over it. Under the lock."""
        contact = self._by_index.pop(index)
        for tenant, epoch in contact.control.told_epochs.items():
            self._told[tenant] = max(epoch, self._told.get(tenant, 0))
        return contact

    def _hang_up(self, contact: Contact) -> None:
        if contact.control is not self._entry:
            contact.control.close()
        contact.bulk.close()

    def _rested(self, node: int) -> None:
        contact = self._by_index.get(node)
        if contact is not None and contact.rest_until_s:
            log.warning("node %d answers again", node)
            contact.rest_until_s = 0.0

    def _rest(self, node: int, fault: UnavailableError) -> None:
        contact = self._by_index.get(node)
        if contact is not None:
            if contact.rest_until_s == 0.0:
                log.warning("leaving node %d alone for a while: %s", node, fault)
            contact.rest_until_s = self._clock.monotonic_s() + REST_S
