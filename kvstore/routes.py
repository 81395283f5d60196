"""Routes: how a client gets to nodes, its own and the others.

``Routes`` is what searching, reading and writing need; ``OneNode`` is the embedded tier, whose
only node is this process. Does not cover: a cluster (``kvstore.cluster_routes``).
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kvstore.access import NodeAccess
from kvstore.errors import UnavailableError
from kvstore.holders import Located
from kvstore.key import Keys
from kvstore.namespace import Namespace
from kvstore.plan import OWN_NODE
from kvstore.table import Cells, KeyTable
from kvstore.tenants import tenant_digest
from kvstore.transport.base import Transport


@dataclass(frozen=True, slots=True)
class WriteRoute:
    """Where this client's puts go."""

    access: NodeAccess
    transport: Transport


class Routes(Protocol):
    """Ways to nodes; ``OWN_NODE`` is the one whose arena this process has mapped."""

    @property
    def block_tokens(self) -> int | None:
        """Tokens in a full block of this tier; ``None`` before its first map has come."""
        ...

    @property
    def nodes(self) -> Mapping[int, str]:
        """The names of all nodes of this tier, by what ``access`` calls them."""
        ...

    def own_table(self) -> KeyTable | None:
        """The key table of the own node; ``None`` where there is none to map."""
        ...

    def locate(self, keys: Keys, spans: npt.NDArray[np.uint64]) -> Located:
        """Which nodes hold these keys, as far as the directory knows.

        The own node is among them if it has a disk: its table does not show what is there.
        """
        ...

    def is_own(self, node: int) -> bool:
        """Whether it is the own node, by whichever of its two names."""
        ...

    def epoch_of(self, tenant: bytes) -> int:
        """A tenant's epoch, as far as any node has told; asks nobody."""
        ...

    def is_told(self) -> bool:
        """Whether some node tells this client of erasures; who is told of none goes by no epoch."""
        ...

    def access(self, node: int) -> NodeAccess:
        """The control side of a node; raises ``UnavailableError`` while it is not usable."""
        ...

    def transport(self, node: int) -> Transport:
        """The byte side of a node."""
        ...

    def write_route(self) -> WriteRoute:
        """Where puts go; raises ``UnavailableError`` while there is nowhere."""
        ...

    def guarding(self, node: int) -> AbstractContextManager[None]:
        """A failure of the node (``UnavailableError``) ends the block, and is remembered."""
        ...

    def refuted(self, node: int, keys: Keys, cells: Cells, spans: npt.NDArray[np.uint64]) -> None:
        """The node said that it does not hold these cells, whatever the directory believes."""
        ...

    def close(self) -> None:
        """End everything that was opened."""
        ...


def is_erased(namespace: Namespace, routes: Routes) -> bool:
    """Whether its tenant was erased since, as far as any node has told."""
    return routes.epoch_of(tenant_digest(namespace.tenant)) > namespace.tenant_epoch


class OneNode:
    """An embedded tier: one node, no directory."""

    def __init__(
        self, access: NodeAccess, transport: Transport, table: KeyTable, block_tokens: int
    ) -> None:
        self.block_tokens: int | None = block_tokens
        self.nodes = {OWN_NODE: access.identity.node_id}
        self._access = access
        self._transport = transport
        self._table = table

    def own_table(self) -> KeyTable | None:
        return self._table

    def locate(self, keys: Keys, spans: npt.NDArray[np.uint64]) -> Located:
        return Located.nothing(len(keys))

    def is_own(self, node: int) -> bool:
        return node == OWN_NODE

    def epoch_of(self, tenant: bytes) -> int:
        return self._access.life.epoch_of(tenant)

    def is_told(self) -> bool:
        return True

    def access(self, node: int) -> NodeAccess:
        if node != OWN_NODE:
            raise UnavailableError(f"an embedded tier has no node {node}")
        return self._access

    def transport(self, node: int) -> Transport:
        return self._transport

    def write_route(self) -> WriteRoute:
        return WriteRoute(self._access, self._transport)

    def guarding(self, node: int) -> AbstractContextManager[None]:
        return suppress(UnavailableError)

    def refuted(self, node: int, keys: Keys, cells: Cells, spans: npt.NDArray[np.uint64]) -> None:
        return

    def close(self) -> None:
        self._access.close()
        self._transport.close()
