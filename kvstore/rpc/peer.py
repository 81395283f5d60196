"""One storage node seen from another: announcements, heartbeats, maps, deletes; on the event loop.

Every call has a deadline and answers ``None`` when the other node did not answer in a way that
makes sense: there is nothing to do about it but to try again later.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

import grpc
import numpy as np

from kvstore.burials import BurialPage
from kvstore.calls import CarryReply, CarryRequest
from kvstore.cluster_map import ClusterMap
from kvstore.directory import Announcement, Answer
from kvstore.key import Keys
from kvstore.membership import Heartbeat
from kvstore.rpc import cluster_pb2, convert, life_messages, life_pb2
from kvstore.rpc.answering import ReplyType
from kvstore.rpc.cluster_pb2_grpc import ClusterStub
from kvstore.rpc.directory_pb2_grpc import DirectoryStub
from kvstore.rpc.life_messages import Books
from kvstore.rpc.life_pb2_grpc import LifeStub
from kvstore.rpc.wire import CHANNEL_OPTIONS, ONWARD, WireFault, bearer, pack
from kvstore.tenants import EpochPage

ANNOUNCE_DEADLINE_S = 2.0
PAGE_DEADLINE_S = 2.0
CARRY_DEADLINE_S = 2.0
HAND_ON_DEADLINE_S = 1.0

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Echo:
    """The answer to a heartbeat; a map only if the other node has a newer one.

    ``beat`` is ``None`` while no map names the other node.
    """

    beat: Heartbeat | None
    map_epoch: int
    map: ClusterMap | None
    books: Books


class Peer:
    """A connection to another node, made when it is first needed."""

    def __init__(self, address: str, token: str | None) -> None:
        self.address = address
        self._metadata = bearer(token)
        self._channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._directory = DirectoryStub(self._channel)
        self._cluster = ClusterStub(self._channel)
        self._life = LifeStub(self._channel)

    async def announce(
        self, announcement: Announcement, map_epoch: int
    ) -> Answer | ClusterMap | None:
        """The home's answer, or the map that it goes by when that is another one than ours."""
        request = convert.announcement_to_message(announcement, map_epoch)
        try:
            reply = await self._directory.Announce(
                request, timeout=ANNOUNCE_DEADLINE_S, metadata=self._metadata
            )
            if reply.verdict.outcome == cluster_pb2.WRONG_EPOCH:
                return convert.map_from_message(reply.verdict.map)
            if reply.verdict.outcome != cluster_pb2.DONE:
                return None
            return convert.answer_from_message(reply)
        except (grpc.RpcError, WireFault):
            return None

    async def beat(self, beat: Heartbeat, books: Books, deadline_s: float) -> Echo | None:
        """Send a heartbeat and take the one that answers it."""
        request = cluster_pb2.HeartbeatRequest(
            beacon=convert.beacon_to_message(beat), books=life_messages.books_to_message(books)
        )
        try:
            reply = await self._cluster.Heartbeat(
                request, timeout=deadline_s, metadata=self._metadata
            )
            if reply.verdict.outcome != cluster_pb2.DONE:
                return None
            answer = convert.beacon_from_message(reply.beacon) if reply.HasField("beacon") else None
            newer = convert.map_from_message(reply.map) if reply.HasField("map") else None
            theirs = life_messages.books_from_message(reply.books)
            return Echo(answer, reply.map_epoch, newer, theirs)
        except (grpc.RpcError, WireFault):
            return None

    async def hand_on(
        self, cluster_map: ClusterMap, deadline_s: float = HAND_ON_DEADLINE_S
    ) -> ClusterMap | None:
        """Give the other node a map that it has not heard of; the map that it goes by then."""
        request = cluster_pb2.SetMapRequest(map=convert.map_to_message(cluster_map))
        reply = await self._asked(self._cluster.SetMap, request, deadline_s)
        return self._read(lambda answer: convert.map_from_message(answer.map), reply)

    async def bury(self, keys: Keys, delete_id: int, patience_s: float) -> bool:
        """Tell of a delete; whether it is durable there."""
        request = life_pb2.BuryRequest(
            keys=pack(keys, np.uint8), id=delete_id, patience_ms=round(1000 * ONWARD * patience_s)
        )
        reply = await self._asked(self._life.Bury, request, patience_s)
        return reply is not None and bool(reply.durable)

    async def raise_epochs(self, page: EpochPage, patience_s: float) -> bool:
        """Tell of epochs; whether they are durable there, and known to that node's clients."""
        request = life_messages.raise_to_message(page, round(1000 * ONWARD * patience_s))
        reply = await self._asked(self._life.RaiseEpochs, request, patience_s)
        return reply is not None and bool(reply.durable)

    async def burials(self, start: int) -> BurialPage | None:
        """A page of the other node's burials."""
        request = life_pb2.PageRequest(start=start)
        reply = await self._asked(self._life.Burials, request, PAGE_DEADLINE_S)
        return self._read(life_messages.burials_from_message, reply)

    async def epochs(self, start: int) -> EpochPage | None:
        """A page of the epochs that the other node knows."""
        request = life_pb2.PageRequest(start=start)
        reply = await self._asked(self._life.Epochs, request, PAGE_DEADLINE_S)
        return self._read(life_messages.epochs_from_message, reply)

    async def carry(self, request: CarryRequest) -> CarryReply | None:
        """Ask the other node to keep a copy of these cells."""
        message = life_messages.carry_to_message(request)
        reply = await self._asked(self._life.Carry, message, CARRY_DEADLINE_S)
        cells = len(request.cells)
        return self._read(lambda found: life_messages.carried_from_message(found, cells), reply)

    async def close(self) -> None:
        """Hang up."""
        await self._channel.close()

    async def _asked(
        self, method: Callable[..., Awaitable[ReplyType]], request: object, deadline_s: float
    ) -> ReplyType | None:
        """The reply, if there is one and it is what was asked for."""
        try:
            reply = await method(request, timeout=deadline_s, metadata=self._metadata)
        except grpc.RpcError:
            return None
        return reply if reply.verdict.outcome == cluster_pb2.DONE else None

    def _read(self, reader: Callable[[ReplyType], Value], reply: ReplyType | None) -> Value | None:
        try:
            return None if reply is None else reader(reply)
        except WireFault:
            return None
