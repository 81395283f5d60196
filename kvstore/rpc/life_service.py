"""The Life service: deletes, erasures and promises, served to whoever asks and to other nodes.

    Delete ──> this node: invisible at once, durable in a while ─┐
          └──> every other node of the map: Bury ───────────────┴──> answer: done, or who is pending

What outlasts an answer's patience goes on all the same, and a node that was not reached hears of
it from its neighbours (``kvstore.rpc.gossip``). Does not cover: what a delete, a promise or an
epoch is (``kvstore.node``).
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping
from typing import Protocol

import grpc
import numpy as np

from kvstore.burials import PAGE_BURIALS_MAX
from kvstore.calls import DELETE_KEYS_MAX, INSPECT_KEYS_MAX
from kvstore.deletes import Deletion
from kvstore.errors import StateError, UnavailableError
from kvstore.life_access import Granted, Spread
from kvstore.node import Node
from kvstore.rpc import life_messages as messages
from kvstore.rpc import life_pb2 as pb
from kvstore.rpc.answering import answering, answering_later
from kvstore.rpc.audience import Audience
from kvstore.rpc.bulletin import Bulletin
from kvstore.rpc.cluster_pb2 import OVERLOADED, SEALED
from kvstore.rpc.life_pb2_grpc import LifeServicer
from kvstore.rpc.peer import Peer
from kvstore.rpc.tasks import Tasks
from kvstore.rpc.wire import ONWARD, WireFault, invalid, unpack_keys
from kvstore.tenants import PAGE_TENANTS_MAX, EpochPage

log = logging.getLogger(__name__)

DELETES_UNDER_WAY_MAX = 256
"""Calls whose keys the disk has not let go of; what comes on top is to be asked for again."""
_PAUSE_MIN_S = 0.002
_PAUSE_MAX_S = 0.1

DeleteContext = grpc.aio.ServicerContext[pb.DeleteRequest, pb.DeleteReply]
EraseContext = grpc.aio.ServicerContext[pb.EraseRequest, pb.EraseReply]
RaiseContext = grpc.aio.ServicerContext[pb.RaiseEpochsRequest, pb.RaiseEpochsReply]
BuryContext = grpc.aio.ServicerContext[pb.BuryRequest, pb.BuryReply]


class Company(Protocol):
    """Who else is in the map."""

    @property
    def peers(self) -> Mapping[int, Peer]:
        """The other nodes, by their indexes."""
        ...

    @property
    def leavers(self) -> frozenset[int]:
        """Nodes that the map leaves out, and that may not know it."""
        ...


class LifeService(LifeServicer):
    """One node's part. Called on the event loop's thread only."""

    def __init__(
        self, node: Node, company: Company, bulletin: Bulletin, audience: Audience
    ) -> None:
        self._node = node
        self._company = company
        self._bulletin = bulletin
        self._audience = audience
        self._tasks = Tasks()
        self._deletes = 0

    @answering_later(pb.DeleteReply)
    async def Delete(self, request: pb.DeleteRequest, context: DeleteContext) -> pb.DeleteReply:
        self._check_load()
        keys = unpack_keys(request.keys, DELETE_KEYS_MAX)
        deletion = self._node.life.delete(keys)
        patience_s = messages.patience_s(request.patience_ms)
        spread = await self._spread(
            deletion.id,
            self._see_through(deletion),
            lambda peer: peer.bury(keys, deletion.id, ONWARD * patience_s),
            patience_s,
        )
        return messages.deleted_to_message(spread)

    @answering_later(pb.BuryReply)
    async def Bury(self, request: pb.BuryRequest, context: BuryContext) -> pb.BuryReply:
        self._check_load()
        keys = unpack_keys(request.keys, DELETE_KEYS_MAX)
        burial = self._tasks.spawn(self._see_through(self._node.life.delete(keys, request.id)))
        done, _ = await asyncio.wait([burial], timeout=messages.patience_s(request.patience_ms))
        return pb.BuryReply(durable=bool(done) and burial.result())

    @answering(pb.BurialsReply)
    def Burials(self, request: pb.PageRequest) -> pb.BurialsReply:
        page = self._node.life.burial_page(request.start, PAGE_BURIALS_MAX)
        return messages.burials_to_message(page)

    @answering_later(pb.EraseReply)
    async def Erase(self, request: pb.EraseRequest, context: EraseContext) -> pb.EraseReply:
        tenant = messages.tenant_of(request.tenant)
        patience_s = messages.patience_s(request.patience_ms)
        is_durable = True
        try:
            epoch = self._node.life.erase(tenant)
        except UnavailableError as fault:
            raise WireFault(SEALED, str(fault)) from None
        except StateError as fault:  # it goes on all the same, and is tried again
            log.warning("an erasure is not durable yet: %s", fault)
            epoch, is_durable = self._node.life.tenants.epoch_of(tenant), False
        page = EpochPage(np.frombuffer(tenant, np.uint8)[None], np.array([epoch], np.uint64))
        spread = await self._spread(
            epoch,
            self._tell_clients(is_durable, patience_s),
            lambda peer: peer.raise_epochs(page, ONWARD * patience_s),
            patience_s,
        )
        return messages.erased_to_message(spread)

    @answering_later(pb.RaiseEpochsReply)
    async def RaiseEpochs(
        self, request: pb.RaiseEpochsRequest, context: RaiseContext
    ) -> pb.RaiseEpochsReply:
        page = messages.epochs_from_message(request)
        is_durable = self._node.life.raise_epochs(page)
        # Who tells of an epoch that is over has erased nothing: it is to hear of ours first.
        is_durable = is_durable and self._node.life.tenants.goes_by(page)
        patience_s = messages.patience_s(request.patience_ms)
        return pb.RaiseEpochsReply(durable=await self._tell_clients(is_durable, patience_s))

    @answering(pb.EpochsReply)
    def Epochs(self, request: pb.PageRequest) -> pb.EpochsReply:
        page = self._node.life.tenants.page(request.start, PAGE_TENANTS_MAX)
        return messages.epochs_to_message(page)

    @answering(pb.HoldReply)
    def Hold(self, request: pb.HoldRequest) -> pb.HoldReply:
        wanted = messages.hold_from_message(request)
        marks = self._node.life.holds_of(wanted.tenant)
        extended = any(mark.handle == wanted.handle for mark in marks)
        return messages.held_to_message(Granted(self._node.life.hold(wanted), extended))

    @answering(pb.CarryReply)
    def Carry(self, request: pb.CarryRequest) -> pb.CarryReply:
        wanted = messages.carry_from_message(request)
        origin = self._bulletin.now.map.by_id(wanted.origin)
        if origin is None or wanted.origin == self._node.identity.node_id:
            raise invalid(f"{wanted.origin} is no other node of this node's map")
        return messages.carried_to_message(self._node.life.carry(wanted))

    @answering(pb.ReleaseHoldReply)
    def ReleaseHold(self, request: pb.ReleaseHoldRequest) -> pb.ReleaseHoldReply:
        tenant = messages.tenant_of(request.tenant)
        return pb.ReleaseHoldReply(released=self._node.life.release_hold(tenant, request.handle))

    @answering(pb.InspectReply)
    def Inspect(self, request: pb.InspectRequest) -> pb.InspectReply:
        keys = unpack_keys(request.keys, INSPECT_KEYS_MAX)
        return messages.inspected_to_message(self._node.life.inspect(keys))

    async def close(self) -> None:
        """Wait for no disk any more."""
        await self._tasks.close()

    async def _spread(
        self,
        number: int,
        here: Coroutine[object, object, bool],
        there: Callable[[Peer], Coroutine[object, object, bool]],
        patience_s: float,
    ) -> Spread:
        """Do something here and on all other nodes; who has not done it within the patience."""
        own, own_id = self._tasks.spawn(here), self._node.identity.node_id
        others = {
            index: self._tasks.spawn(there(peer)) for index, peer in self._company.peers.items()
        }
        await asyncio.wait([own, *others.values()], timeout=patience_s)
        done = {index for index, task in others.items() if task.done() and task.result()}
        # A node that the map leaves out has nobody to tell: they hear of it when it is back.
        named = {n.index for n in self._bulletin.now.map.nodes if n.node_id != own_id}
        pending = (others.keys() | named | self._company.leavers) - done
        # Who was among others, and has heard of no map since its start, has not told them.
        knows_all = self._bulletin.now.map.epoch > 0 or not self._node.life.had_company
        return Spread(number, own.done() and own.result() and knows_all, frozenset(pending))

    async def _tell_clients(self, is_durable: bool, patience_s: float) -> bool:
        """Whether all clients of this node know the epochs in time, which are durable besides."""
        self._bulletin.post_epochs(self._node.life.tenants.version)
        return await self._audience.all_know(patience_s) and is_durable

    async def _see_through(self, deletion: Deletion) -> bool:
        """Bury what is being deleted as soon as the disk allows; whether that is durable."""
        self._deletes += 1
        pause_s = _PAUSE_MIN_S
        try:
            while not deletion.is_done:
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _PAUSE_MAX_S)
                self._node.behind.poll()
        finally:
            self._deletes -= 1
        return self._node.life.bury(deletion)

    def _check_load(self) -> None:
        if self._deletes >= DELETES_UNDER_WAY_MAX:
            raise WireFault(
                OVERLOADED, "this node's disk has not kept up with deletes: ask again later"
            )
