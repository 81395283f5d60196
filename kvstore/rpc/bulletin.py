"""What a node tells everybody who listens: the cluster map, who does not answer, erased tenants.

Listeners are not queued messages: each remembers the version that it saw last and is told what
there is now. So a slow one costs nothing and skips what has been overtaken. Driven by the node's
event loop only.
"""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

from kvstore.cluster_map import ClusterMap


@dataclass(frozen=True, slots=True)
class Notice:
    """What there is to know at one moment."""

    version: int
    map: ClusterMap
    unreachable: frozenset[int]
    epochs_version: int = 0
    """Of the node's ``TenantEpochs``."""


class Bulletin:
    """The latest notice, and a way to wait for the next."""

    def __init__(self, cluster_map: ClusterMap) -> None:
        self.now = Notice(0, cluster_map, frozenset())
        self._changed = asyncio.Event()

    def post_map(self, cluster_map: ClusterMap) -> bool:
        """Take a newer map; an older one, the same, or another tier's changes nothing."""
        if not cluster_map.replaces(self.now.map):
            return False
        self._post(replace(self.now, map=cluster_map))
        return True

    def post_unreachable(self, nodes: frozenset[int]) -> None:
        """Say which nodes do not answer, all of them."""
        if nodes != self.now.unreachable:
            self._post(replace(self.now, unreachable=nodes))

    def post_epochs(self, version: int) -> None:
        """Say that the epochs of tenants have that version."""
        if version != self.now.epochs_version:
            self._post(replace(self.now, epochs_version=version))

    async def notices(self) -> AsyncIterator[Notice]:
        """The notice of now, then the latest one whenever it is another."""
        while True:
            changed, notice = self._changed, self.now
            yield notice
            if self.now is notice:
                await changed.wait()

    def _post(self, notice: Notice) -> None:
        self.now = replace(notice, version=self.now.version + 1)
        self._changed.set()
        self._changed = asyncio.Event()
