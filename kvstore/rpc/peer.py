"""One storage node seen from another: announcements, heartbeats, maps; on the event loop.

Every call has a deadline and answers ``None`` when the other node did not answer in a way that
makes sense: there is nothing to do about it but to try again later.
"""

from contextlib import suppress
from dataclasses import dataclass

import grpc

from kvstore.cluster_map import ClusterMap
from kvstore.directory import Announcement, Answer
from kvstore.membership import Heartbeat
from kvstore.rpc import cluster_pb2, convert
from kvstore.rpc.cluster_pb2_grpc import ClusterStub
from kvstore.rpc.directory_pb2_grpc import DirectoryStub
from kvstore.rpc.wire import CHANNEL_OPTIONS, WireFault, bearer

ANNOUNCE_DEADLINE_S = 2.0


@dataclass(frozen=True, slots=True)
class Echo:
    """The answer to a heartbeat; a map only if the other node has a newer one.

    ``beat`` is ``None`` while no map names the other node.
    """

    beat: Heartbeat | None
    map_epoch: int
    map: ClusterMap | None


class Peer:
    """A connection to another node, made when it is first needed."""

    def __init__(self, address: str, token: str | None) -> None:
        self.address = address
        self._metadata = bearer(token)
        self._channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._directory = DirectoryStub(self._channel)
        self._cluster = ClusterStub(self._channel)

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

    async def beat(self, beat: Heartbeat, deadline_s: float) -> Echo | None:
        """Send a heartbeat and take the one that answers it."""
        request = cluster_pb2.HeartbeatRequest(beacon=convert.beacon_to_message(beat))
        try:
            reply = await self._cluster.Heartbeat(
                request, timeout=deadline_s, metadata=self._metadata
            )
            if reply.verdict.outcome != cluster_pb2.DONE:
                return None
            answer = convert.beacon_from_message(reply.beacon) if reply.HasField("beacon") else None
            newer = convert.map_from_message(reply.map) if reply.HasField("map") else None
            return Echo(answer, reply.map_epoch, newer)
        except (grpc.RpcError, WireFault):
            return None

    async def hand_on(self, cluster_map: ClusterMap, deadline_s: float) -> None:
        """Give the other node a map that it has not heard of."""
        request = cluster_pb2.SetMapRequest(map=convert.map_to_message(cluster_map))
        with suppress(grpc.RpcError):
            await self._cluster.SetMap(request, timeout=deadline_s, metadata=self._metadata)

    async def close(self) -> None:
        """Hang up."""
        await self._channel.close()
