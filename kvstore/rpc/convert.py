"""Messages of the wire from and to the values of the tier.

One pair of functions per value. What comes from outside is checked for its form here (lengths,
limits, ranges of numbers); what it means is checked by whoever acts on it. Breaches raise
``WireFault``. Does not cover: packing itself (``kvstore.rpc.wire``).
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields

import numpy as np

from kvstore.block import FORMAT_VERSION
from kvstore.calls import (
    MAX_CELLS_PER_CALL,
    AcquireReply,
    Damage,
    NodeIdentity,
    NodeStats,
    ReserveReply,
    ReserveRequest,
)
from kvstore.cell import CELLS_MAX, LAYERS_MAX
from kvstore.changes import Changes, Digest
from kvstore.cluster_map import NODES_MAX, ClusterMap, NodeInfo
from kvstore.directory import ANNOUNCEMENT_CHANGES_MAX, Announcement, Answer, Reception
from kvstore.errors import UsageError
from kvstore.holders import Located
from kvstore.key import KEY_BYTES
from kvstore.membership import Heartbeat
from kvstore.rpc import cache_pb2, cluster_pb2, directory_pb2
from kvstore.rpc.wire import (
    WIRE_VERSION,
    invalid,
    known,
    pack,
    unpack,
    unpack_all,
    unpack_keys,
)
from kvstore.table import Cells
from kvstore.tiers.nvme.spill import NvmeStats
from kvstore.tiers.stats import HostStats


@dataclass(frozen=True, slots=True)
class Hello:
    """What a node says of itself when a client first calls."""

    identity: NodeIdentity
    capacity_bytes: int
    bulk: str
    map: ClusterMap
    has_disk: bool = False


def hello_to_message(hello: Hello) -> cache_pb2.HelloReply:
    """With the versions of this build."""
    return cache_pb2.HelloReply(
        wire_version=WIRE_VERSION,
        format_version=FORMAT_VERSION,
        node_id=hello.identity.node_id,
        host_id=hello.identity.host_id,
        incarnation=hello.identity.incarnation,
        arena_folder=hello.identity.arena_folder,
        capacity_bytes=hello.capacity_bytes,
        bulk=hello.bulk,
        map=map_to_message(hello.map),
        has_disk=hello.has_disk,
    )


def hello_from_message(reply: cache_pb2.HelloReply) -> Hello:
    """The versions must have been compared before."""
    identity = NodeIdentity(
        node_id=reply.node_id,
        incarnation=reply.incarnation,
        host_id=reply.host_id,
        arena_folder=reply.arena_folder,
    )
    cluster_map = map_from_message(reply.map)
    return Hello(identity, reply.capacity_bytes, reply.bulk, cluster_map, reply.has_disk)


def map_to_message(cluster_map: ClusterMap) -> cluster_pb2.ClusterMap:
    """A few dozen nodes: the one place where objects cross the wire."""
    nodes = [
        cluster_pb2.NodeInfo(
            index=node.index,
            node_id=node.node_id,
            host_id=node.host_id,
            incarnation=node.incarnation,
            control=node.control,
            bulk=node.bulk,
            arena_folder=node.arena_folder,
        )
        for node in cluster_map.nodes
    ]
    return cluster_pb2.ClusterMap(
        epoch=cluster_map.epoch,
        nodes=nodes,
        block_tokens=cluster_map.block_tokens,
        tier_id=cluster_map.tier_id,
    )


def map_from_message(message: cluster_pb2.ClusterMap) -> ClusterMap:
    """Refuses what no map can be."""
    try:
        nodes = tuple(_node_from_message(node) for node in message.nodes)
        return ClusterMap(message.epoch, nodes, message.block_tokens, message.tier_id)
    except UsageError as fault:
        raise invalid(str(fault)) from None


def _node_from_message(message: cluster_pb2.NodeInfo) -> NodeInfo:
    return NodeInfo(
        index=message.index,
        node_id=message.node_id,
        host_id=message.host_id,
        incarnation=message.incarnation,
        control=message.control,
        bulk=message.bulk,
        arena_folder=message.arena_folder,
    )


def nodes_to_bytes(nodes: Iterable[int]) -> bytes:
    """Indexes in the map, sorted."""
    return pack(sorted(nodes), np.uint16)


def nodes_from_bytes(data: bytes) -> frozenset[int]:
    """The other way."""
    return frozenset(unpack_all(data, np.uint16, NODES_MAX, "nodes").tolist())


def reserve_to_message(request: ReserveRequest, incarnation: int) -> cache_pb2.ReserveRequest:
    """For the node of this incarnation."""
    return cache_pb2.ReserveRequest(
        incarnation=incarnation,
        session=request.session,
        operation=request.operation,
        ttl_s=request.ttl_s,
        keys=pack(request.keys, np.uint8),
        cells=pack(request.cells, np.uint8),
        lengths=pack(request.lengths, np.uint32),
        depths=pack(request.depths, np.uint32),
        tokens=pack(request.tokens, np.uint32),
        spans=pack(request.spans, np.uint64),
        burials=b"" if request.burials is None else pack(request.burials, np.uint64),
    )


def reserve_from_message(message: cache_pb2.ReserveRequest) -> ReserveRequest:
    """At most ``MAX_CELLS_PER_CALL`` rows, all columns alike."""
    keys = unpack_keys(message.keys, MAX_CELLS_PER_CALL)
    count = len(keys)
    return ReserveRequest(
        session=message.session,
        operation=message.operation,
        keys=keys,
        cells=cells_from_bytes(message.cells, count),
        lengths=unpack(message.lengths, np.uint32, count, "lengths"),
        tokens=unpack(message.tokens, np.uint32, count, "tokens"),
        depths=unpack(message.depths, np.uint32, count, "depths"),
        spans=unpack(message.spans, np.uint64, count, "spans"),
        ttl_s=message.ttl_s if message.HasField("ttl_s") else None,
        burials=unpack(message.burials, np.uint64, count, "burials") if message.burials else None,
    )


def cells_from_bytes(data: bytes, count: int) -> Cells:
    """Cell numbers; refuses what no grid has."""
    cells = unpack(data, np.uint8, count, "cells")
    if count and int(cells.max()) >= CELLS_MAX:
        raise invalid(f"cell {int(cells.max())} is outside any grid of {CELLS_MAX} cells")
    return cells


def reserved_to_message(reply: ReserveReply) -> cache_pb2.ReserveReply:
    """Columns as they are."""
    return cache_pb2.ReserveReply(
        outcomes=pack(reply.outcomes, np.uint8),
        refusals=pack(reply.refusals, np.uint8),
        slots=pack(reply.slots, np.uint32),
        generations=pack(reply.generations, np.uint64),
        offsets=pack(reply.offsets, np.uint64),
    )


def reserved_from_message(message: cache_pb2.ReserveReply, count: int) -> ReserveReply:
    """The reply to a call of ``count`` cells."""
    return ReserveReply(
        outcomes=unpack(message.outcomes, np.uint8, count, "outcomes"),
        refusals=unpack(message.refusals, np.uint8, count, "refusals"),
        slots=unpack(message.slots, np.uint32, count, "slots"),
        generations=unpack(message.generations, np.uint64, count, "generations"),
        offsets=unpack(message.offsets, np.uint64, count, "offsets"),
    )


def acquired_to_message(reply: AcquireReply) -> cache_pb2.AcquireReply:
    """Columns as they are."""
    return cache_pb2.AcquireReply(
        lease=reply.lease,
        outcomes=pack(reply.outcomes, np.uint8),
        slots=pack(reply.slots, np.uint32),
        generations=pack(reply.generations, np.uint64),
        offsets=pack(reply.offsets, np.uint64),
        lengths=pack(reply.lengths, np.uint32),
        header_digests=pack(reply.header_digests, np.uint64),
        loaded=pack(reply.loaded, np.uint8),
    )


def acquired_from_message(message: cache_pb2.AcquireReply, count: int) -> AcquireReply:
    """The reply to a call of ``count`` cells."""
    return AcquireReply(
        lease=message.lease,
        outcomes=unpack(message.outcomes, np.uint8, count, "outcomes"),
        slots=unpack(message.slots, np.uint32, count, "slots"),
        generations=unpack(message.generations, np.uint64, count, "generations"),
        offsets=unpack(message.offsets, np.uint64, count, "offsets"),
        lengths=unpack(message.lengths, np.uint32, count, "lengths"),
        header_digests=unpack(message.header_digests, np.uint64, count, "header_digests"),
        loaded=unpack(message.loaded, np.uint8, count, "loaded").astype(np.bool_),
    )


def damage_to_message(damage: Damage) -> cache_pb2.Damage:
    """A reader's complaint about one cell."""
    return cache_pb2.Damage(
        key=damage.key,
        cell=damage.cell,
        leaf_bytes=pack(damage.leaf_bytes, np.uint32),
    )


def damage_from_message(message: cache_pb2.Damage) -> Damage:
    """The other way."""
    if len(message.key) != KEY_BYTES or message.cell >= CELLS_MAX:
        raise invalid("a damaged cell needs a whole key and the number of a cell")
    sizes = unpack_all(message.leaf_bytes, np.uint32, LAYERS_MAX, "leaf_bytes")
    return Damage(message.key, message.cell, tuple(sizes.tolist()))


def stats_to_message(stats: NodeStats) -> cache_pb2.StatsReply:
    """Every counter by its name; those of the host tier have theirs, too."""
    counters = asdict(stats)
    counters |= counters.pop("host")
    counters |= {f"nvme_{name}": value for name, value in counters.pop("nvme").items()}
    counters["is_sealed"] = int(stats.is_sealed)
    return cache_pb2.StatsReply(counters=counters)


def stats_from_message(message: cache_pb2.StatsReply) -> NodeStats:
    """A counter that the other side does not have yet is 0; one that we don't know is dropped."""
    counters = message.counters
    host = HostStats(**{field.name: counters.get(field.name, 0) for field in fields(HostStats)})
    nvme = NvmeStats(
        **{field.name: counters.get(f"nvme_{field.name}", 0) for field in fields(NvmeStats)}
    )
    own = {
        field.name: counters.get(field.name, 0)
        for field in fields(NodeStats)
        if field.name not in ("host", "nvme", "is_sealed")
    }
    sealed = bool(counters.get("is_sealed", 0))
    return NodeStats(host=host, nvme=nvme, is_sealed=sealed, **own)


def announcement_from_message(message: directory_pb2.AnnounceRequest) -> Announcement:
    """An announcement with its changes."""
    keys = unpack_keys(message.keys, ANNOUNCEMENT_CHANGES_MAX)
    count = len(keys)
    changes = Changes(
        keys=keys,
        cells=cells_from_bytes(message.cells, count),
        spans=unpack(message.spans, np.uint64, count, "spans"),
        added=unpack(message.added, np.uint8, count, "added").astype(np.bool_),
    )
    return Announcement(
        message.node, message.incarnation, message.stream, message.sequence, changes
    )


def announcement_to_message(
    announcement: Announcement, map_epoch: int
) -> directory_pb2.AnnounceRequest:
    """The other way."""
    changes = announcement.changes
    return directory_pb2.AnnounceRequest(
        map_epoch=map_epoch,
        node=announcement.node,
        incarnation=announcement.incarnation,
        stream=announcement.stream,
        sequence=announcement.sequence,
        keys=pack(changes.keys, np.uint8),
        cells=pack(changes.cells, np.uint8),
        spans=pack(changes.spans, np.uint64),
        added=pack(changes.added, np.uint8),
    )


def answer_to_message(answer: Answer) -> directory_pb2.AnnounceReply:
    """A home's answer to an announcement."""
    return directory_pb2.AnnounceReply(
        reception=answer.reception,
        incarnation=answer.incarnation,
        stream=answer.stream,
        expected=answer.expected,
        held_cells=answer.digest.cells,
        fold=answer.digest.fold,
    )


def answer_from_message(message: directory_pb2.AnnounceReply) -> Answer:
    """The other way; refuses a reception that we do not know."""
    return Answer(
        reception=known(Reception, message.reception, "reception"),
        incarnation=message.incarnation,
        stream=message.stream,
        expected=message.expected,
        digest=Digest(message.held_cells, message.fold),
    )


def located_to_message(located: Located) -> directory_pb2.LocateReply:
    """Columns as they are."""
    return directory_pb2.LocateReply(
        counts=pack(located.counts, np.uint16),
        nodes=pack(located.nodes, np.uint16),
        masks=pack(located.masks, np.uint64),
    )


def located_from_message(message: directory_pb2.LocateReply, count: int) -> Located:
    """The reply to a call of ``count`` keys."""
    counts = unpack(message.counts, np.uint16, count, "counts")
    total = int(counts.sum())
    return Located(
        counts,
        unpack(message.nodes, np.uint16, total, "nodes"),
        unpack(message.masks, np.uint64, total, "masks"),
    )


def beacon_to_message(beat: Heartbeat) -> cluster_pb2.Beacon:
    """A heartbeat, or the answer to one."""
    return cluster_pb2.Beacon(
        node=beat.sender,
        incarnation=beat.incarnation,
        map_epoch=beat.map_epoch,
        suspects=pack([index for index, _ in beat.suspects], np.uint16),
        suspect_incarnations=pack([life for _, life in beat.suspects], np.uint64),
    )


def beacon_from_message(message: cluster_pb2.Beacon) -> Heartbeat:
    """The other way."""
    suspects = unpack_all(message.suspects, np.uint16, NODES_MAX, "suspects")
    lives = unpack(message.suspect_incarnations, np.uint64, len(suspects), "suspect_incarnations")
    named = tuple(zip(suspects.tolist(), lives.tolist(), strict=True))
    return Heartbeat(message.node, message.incarnation, message.map_epoch, named)
