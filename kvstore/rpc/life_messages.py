"""Messages of the Life service from and to the values of the tier; see ``kvstore.rpc.convert``."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvstore.burials import PAGE_BURIALS_MAX, BurialDigest, BurialPage
from kvstore.calls import (
    CARRY_CELLS_MAX,
    HOLD_KEYS_MAX,
    CarryReply,
    CarryRequest,
    CopyState,
    HoldMark,
    HoldOutcome,
    HoldReply,
    HoldRequest,
    Inspection,
)
from kvstore.life_access import Granted, Spread
from kvstore.rpc import cache_pb2, cluster_pb2, convert
from kvstore.rpc import life_pb2 as pb
from kvstore.rpc.wire import invalid, known, pack, unpack, unpack_all, unpack_keys
from kvstore.tenants import PAGE_TENANTS_MAX, TENANT_BYTES, EpochDigest, EpochPage

PATIENCE_S_MAX = 60.0


@dataclass(frozen=True, slots=True)
class Books:
    """Digests of what a node was told for good: equal ones have nothing to tell each other."""

    burials: BurialDigest
    epochs: EpochDigest


def books_to_message(books: Books) -> cluster_pb2.Books:
    """For a heartbeat."""
    return cluster_pb2.Books(
        burials=books.burials.burials,
        burials_fold=books.burials.fold,
        tenants=books.epochs.tenants,
        tenants_fold=books.epochs.fold,
    )


def books_from_message(message: cluster_pb2.Books) -> Books:
    """The other way."""
    return Books(
        BurialDigest(message.burials, message.burials_fold),
        EpochDigest(message.tenants, message.tenants_fold),
    )


def burials_to_message(page: BurialPage) -> pb.BurialsReply:
    """Columns as they are."""
    return pb.BurialsReply(
        keys=pack(page.keys, np.uint8),
        ids=pack(page.ids, np.uint64),
        ages_ms=pack(page.ages_ms, np.uint64),
        next=page.next,
    )


def burials_from_message(message: pb.BurialsReply) -> BurialPage:
    """At most a page of them."""
    keys = unpack_keys(message.keys, PAGE_BURIALS_MAX)
    ids = unpack(message.ids, np.uint64, len(keys), "ids")
    ages_ms = unpack(message.ages_ms, np.uint64, len(keys), "ages_ms")
    return BurialPage(keys, ids, ages_ms, message.next)


def epochs_to_message(page: EpochPage) -> pb.EpochsReply:
    """Columns as they are."""
    return pb.EpochsReply(
        tenants=pack(page.tenants, np.uint8), epochs=pack(page.epochs, np.uint64), next=page.next
    )


def epochs_from_message(
    message: pb.EpochsReply | pb.RaiseEpochsRequest | cache_pb2.TenantEpochs,
) -> EpochPage:
    """At most a page of them; only a reply says whether there is another one."""
    epochs = unpack_all(message.epochs, np.uint64, PAGE_TENANTS_MAX, "epochs")
    packed = unpack(message.tenants, np.uint8, len(epochs) * TENANT_BYTES, "tenants")
    following = message.next if isinstance(message, pb.EpochsReply) else 0
    return EpochPage(packed.reshape(-1, TENANT_BYTES), epochs, following)


def told_epochs(page: EpochPage, version: int) -> cache_pb2.TenantEpochs:
    """The page for a session, whose clients repeat the version."""
    return cache_pb2.TenantEpochs(
        tenants=pack(page.tenants, np.uint8), epochs=pack(page.epochs, np.uint64), version=version
    )


def raise_to_message(page: EpochPage, patience_ms: int) -> pb.RaiseEpochsRequest:
    """The page for another node."""
    return pb.RaiseEpochsRequest(
        tenants=pack(page.tenants, np.uint8),
        epochs=pack(page.epochs, np.uint64),
        patience_ms=patience_ms,
    )


def hold_to_message(request: HoldRequest) -> pb.HoldRequest:
    """A promise that is asked for."""
    return pb.HoldRequest(
        tenant=request.tenant,
        handle=request.handle,
        keys=pack(request.keys, np.uint8),
        mask=request.mask,
        ttl_ms=request.ttl_ms,
        replicas=request.replicas,
        tenant_epoch=request.tenant_epoch,
    )


def hold_from_message(message: pb.HoldRequest) -> HoldRequest:
    """The other way."""
    keys = unpack_keys(message.keys, HOLD_KEYS_MAX)
    return HoldRequest(
        tenant_of(message.tenant), message.handle, keys, message.mask, message.ttl_ms,
        message.replicas or 1, message.tenant_epoch,
    )  # fmt: skip


def held_to_message(granted: Granted) -> pb.HoldReply:
    """What became of it."""
    return pb.HoldReply(
        outcome=granted.reply.outcome,
        held_bytes=granted.reply.held_bytes,
        budget_bytes=granted.reply.budget_bytes,
        extended=granted.extended,
    )


def held_from_message(message: pb.HoldReply) -> Granted:
    """The other way; refuses an outcome that we do not know."""
    outcome = known(HoldOutcome, message.outcome, "a hold's outcome")
    reply = HoldReply(outcome, message.held_bytes, message.budget_bytes)
    return Granted(reply, message.extended)


def carry_to_message(request: CarryRequest) -> pb.CarryRequest:
    """Columns as they are."""
    return pb.CarryRequest(
        tenant=request.tenant,
        handle=request.handle,
        origin=request.origin,
        keys=pack(request.keys, np.uint8),
        cells=pack(request.cells, np.uint8),
        sizes_bytes=pack(request.sizes_bytes, np.uint64),
        more_bytes=request.more_bytes,
        ttl_ms=request.ttl_ms,
        granter=request.granter,
        grant=request.grant,
        released=request.released,
        tenant_epoch=request.tenant_epoch,
    )


def carry_from_message(message: pb.CarryRequest) -> CarryRequest:
    """The other way."""
    keys = unpack_keys(message.keys, CARRY_CELLS_MAX)
    return CarryRequest(
        tenant=tenant_of(message.tenant),
        handle=message.handle,
        origin=message.origin,
        keys=keys,
        cells=convert.cells_from_bytes(message.cells, len(keys)),
        sizes_bytes=unpack(message.sizes_bytes, np.uint64, len(keys), "sizes_bytes"),
        more_bytes=message.more_bytes,
        ttl_ms=message.ttl_ms,
        granter=message.granter,
        grant=message.grant,
        released=message.released,
        tenant_epoch=message.tenant_epoch,
    )


def carried_to_message(reply: CarryReply) -> pb.CarryReply:
    """What is there, and what is wanted."""
    return pb.CarryReply(outcome=reply.outcome, wanted=pack(reply.wanted, np.uint8))


def carried_from_message(message: pb.CarryReply, cells: int) -> CarryReply:
    """The reply to a call about so many cells."""
    wanted = unpack(message.wanted, np.uint8, cells, "wanted").astype(np.bool_)
    return CarryReply(known(HoldOutcome, message.outcome, "a hold's outcome"), wanted)


def tenant_of(data: bytes) -> bytes:
    """A tenant's digest as it came; refuses what can be none."""
    if len(data) != TENANT_BYTES:
        raise invalid(f"a tenant has {TENANT_BYTES} bytes, not {len(data)}: take its digest")
    return data


def inspected_to_message(blocks: list[Inspection]) -> pb.InspectReply:
    """Without the keys: the caller has them."""
    return pb.InspectReply(blocks=[_block_to_message(block) for block in blocks])


def _block_to_message(block: Inspection) -> pb.Inspection:
    holds = [
        pb.HoldMark(
            handle=one.handle,
            remaining_ms=one.remaining_ms,
            replicas=one.replicas,
            state=one.state,
        )
        for one in block.holds
    ]
    return pb.Inspection(
        arena_mask=block.arena_mask,
        disk_mask=block.disk_mask,
        size_bytes=block.size_bytes,
        ttl_s=block.ttl_s,
        remaining_ms=block.remaining_ms,
        holds=holds,
        verified_ms_ago=block.verified_ms_ago,
        buried_ms_ago=block.buried_ms_ago,
    )


def inspected_from_message(
    message: pb.InspectReply, keys: npt.NDArray[np.uint8]
) -> list[Inspection]:
    """The reply to a call about these keys."""
    if len(message.blocks) != len(keys):
        raise invalid(f"{len(message.blocks)} blocks were inspected instead of {len(keys)}")
    return [
        Inspection(
            key=key.tobytes(),
            arena_mask=block.arena_mask,
            disk_mask=block.disk_mask,
            size_bytes=block.size_bytes,
            ttl_s=block.ttl_s,
            remaining_ms=block.remaining_ms,
            holds=tuple(map(_mark_from_message, block.holds)),
            verified_ms_ago=block.verified_ms_ago if block.HasField("verified_ms_ago") else None,
            buried_ms_ago=block.buried_ms_ago if block.HasField("buried_ms_ago") else None,
        )
        for key, block in zip(keys, message.blocks, strict=True)
    ]


def _mark_from_message(mark: pb.HoldMark) -> HoldMark:
    state = known(CopyState, mark.state, "the state of a hold's copies")
    return HoldMark(mark.handle, mark.remaining_ms, mark.replicas or 1, state)


def deleted_to_message(spread: Spread) -> pb.DeleteReply:
    """How far a delete has come."""
    return pb.DeleteReply(
        id=spread.number,
        durable=spread.durable,
        pending=convert.nodes_to_bytes(spread.pending),
    )


def erased_to_message(spread: Spread) -> pb.EraseReply:
    """How far an erasure has come."""
    return pb.EraseReply(
        epoch=spread.number,
        durable=spread.durable,
        pending=convert.nodes_to_bytes(spread.pending),
    )


def spread_from_message(message: pb.DeleteReply | pb.EraseReply) -> Spread:
    """The other way."""
    number = message.id if isinstance(message, pb.DeleteReply) else message.epoch
    pending = convert.nodes_from_bytes(message.pending)
    return Spread(number, message.durable, pending)


def patience_s(patience_ms: int) -> float:
    """How long an answer may wait."""
    return min(patience_ms / 1000, PATIENCE_S_MAX)
