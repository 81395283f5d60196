"""The replicator: carries out, on a node's event loop, what ``kvstore.replication`` decides.

One step at a time: a survey is a call of the other node, a parcel an errand of the process that
moves the bytes. Does not cover: either of them.
"""

import asyncio
import logging
from collections.abc import Mapping
from typing import Protocol

from kvstore.errand import Done, Errand
from kvstore.node import Node
from kvstore.replication import Other, Survey
from kvstore.rpc.bulletin import Bulletin
from kvstore.rpc.peer import Peer

log = logging.getLogger(__name__)

IDLE_S = 0.1


class Company(Protocol):
    """Who else is in the map."""

    @property
    def peers(self) -> Mapping[int, Peer]:
        """The other nodes, by their indexes."""
        ...


class Copier(Protocol):
    """Who moves the bytes."""

    async def run(self, errand: Errand) -> Done:
        """Do one errand."""
        ...


class Replicator:
    """One node's copies on other nodes. Used on the event loop's thread only."""

    def __init__(self, node: Node, company: Company, bulletin: Bulletin, copier: Copier) -> None:
        self._node = node
        self._company = company
        self._bulletin = bulletin
        self._copier = copier
        self._fault = ""

    async def run(self) -> None:
        """Until it is cancelled. A step that fails is our bug; the next one may still do good."""
        while True:
            try:
                is_busy = await self.step()
            except Exception:
                log.exception("a step towards copies failed")
                is_busy = False
            await asyncio.sleep(0 if is_busy else IDLE_S)

    async def step(self) -> bool:
        """Do what is to be done now; whether there was anything."""
        life = self._node.life
        if life.is_sealed:
            return False  # what is here may have been deleted
        now, peers = self._bulletin.now, self._company.peers
        infos = {
            info.node_id: info
            for info in now.map.nodes
            if info.index in peers and info.index not in now.unreachable
        }
        replication = life.replication
        host_id = self._node.identity.host_id
        step = replication.next(
            {
                name: Other(info.incarnation, is_near=info.host_id == host_id)
                for name, info in infos.items()
            }
        )
        if step is None:
            return False
        info = infos[step.node]
        if isinstance(step, Survey):
            replication.surveyed(await peers[info.index].carry(step.request))
            return True
        errand = Errand(info.control, info.bulk, step.keys, step.cells, step.burials)
        done = await self._copier.run(errand)
        if done.fault not in ("", self._fault):
            log.warning("a copy for node %s has to wait: %s", step.node, done.fault)
        self._fault = done.fault
        replication.delivered(done.arrived)
        return True
