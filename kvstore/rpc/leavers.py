"""Leavers: nodes that a newer map leaves out, until it is known that they go by it.

    map E names x ──> map E+1 does not ──> x is handed it, again and again ──> x goes by it: sealed
                                                   └── for ``LEAVER_S`` in vain: given up, and said

Who goes by no map that names it shows nothing of what it holds (``kvstore.rpc.neighbourhood``).
Before that it shows its own machine what is deleted elsewhere, so deletes name it as pending. Does
not cover: a node that is in the map and does not answer.
"""

import asyncio
import logging
from collections.abc import Mapping

from kvstore.cluster_map import ClusterMap
from kvstore.rpc.peer import Peer
from kvstore.rpc.tasks import Tasks

log = logging.getLogger(__name__)

LEAVER_S = 60.0
"""So long a node that does not answer may be on its way out."""
AGAIN_S = 0.5
"""Between two attempts to tell it."""


class Leavers:
    """Those that one node knows of. Called on the event loop's thread only."""

    def __init__(self, tasks: Tasks) -> None:
        self._tasks = tasks
        self._telling: dict[int, asyncio.Task[None]] = {}

    @property
    def indexes(self) -> frozenset[int]:
        """Nodes that may show what they hold although the map leaves them out."""
        return frozenset(self._telling)

    def follow(self, cluster_map: ClusterMap, gone: Mapping[int, Peer]) -> None:
        """Take a newer map; ``gone`` are those of the last one that it leaves out."""
        for index in [index for index in self._telling if cluster_map.by_index(index) is not None]:
            self._telling.pop(index).cancel()
        for index, peer in gone.items():
            self._telling[index] = self._tasks.spawn(self._tell(index, peer, cluster_map))

    async def _tell(self, index: int, peer: Peer, cluster_map: ClusterMap) -> None:
        loop = asyncio.get_running_loop()
        until_s = loop.time() + LEAVER_S
        try:
            while True:
                theirs = await peer.hand_on(cluster_map)
                if theirs is not None and theirs.epoch >= cluster_map.epoch:
                    break
                if loop.time() >= until_s:
                    log.warning(
                        "node %d has not said that it knows that the map leaves it out: if it "
                        "still runs, it may show its own machine what is deleted from now on",
                        index,
                    )
                    break
                await asyncio.sleep(AGAIN_S)
            del self._telling[index]
        finally:
            await peer.close()
