"""The Cluster service: the map, and heartbeats between nodes.

Does not cover: what follows from a map or a heartbeat; that is the ``Follower``'s business.
"""

from typing import Protocol

import grpc

from kvstore.cluster_map import ClusterMap
from kvstore.membership import Heartbeat
from kvstore.rpc import cluster_pb2 as pb
from kvstore.rpc import convert, life_messages
from kvstore.rpc.answering import answering
from kvstore.rpc.bulletin import Bulletin
from kvstore.rpc.cluster_pb2_grpc import ClusterServicer
from kvstore.rpc.life_messages import Books


class Follower(Protocol):
    """Who acts on maps and heartbeats."""

    def follow(self, cluster_map: ClusterMap) -> None:
        """Take a newer map; an older one, or the same, changes nothing."""
        ...

    @property
    def books(self) -> Books:
        """Digests of what this node was told for good."""
        ...

    def received(self, beat: Heartbeat, books: Books) -> Heartbeat | None:
        """Take a heartbeat and answer with one; ``None`` while this node is in no map."""
        ...


class ClusterService(ClusterServicer):
    """One node's part in the cluster. Called on the event loop's thread only."""

    def __init__(self, follower: Follower, bulletin: Bulletin) -> None:
        self._follower = follower
        self._bulletin = bulletin

    @answering(pb.MapReply)
    def GetMap(self, request: pb.GetMapRequest) -> pb.MapReply:
        return self._map_reply()

    @answering(pb.MapReply)
    def SetMap(self, request: pb.SetMapRequest) -> pb.MapReply:
        self._follower.follow(convert.map_from_message(request.map))
        return self._map_reply()

    @answering(pb.HeartbeatReply)
    def Heartbeat(self, request: pb.HeartbeatRequest) -> pb.HeartbeatReply:
        beat = convert.beacon_from_message(request.beacon)
        answer = self._follower.received(beat, life_messages.books_from_message(request.books))
        ours = self._bulletin.now.map
        books = life_messages.books_to_message(self._follower.books)
        reply = pb.HeartbeatReply(map_epoch=ours.epoch, books=books)
        if answer is not None:
            reply.beacon.CopyFrom(convert.beacon_to_message(answer))
        if beat.map_epoch < ours.epoch:
            reply.map.CopyFrom(convert.map_to_message(ours))
        return reply

    async def WatchMap(
        self,
        request: pb.GetMapRequest,
        context: grpc.aio.ServicerContext[pb.GetMapRequest, pb.MapReply],
    ) -> None:
        """The map now, and every newer one until the caller hangs up."""
        told = -1
        async for notice in self._bulletin.notices():
            if notice.map.epoch > told:
                told = notice.map.epoch
                reply = self._map_reply()
                reply.verdict.outcome = pb.DONE
                await context.write(reply)

    def _map_reply(self) -> pb.MapReply:
        return pb.MapReply(map=convert.map_to_message(self._bulletin.now.map))
