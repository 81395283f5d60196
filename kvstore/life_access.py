"""How a client speaks to a storage node about the life of blocks; see ``kvstore.access``.

``LifeAccess`` is the part of ``kvstore.life.Life`` that clients use, with what it takes to reach
all nodes of a map; ``kvstore.rpc.life_client`` speaks it over gRPC.
"""

import threading
from dataclasses import dataclass
from typing import Protocol

from kvstore.calls import HoldReply, HoldRequest, Inspection
from kvstore.errors import StateError, UnavailableError
from kvstore.key import Keys
from kvstore.node import Node


@dataclass(frozen=True, slots=True)
class Spread:
    """How far a delete or an erasure has come: ``number`` is its id, or the tenant's new epoch.

    ``durable`` says whether the node that was asked is done, and knows whom else to tell;
    ``pending`` which others are not done, by their indexes in the map.
    """

    number: int
    durable: bool
    pending: frozenset[int]


@dataclass(frozen=True, slots=True)
class Granted:
    """A node's answer to a hold, and whether the handle had a promise there before."""

    reply: HoldReply
    extended: bool


class LifeAccess(Protocol):
    """Calls of one node. All raise ``UnavailableError`` when it does not answer in time."""

    def delete(self, keys: Keys) -> Spread:
        """Delete blocks on every node of the map, ``DELETE_KEYS_MAX`` at most."""
        ...

    def erase(self, tenant: bytes) -> Spread:
        """Begin a tenant's next epoch on every node of the map."""
        ...

    def epoch_of(self, tenant: bytes) -> int:
        """A tenant's epoch, as far as this node has told; asks nobody."""
        ...

    def hold(self, request: HoldRequest) -> Granted:
        """Ask this node to keep blocks."""
        ...

    def release_hold(self, tenant: bytes, handle: str) -> bool:
        """End a promise of this node; whether there was one."""
        ...

    def inspect(self, keys: Keys) -> list[Inspection]:
        """What this node knows of blocks, ``INSPECT_KEYS_MAX`` at most."""
        ...


class InProcessLife:
    """Of a node of this process, which has no disk and is alone."""

    def __init__(self, node: Node, lock: threading.Lock) -> None:
        self._life = node.life
        self._lock = lock

    def delete(self, keys: Keys) -> Spread:
        with self._lock:
            deletion = self._life.delete(keys)
            return Spread(deletion.id, self._life.bury(deletion), frozenset())

    def erase(self, tenant: bytes) -> Spread:
        with self._lock:
            try:
                return Spread(self._life.erase(tenant), True, frozenset())
            except StateError as fault:
                raise UnavailableError(str(fault)) from None

    def epoch_of(self, tenant: bytes) -> int:
        return self._life.tenants.epoch_of(tenant)

    def hold(self, request: HoldRequest) -> Granted:
        with self._lock:
            marks = self._life.holds_of(request.tenant)
            extended = any(mark.handle == request.handle for mark in marks)
            return Granted(self._life.hold(request), extended)

    def release_hold(self, tenant: bytes, handle: str) -> bool:
        with self._lock:
            return self._life.release_hold(tenant, handle)

    def inspect(self, keys: Keys) -> list[Inspection]:
        with self._lock:
            return self._life.inspect(keys)
