"""The Cache service: a node's authority over its cells, served to inference workers.

Covers: the checks that need the node (versions, incarnation, session), the session stream, and an
Acquire's wait for the disk, in which the node does other things.
Everything else is ``kvstore.node``, which is called on the event loop's thread only: no locks.
"""

import asyncio
from collections.abc import AsyncIterator

import grpc
import numpy as np

from kvstore.calls import MAX_CELLS_PER_CALL
from kvstore.key import Keys
from kvstore.node import Node
from kvstore.rpc import cache_pb2 as pb
from kvstore.rpc import convert
from kvstore.rpc.answering import answering, answering_later
from kvstore.rpc.audience import Audience
from kvstore.rpc.bulletin import Bulletin
from kvstore.rpc.cache_pb2_grpc import CacheServicer
from kvstore.rpc.cluster_pb2 import (
    SEALED,
    TOO_MANY_KEYS,
    TOO_MANY_SESSIONS,
    UNKNOWN_SESSION,
    WRONG_INCARNATION,
)
from kvstore.rpc.wire import (
    PROBES_MAX,
    WIRE_VERSION,
    WireFault,
    invalid,
    pack,
    unpack,
    unpack_all,
    unpack_keys,
)
from kvstore.table import Generations, Slots
from kvstore.tiers.promotion import Promotion

DISK_POLL_S = 0.002
"""How often a call that waits for the disk looks."""

Acquiring = grpc.aio.ServicerContext[pb.AcquireRequest, pb.AcquireReply]
Context = grpc.aio.ServicerContext[pb.Beat, pb.SessionEvent]


class CacheService(CacheServicer):
    """One node's cells. ``bulk`` is set, and set anew, by whoever runs the bulk process."""

    def __init__(self, node: Node, bulletin: Bulletin) -> None:
        self.bulk = ""
        self.audience = Audience(node.life.tenants)
        self._node = node
        self._bulletin = bulletin

    @answering(pb.HelloReply)
    def Hello(self, request: pb.HelloRequest) -> pb.HelloReply:
        if request.wire_version != WIRE_VERSION:
            raise invalid(
                f"this node speaks wire version {WIRE_VERSION}, you {request.wire_version}: "
                "install the same release on both sides"
            )
        capacity_bytes = self._node.stats().host.capacity_bytes
        return convert.hello_to_message(
            convert.Hello(
                identity=self._node.identity,
                capacity_bytes=capacity_bytes,
                bulk=self.bulk,
                map=self._bulletin.now.map,
                has_disk=self._node.behind.has_disk,
            )
        )

    @answering(pb.LookupReply)
    def Lookup(self, request: pb.LookupRequest) -> pb.LookupReply:
        keys = _probes(request.keys, request.mask)
        return pb.LookupReply(blocks=self._node.lookup(keys, request.mask))

    @answering(pb.ReserveReply)
    def Reserve(self, request: pb.ReserveRequest) -> pb.ReserveReply:
        self._check(request.incarnation)
        self._check_session(request.session)
        reply = self._node.reserve(convert.reserve_from_message(request))
        return convert.reserved_to_message(reply)

    @answering(pb.CommitReply)
    def Commit(self, request: pb.CommitRequest) -> pb.CommitReply:
        # Not a word about the session: what was committed already is STORED even after its end.
        self._check(request.incarnation)
        slots = unpack_all(request.slots, np.uint32, MAX_CELLS_PER_CALL, "slots")
        count = len(slots)
        outcomes = self._node.commit(
            request.session,
            slots,
            unpack(request.generations, np.uint64, count, "generations"),
            unpack(request.header_digests, np.uint64, count, "header_digests"),
        )
        return pb.CommitReply(outcomes=pack(outcomes, np.uint8))

    @answering(pb.AbortReply)
    def Abort(self, request: pb.AbortRequest) -> pb.AbortReply:
        self._node.abort(request.session, *self._given_up(request))
        return pb.AbortReply()

    @answering(pb.AbortReply)
    def Abandon(self, request: pb.AbortRequest) -> pb.AbortReply:
        self._node.abandon(request.session, *self._given_up(request))
        return pb.AbortReply()

    @answering_later(pb.AcquireReply)
    async def Acquire(self, request: pb.AcquireRequest, context: Acquiring) -> pb.AcquireReply:
        self._check(request.incarnation)
        self._check_session(request.session)
        keys = unpack_keys(request.keys, MAX_CELLS_PER_CALL)
        cells = convert.cells_from_bytes(request.cells, len(keys))
        promotion = self._node.begin_acquire(keys, cells)
        try:
            if not promotion.is_done:
                await self._come_up(promotion, _patience_s(request, context))
            reply = self._node.acquire(request.session, keys, cells, request.lease_ms, promotion)
        finally:
            self._node.end_acquire(promotion)
        return convert.acquired_to_message(reply)

    @answering(pb.ReleaseReply)
    def Release(self, request: pb.ReleaseRequest) -> pb.ReleaseReply:
        self._check(request.incarnation)
        self._node.release(request.session, request.lease)
        return pb.ReleaseReply()

    @answering(pb.DiscardReply)
    def Discard(self, request: pb.DiscardRequest) -> pb.DiscardReply:
        damaged = [convert.damage_from_message(one) for one in request.cells]
        return pb.DiscardReply(cells=self._node.discard(damaged))

    @answering(pb.TouchReply)
    def Touch(self, request: pb.TouchRequest) -> pb.TouchReply:
        keys = _probes(request.keys, request.mask)
        touched = self._node.touch(keys, request.mask, request.session, request.operation)
        return pb.TouchReply(cells=touched)

    @answering(pb.StatsReply)
    def Stats(self, request: pb.StatsRequest) -> pb.StatsReply:
        return convert.stats_to_message(self._node.stats())

    async def Session(self, requests: AsyncIterator[pb.Beat], context: Context) -> None:
        """Open on the first beat, tell the news, close when the stream or the beats end."""
        first = await anext(requests, None)
        if first is None:
            return
        try:
            self._check(first.incarnation)
            session = self._open()
        except WireFault as fault:
            await context.write(pb.SessionEvent(closed=fault.verdict()))
            return
        try:
            self.audience.join(session)
            # Before it is open: whoever has a session goes by the epochs of its start at least.
            for event in self.audience.news(session):
                await context.write(event)
            await context.write(pb.SessionEvent(opened=session))
            telling = asyncio.Lock()
            beats = asyncio.create_task(self._listen(requests, session))
            news = asyncio.create_task(self._tell(context, session, telling))
            try:
                ended, _ = await asyncio.wait({beats, news}, return_when=asyncio.FIRST_COMPLETED)
                for task in ended:
                    task.result()
                async with telling:
                    pass  # a write that is cut off costs memory
            finally:
                beats.cancel()
                news.cancel()
                await asyncio.gather(beats, news, return_exceptions=True)
        finally:
            was_open = self._node.has_session(session)
            self.audience.leave(session)
            self._node.close_session(session)
        if not was_open:  # else the client has hung up, and a write that fails costs memory
            await context.write(pb.SessionEvent(closed=_unknown(session).verdict()))

    async def _come_up(self, promotion: Promotion, patience_s: float) -> None:
        """Wait until the disk has delivered, or refused, what was asked; or for as long as that."""
        until_s = asyncio.get_running_loop().time() + patience_s
        while not promotion.is_done and asyncio.get_running_loop().time() < until_s:
            await asyncio.sleep(DISK_POLL_S)
            self._node.behind.poll()

    def _given_up(self, request: pb.AbortRequest) -> tuple[Slots, Generations]:
        self._check(request.incarnation)
        slots = unpack_all(request.slots, np.uint32, MAX_CELLS_PER_CALL, "slots")
        return slots, unpack(request.generations, np.uint64, len(slots), "generations")

    def _open(self) -> int:
        if self._node.life.is_sealed:
            raise WireFault(SEALED, "this node does not know yet which tenants were erased")
        session = self._node.open_session()
        if not session:
            raise WireFault(TOO_MANY_SESSIONS, "this node has too many clients: use fewer")
        return session

    async def _listen(self, requests: AsyncIterator[pb.Beat], session: int) -> None:
        """Until the client hangs up, or has been silent for too long."""
        async for beat in requests:
            if not self._node.beat(session):
                return
            self.audience.heard(session, beat.epochs_version)

    async def _tell(self, context: Context, session: int, telling: asyncio.Lock) -> None:
        """Until the session ends; has ``telling`` while something is on its way."""
        told_map, told_unreachable = None, None
        async for notice in self._bulletin.notices():
            async with telling:
                if notice.map is not told_map:
                    told_map = notice.map
                    await context.write(pb.SessionEvent(map=convert.map_to_message(told_map)))
                if notice.unreachable != told_unreachable:
                    told_unreachable = notice.unreachable
                    nodes = pb.Unreachable(nodes=convert.nodes_to_bytes(told_unreachable))
                    await context.write(pb.SessionEvent(unreachable=nodes))
                for event in self.audience.news(session):
                    await context.write(event)
            if not self._node.has_session(session):
                return

    def _check(self, incarnation: int) -> None:
        if incarnation != self._node.identity.incarnation:
            raise WireFault(
                WRONG_INCARNATION,
                f"node {self._node.identity.node_id} is in incarnation "
                f"{self._node.identity.incarnation}, not {incarnation}",
            )

    def _check_session(self, session: int) -> None:
        # A call is as good a sign of life as a beat.
        if not self._node.beat(session):
            raise _unknown(session)


def _patience_s(request: pb.AcquireRequest, context: Acquiring) -> float:
    """Half of what the caller has: the other half is for the answer, and for reading."""
    left_s = context.time_remaining()
    lease_s = request.lease_ms / 1000
    return (lease_s if left_s is None else min(lease_s, left_s)) / 2


def _unknown(session: int) -> WireFault:
    return WireFault(UNKNOWN_SESSION, f"session {session} has ended: open a new one")


def _probes(data: bytes, mask: int) -> Keys:
    """The keys of a call that looks at every cell of ``mask`` for each of them."""
    keys = unpack_keys(data, PROBES_MAX)
    probes = len(keys) * mask.bit_count()
    if probes > PROBES_MAX:
        raise WireFault(
            TOO_MANY_KEYS, f"{probes} cells in one call are over {PROBES_MAX}: split the call"
        )
    return keys
