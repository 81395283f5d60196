"""Routes into a cluster: the map, ways to its nodes, and who holds what.

    entry node ──(session stream)──> newest map, unreachable nodes
    own node    the one whose host identity is ours: its arena is mapped
    other nodes over sockets (``kvstore.contacts``)

Everything here is soft: a stale map, a dead home or a node that does not answer makes prefixes
shorter, and is said once in the log. Does not cover: what is asked (``kvstore.search``).
"""

import logging
import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kvstore.access import NodeAccess
from kvstore.calls import NodeIdentity
from kvstore.clock import Clock
from kvstore.cluster_map import ClusterMap
from kvstore.contacts import Contact, Contacts
from kvstore.errors import ConfigError, StateError, UnavailableError
from kvstore.fs import LinuxFileSystem
from kvstore.holders import Located
from kvstore.key import Keys
from kvstore.placement import homes_of
from kvstore.plan import OWN_NODE
from kvstore.routes import WriteRoute
from kvstore.rpc.client import ControlClient, StaleMap
from kvstore.rpc.wire import CALL_DEADLINE_S
from kvstore.sessions import SESSION_DEAD_S
from kvstore.table import Cells, KeyTable
from kvstore.transport.base import Transport
from kvstore.transport.local import LocalTransport

log = logging.getLogger(__name__)

INTRODUCED_MAX = 8
"""In larger clusters a client connects to the nodes that it turns out to need."""
PARTING_S = 1.0
"""How often it is looked whether nodes have left the map."""


@dataclass(slots=True)
class _Own:
    """The mapped arena of the own node, and which life of which node it belongs to."""

    identity: NodeIdentity
    table: KeyTable
    transport: LocalTransport


class ClusterRoutes:
    """All nodes of one cluster, seen from one client."""

    def __init__(
        self,
        entry: ControlClient,
        host_id: str,
        token: str | None,
        clock: Clock,
        call_deadline_s: float = CALL_DEADLINE_S,
    ) -> None:
        self._entry = entry
        self._host_id = host_id
        self._fs = LinuxFileSystem()
        self._lock = threading.Lock()
        self._own: _Own | None = None
        self._contacts = Contacts(entry, token, clock, call_deadline_s)
        self._newer: ClusterMap | None = None
        self._closing = threading.Event()
        self._attending = threading.Thread(target=self._attend, name="samovar-attend", daemon=True)

    @classmethod
    def open(
        cls,
        address: str,
        host_id: str,
        token: str | None,
        clock: Clock,
        call_deadline_s: float = CALL_DEADLINE_S,
    ) -> "ClusterRoutes":
        """Connect to the node at ``address``; raises ``UnavailableError`` if nobody answers."""
        entry = ControlClient(address, token, call_deadline_s, clock=clock)
        try:
            hello = entry.hello()
        except (ConfigError, UnavailableError):
            entry.close()
            raise
        routes = cls(entry, host_id, token, clock, call_deadline_s)
        routes._newer = hello.map  # the session's own news of it may still be on their way
        routes._attending.start()
        return routes

    @property
    def map(self) -> ClusterMap:
        """The newest map that any node has told us."""
        told = self._entry.map
        newer = self._newer
        return newer if newer is not None and newer.replaces(told) else told

    @property
    def block_tokens(self) -> int | None:
        return self.map.block_tokens if self.map.epoch else None

    @property
    def nodes(self) -> Mapping[int, str]:
        return {info.index: info.node_id for info in self.map.nodes}

    def own_table(self) -> KeyTable | None:
        own = self._mapped()
        return own.table if own is not None else None

    def locate(self, keys: Keys, spans: npt.NDArray[np.uint64]) -> Located:
        found = self._locate(keys, spans)
        if isinstance(found, StaleMap):
            self._newer = found.map
            found = self._locate(keys, spans)
        if isinstance(found, StaleMap):
            return Located.nothing(len(keys))
        return found.without(self._hidden(found))

    def epoch_of(self, tenant: bytes) -> int:
        return max(self._entry.life.epoch_of(tenant), self._contacts.told_epoch_of(tenant))

    def is_told(self) -> bool:
        """A session with any node tells of all erasures, of those before it first.

        A node that may not know them all opens none: then others are connected to.
        """
        if self._entry.has_session():
            return True
        few = (info.index for info in self.map.nodes[:INTRODUCED_MAX])
        controls = map(self._usable, dict.fromkeys([*self._contacts.indexes, *few]))
        return any(control is not None and control.has_session() for control in controls)

    def access(self, node: int) -> NodeAccess:
        if node == OWN_NODE or self._is_entry(node):
            return self._entry
        return self._contact(node).control

    def is_own(self, node: int) -> bool:
        return node in (OWN_NODE, self._own_index())

    def transport(self, node: int) -> Transport:
        if not self.is_own(node):
            return self._contact(node).bulk
        own = self._mapped()
        if own is None:
            raise UnavailableError("the own node's arena is not mapped")
        return own.transport

    def write_route(self) -> WriteRoute:
        own = self._mapped()
        if own is not None:
            return WriteRoute(self._entry, own.transport)
        identity = self._entry.identity
        entry = next((n for n in self.map.nodes if n.node_id == identity.node_id), None)
        if entry is None:
            raise UnavailableError(f"{identity.node_id} is not in the cluster map yet")
        return WriteRoute(self._entry, self._contact(entry.index).bulk)

    def guarding(self, node: int) -> AbstractContextManager[None]:
        return self._contacts.guarding(node)

    def refuted(self, node: int, keys: Keys, cells: Cells, spans: npt.NDArray[np.uint64]) -> None:
        cluster_map = self.map
        info = cluster_map.by_index(node)
        if info is None:
            return
        homes = homes_of(spans, cluster_map)
        for home in np.unique(homes).tolist():
            named = (homes == home).any(axis=1)
            control = self._usable(home)
            if control is not None:
                with self.guarding(home):
                    control.refute(
                        cluster_map.epoch, node, info.incarnation, keys[named], cells[named]
                    )

    def close(self) -> None:
        self._closing.set()
        self._attending.join()
        with self._lock:
            own, self._own = self._own, None
        self._contacts.close()
        if own is not None:
            own.transport.close()
        self._entry.close()

    def _attend(self) -> None:
        """What no request is to wait for."""
        self._introduce()
        while not self._closing.wait(PARTING_S):
            self._contacts.part(self.map)

    def _introduce(self) -> None:
        """Connect ahead of the first request, where there are few enough nodes to know them all."""
        with suppress(UnavailableError):
            nodes = self.map.nodes
            for info in nodes if len(nodes) <= INTRODUCED_MAX else ():
                if not self._is_entry(info.index):
                    self._contact(info.index)

    def _locate(self, keys: Keys, spans: npt.NDArray[np.uint64]) -> Located | StaleMap:
        """Ask one home of each span, and the other where that one does not answer.

        The node that we are connected to anyway comes first where it is one of the two: it is
        near, and fewer are asked.
        """
        cluster_map = self.map
        homes = homes_of(spans, cluster_map)
        entry = cluster_map.by_id(self._entry.identity.node_id)
        if entry is not None:
            far_first = homes[:, -1] == entry.index
            homes[far_first] = homes[far_first, ::-1]
        rows: list[npt.NDArray[np.intp]] = [np.empty(0, np.intp)]
        parts = [Located.nothing(0)]
        pending = np.arange(len(keys))
        for choice in range(homes.shape[1]):
            unanswered = [np.empty(0, np.intp)]
            for home in np.unique(homes[pending, choice]).tolist():
                asked = pending[homes[pending, choice] == home]
                answer = self._ask(home, cluster_map.epoch, keys[asked])
                if isinstance(answer, StaleMap):
                    return answer
                if answer is None:
                    unanswered.append(asked)
                    continue
                rows.append(np.repeat(asked, answer.counts))
                parts.append(answer)
            pending = np.concatenate(unanswered)
        return _merged(len(keys), rows, parts)

    def _ask(self, home: int, epoch: int, keys: Keys) -> Located | StaleMap | None:
        control = self._usable(home)
        if control is None:
            return None
        with self.guarding(home):
            return control.locate(epoch, keys)
        return None

    def _usable(self, node: int) -> ControlClient | None:
        """The control side of a node, or nothing while it is unreachable or resting."""
        if self._is_entry(node):
            return self._entry
        try:
            return self._contact(node).control
        except UnavailableError:
            return None

    def _contact(self, node: int) -> Contact:
        info = self.map.by_index(node)
        if info is None:
            raise UnavailableError(f"node {node} is not in the cluster map")
        if node in self._entry.unreachable:
            raise UnavailableError(f"node {node} is unreachable")
        return self._contacts.at(info)

    def _is_entry(self, node: int) -> bool:
        info = self.map.by_index(node)
        return info is not None and info.node_id == self._entry.identity.node_id

    def _hidden(self, found: Located) -> frozenset[int]:
        """Nodes that no plan should name: those away or resting, strangers, and the own one.

        That is asked for what may be on its disk, if it has one: its table shows the rest.
        """
        known = {info.index for info in self.map.nodes}
        hidden = self._entry.unreachable | self._contacts.resting()
        own = None if self._entry.has_disk else self._own_index()
        if own is not None:
            hidden |= {own}
        return frozenset(set(np.unique(found.nodes).tolist()) - known | hidden)

    def _own_index(self) -> int | None:
        if self._mapped() is None:
            return None
        info = self.map.by_id(self._entry.identity.node_id)
        return info.index if info is not None else None

    def _mapped(self) -> _Own | None:
        """The own node's arena, mapped anew when the node has restarted with another one.

        Without a session nobody tells us whether the node lives, and an arena whose node is gone
        shows blocks that were deleted since: we look at it no more.
        """
        identity = self._entry.identity
        if identity.host_id != self._host_id or self._entry.lost_s() > SESSION_DEAD_S:
            return None
        own = self._own
        if own is not None and own.identity == identity:
            return own
        with self._lock:
            folder = Path(identity.arena_folder)
            try:
                table = KeyTable.map(self._fs, folder)
                transport = LocalTransport.open(self._fs, folder)
            except (OSError, StateError) as fault:
                log.warning("reading over sockets, the arena can't be mapped: %s", fault)
                return None
            if self._own is not None:
                self._own.transport.close()
            self._own = _Own(identity, table, transport)
            return self._own


def _merged(keys: int, rows: Sequence[npt.NDArray[np.intp]], parts: Sequence[Located]) -> Located:
    """Answers of several homes, put back into the order of the keys."""
    row_of = np.concatenate(rows)
    order = np.argsort(row_of, kind="stable")
    return Located(
        counts=np.bincount(row_of, minlength=keys).astype(np.uint16),
        nodes=np.concatenate([part.nodes for part in parts])[order],
        masks=np.concatenate([part.masks for part in parts])[order],
    )
