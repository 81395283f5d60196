"""The Directory service: one home's shard, served to nodes and to inference workers.

Covers: the comparison of maps. Does not cover: what the shard remembers (``kvstore.directory``).
"""

from kvstore.calls import MAX_CELLS_PER_CALL
from kvstore.directory import LOCATE_KEYS_MAX, Directory
from kvstore.rpc import convert
from kvstore.rpc import directory_pb2 as pb
from kvstore.rpc.answering import answering
from kvstore.rpc.bulletin import Bulletin
from kvstore.rpc.cluster_pb2 import WRONG_EPOCH
from kvstore.rpc.directory_pb2_grpc import DirectoryServicer
from kvstore.rpc.wire import WireFault, unpack_keys


class DirectoryService(DirectoryServicer):
    """One shard. Called on the event loop's thread only."""

    def __init__(self, directory: Directory, bulletin: Bulletin) -> None:
        self._directory = directory
        self._bulletin = bulletin

    @answering(pb.AnnounceReply)
    def Announce(self, request: pb.AnnounceRequest) -> pb.AnnounceReply:
        self._check_epoch(request.map_epoch)
        announcement = convert.announcement_from_message(request)
        return convert.answer_to_message(self._directory.apply(announcement))

    @answering(pb.LocateReply)
    def Locate(self, request: pb.LocateRequest) -> pb.LocateReply:
        self._check_epoch(request.map_epoch)
        keys = unpack_keys(request.keys, LOCATE_KEYS_MAX)
        return convert.located_to_message(self._directory.locate(keys))

    @answering(pb.RefuteReply)
    def Refute(self, request: pb.RefuteRequest) -> pb.RefuteReply:
        self._check_epoch(request.map_epoch)
        keys = unpack_keys(request.keys, MAX_CELLS_PER_CALL)
        cells = convert.cells_from_bytes(request.cells, len(keys))
        node = self._bulletin.now.map.by_index(request.node)
        if node is not None and node.incarnation == request.incarnation:
            self._directory.remove(request.node, keys, cells)
        return pb.RefuteReply()

    def _check_epoch(self, epoch: int) -> None:
        ours = self._bulletin.now.map
        if epoch != ours.epoch:
            raise WireFault(
                WRONG_EPOCH,
                f"this node goes by map {ours.epoch}, not {epoch}",
                convert.map_to_message(ours),
            )
