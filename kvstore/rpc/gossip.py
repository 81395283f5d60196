"""Gossip: what every node of a map is to know for good, and a node that was away learns first.

    heartbeat ── digests differ ──> read the other's burials and epochs, page by page
    restart, or left out by a map
            ──> sealed: what the node holds is not shown ──> every other node of the map was read
            ──> unsealed: what was deleted meanwhile is gone, and erasures are known

Both ends of a heartbeat do that, so two books become alike, and by ring neighbours all of them.
A sealed node reads another's books once that one goes by the same map: what it deletes from then
on, it tells this node.

Does not cover: what is in the books (``kvstore.burials``, ``kvstore.tenants``), telling a delete to
nodes that answer (``kvstore.rpc.life_service``).
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeVar

from kvstore.burials import BurialPage
from kvstore.cluster_map import ClusterMap
from kvstore.node import Node
from kvstore.rpc.life_messages import Books
from kvstore.rpc.peer import Peer
from kvstore.rpc.tasks import Tasks
from kvstore.tenants import EpochPage

log = logging.getLogger(__name__)

AGAIN_S = 0.5
"""Between two attempts to read the books of a node that does not answer."""
PAGES_MAX = 64
"""A book has fewer: more are no book of ours."""

Page = TypeVar("Page", BurialPage, EpochPage)


class Gossip:
    """One node's books among those of the others. Called on the event loop's thread only."""

    def __init__(self, node: Node, peers: Callable[[], Mapping[int, Peer]]) -> None:
        self._node = node
        self._peers = peers
        self._tasks = Tasks()
        self._reading: dict[int, asyncio.Task[bool]] = {}
        self._map = ClusterMap(0, ())
        self._read: set[int] = set()
        """Whose books were read to the end since this node was sealed."""
        self._asked: dict[int, asyncio.Task[None]] = {}
        self._has_said = False

    @property
    def books(self) -> Books:
        """Digests of what this node knows."""
        return Books(self._node.life.burials.digest(), self._node.life.tenants.digest())

    def heard(self, sender: int, books: Books) -> None:
        """Another node has these digests: read what it knows, where ours are others."""
        if books != self.books:
            self._read_from(sender)

    def follow(self, cluster_map: ClusterMap, index: int) -> None:
        """Take a newer map, in which this node has that index."""
        self._map = cluster_map
        if not self._node.life.is_sealed:
            return
        others = {node.index for node in cluster_map.nodes} - {index}
        for other in list(self._asked.keys() - others):
            self._asked.pop(other).cancel()
        for other in others - self._read - self._asked.keys():
            self._asked[other] = self._tasks.spawn(self._ask(other))
        self._unseal_if_all_were_read()

    def away(self) -> None:
        """No map names this node any more: what the others know from now on, it has not read."""
        for task in self._asked.values():
            task.cancel()
        self._asked.clear()
        self._read.clear()
        self._has_said = False

    async def close(self) -> None:
        """Read no further."""
        await self._tasks.close()

    async def _ask(self, other: int) -> None:
        """Read another node's books, however long it takes until it answers."""
        while not await self._read_anew(other):
            if not self._has_said:
                self._has_said = True
                log.warning(
                    "nothing is shown or stored here before node %s has said what was deleted and "
                    "erased meanwhile",
                    ", ".join(map(str, sorted(self._asked))),
                )
            await asyncio.sleep(AGAIN_S)
        self._read.add(other)
        self._asked.pop(other, None)
        self._unseal_if_all_were_read()

    async def _read_anew(self, other: int) -> bool:
        """Read another node's books from now on, if it goes by our map."""
        peer = self._peers().get(other)
        if peer is None:
            return False
        theirs = await peer.hand_on(self._map)
        if theirs is None or theirs.epoch != self._map.epoch:
            return False
        return await self._take_over(peer)

    def _unseal_if_all_were_read(self) -> None:
        if self._node.life.is_sealed and not self._asked:
            self._node.life.unseal()
            log.info("every other node of the map was asked for deletes and erasures")

    def _read_from(self, other: int) -> None:
        """Read a node's books, unless that is under way; nothing where the map has none."""
        peer = self._peers().get(other)
        task = self._reading.get(other)
        if peer is not None and (task is None or task.done()):
            self._reading[other] = self._tasks.spawn(self._take_over(peer))

    async def _take_over(self, peer: Peer) -> bool:
        """Read both books; whether that came to an end."""
        return await _each_page(peer.burials, self._node.life.deletes_from) and await _each_page(
            peer.epochs, self._node.life.raise_epochs
        )


async def _each_page(
    ask: Callable[[int], Awaitable[Page | None]], take: Callable[[Page], object]
) -> bool:
    start = 0
    for _ in range(PAGES_MAX):
        page = await ask(start)
        if page is None:
            return False
        take(page)
        start = page.next
        if not start:
            return True
    return False
