"""How a client speaks to one storage node, wherever it runs.

``NodeAccess`` is the part of a node that clients use; ``kvstore.rpc.client`` speaks it over gRPC,
``InProcessNode`` calls a node of this very process. Does not cover: bytes
(``kvstore.transport``).
"""

import threading
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kvstore.calls import (
    AcquireReply,
    Damage,
    NodeIdentity,
    NodeStats,
    Outcomes,
    ReserveReply,
    ReserveRequest,
)
from kvstore.key import Keys
from kvstore.life_access import InProcessLife, LifeAccess
from kvstore.node import Node
from kvstore.table import Cells, Generations, Slots

TICK_S = 0.1


class NodeAccess(Protocol):
    """Calls of one node. All raise ``UnavailableError`` when it does not answer in time."""

    @property
    def identity(self) -> NodeIdentity:
        """Who answered last."""
        ...

    @property
    def session(self) -> int:
        """The open session; raises ``UnavailableError`` while there is none."""
        ...

    @property
    def life(self) -> LifeAccess:
        """What of it is about deletes, promises and erasures."""
        ...

    def reserve(self, request: ReserveRequest) -> ReserveReply: ...

    def commit(
        self,
        session: int,
        slots: Slots,
        generations: Generations,
        header_digests: npt.NDArray[np.uint64],
    ) -> Outcomes: ...

    def abort(self, session: int, slots: Slots, generations: Generations) -> None: ...

    def abandon(self, session: int, slots: Slots, generations: Generations) -> None: ...

    def acquire(self, session: int, keys: Keys, cells: Cells, lease_ms: int) -> AcquireReply: ...

    def release(self, session: int, lease: int) -> None: ...

    def discard(self, damaged: Sequence[Damage]) -> int: ...

    def touch(self, keys: Keys, mask: int, session: int = 0, operation: int = 0) -> int: ...

    def stats(self) -> NodeStats: ...

    def close(self) -> None: ...


class InProcessNode:
    """A node of this process: one lock, one ticking thread, one session that never dies."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._lock = threading.Lock()
        self.life = InProcessLife(node, self._lock)
        self._stop = threading.Event()
        self._session = node.open_session()
        self._ticker = threading.Thread(target=self._tick, name="samovar-tick", daemon=True)
        self._ticker.start()

    @property
    def identity(self) -> NodeIdentity:
        return self._node.identity

    @property
    def session(self) -> int:
        return self._session

    def reserve(self, request: ReserveRequest) -> ReserveReply:
        with self._lock:
            return self._node.reserve(request)

    def commit(
        self,
        session: int,
        slots: Slots,
        generations: Generations,
        header_digests: npt.NDArray[np.uint64],
    ) -> Outcomes:
        with self._lock:
            return self._node.commit(session, slots, generations, header_digests)

    def abort(self, session: int, slots: Slots, generations: Generations) -> None:
        with self._lock:
            self._node.abort(session, slots, generations)

    def abandon(self, session: int, slots: Slots, generations: Generations) -> None:
        with self._lock:
            self._node.abandon(session, slots, generations)

    def acquire(self, session: int, keys: Keys, cells: Cells, lease_ms: int) -> AcquireReply:
        with self._lock:
            return self._node.acquire(session, keys, cells, lease_ms)

    def release(self, session: int, lease: int) -> None:
        with self._lock:
            self._node.release(session, lease)

    def discard(self, damaged: Sequence[Damage]) -> int:
        with self._lock:
            return self._node.discard(damaged)

    def touch(self, keys: Keys, mask: int, session: int = 0, operation: int = 0) -> int:
        with self._lock:
            return self._node.touch(keys, mask, session, operation)

    def stats(self) -> NodeStats:
        with self._lock:
            return self._node.stats()

    def close(self) -> None:
        """End the session and the ticking."""
        self._stop.set()
        self._ticker.join()
        with self._lock:
            self._node.close_session(self._session)

    def _tick(self) -> None:
        while not self._stop.wait(TICK_S):
            with self._lock:
                self._node.beat(self._session)
                self._node.tick()
                self._node.drain_changes()  # nobody else asks where the cells of this node are
