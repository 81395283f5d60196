"""Keeping: what is asked of a tier about blocks that are there: delete, promise, erase, inspect.

    delete, erase    the own node, which tells all others
    hold             every node that has part of the prefix; one declines: all others let go again
    release, inspect every node of the map

Calls of an operator or a gateway, not of an engine: where the own node is gone they raise
``UnavailableError``. Does not cover: what the nodes do about it (``kvstore.life``).
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvstore.answers import Deleted, Erased, Held, Inspected, Released
from kvstore.calls import (
    DELETE_KEYS_MAX,
    HOLD_KEYS_MAX,
    INSPECT_KEYS_MAX,
    HoldOutcome,
    HoldRequest,
    Inspection,
)
from kvstore.errors import UnavailableError
from kvstore.key import Chain, Keys
from kvstore.plan import OWN_NODE, Plan
from kvstore.routes import Routes
from kvstore.tenants import tenant_digest

Masks = dict[int, npt.NDArray[np.uint64]]
"""By node: the cells that it is asked for, of each of some blocks."""


@dataclass(frozen=True, slots=True)
class Promise:
    """What is asked of every node that has part of it."""

    tenant: bytes
    handle: str
    ttl_ms: int
    replicas: int
    tenant_epoch: int


def keys_behind(chain: Chain, start: int) -> Keys:
    """Those of a put: full blocks that end behind ``start``, and all tails."""
    tails = np.frombuffer(b"".join(chain.tails.values()), np.uint8)
    full = chain.keys[start // chain.block_tokens :]
    return np.concatenate([full, tails.reshape(-1, full.shape[1])])


def delete(keys: Keys, routes: Routes) -> Deleted:
    """Delete blocks everywhere."""
    life = routes.access(OWN_NODE).life
    pending: set[str] = set()
    for part in _parts(keys, DELETE_KEYS_MAX):
        spread = life.delete(part)
        pending |= _names(spread.pending, spread.durable, routes)
    return Deleted(len(keys), tuple(sorted(pending)))


def erase(tenant: str, routes: Routes) -> Erased:
    """Begin a tenant's next epoch everywhere."""
    spread = routes.access(OWN_NODE).life.erase(tenant_digest(tenant))
    return Erased(spread.number, tuple(sorted(_names(spread.pending, spread.durable, routes))))


def hold(plan: Plan, handle: str, ttl_ms: int, replicas: int, routes: Routes) -> Held:
    """Have a prefix kept by all nodes that have part of it, or by none."""
    if not plan.blocks:
        return Held(HoldOutcome.NOT_HELD)
    namespace = plan.namespace
    tenant = tenant_digest(namespace.tenant)
    promise = Promise(tenant, handle, ttl_ms, replicas, namespace.tenant_epoch)
    bits = np.array([1 << cell.index for cell in plan.cells], np.uint64)
    masks: Masks = {}
    for node in np.unique(plan.nodes).tolist():
        mine = np.where(plan.nodes == node, bits, np.uint64(0))
        name = OWN_NODE if routes.is_own(node) else node
        mask = np.bitwise_or.reduce(mine, axis=1)
        masks[name] = masks[name] | mask if name in masks else mask
    declined = _promise(promise, plan.keys, masks, routes)
    return declined or Held(HoldOutcome.GRANTED, _size_bytes(plan), int(plan.stops[-1]))


def hold_keys(
    keys: Keys, tenant: str, handle: str, ttl_ms: int, replicas: int, routes: Routes
) -> Held:
    """Have blocks kept wherever they are, each cell of them once, besides its copies."""
    digest = tenant_digest(tenant)
    promise = Promise(digest, handle, ttl_ms, replicas, routes.epoch_of(digest))
    left = np.zeros(len(keys), np.uint64)
    names = dict(routes.nodes)  # a newer map may come meanwhile
    found = inspect(keys, routes).nodes
    there = {
        node: np.array([block.arena_mask | block.disk_mask for block in found[name]], np.uint64)
        for node, name in names.items()
        if name in found
    }
    for mask in there.values():
        left |= mask
    if not left.all():
        return Held(HoldOutcome.NOT_HELD)
    masks: Masks = {}
    # Those that have most of it first: fewest nodes.
    for node in sorted(there, key=lambda node: -int(np.bitwise_count(there[node]).sum())):
        masks[node] = there[node] & left
        left &= ~there[node]
    declined = _promise(promise, keys, masks, routes)
    if declined is not None:
        return declined
    shares = [
        _share_bytes(block, int(mask))
        for node, wanted in masks.items()
        for block, mask in zip(found[names[node]], wanted, strict=True)
    ]
    return Held(HoldOutcome.GRANTED, sum(shares))


def release(handle: str, tenant: str, routes: Routes) -> Released:
    """End a promise everywhere."""
    digest = tenant_digest(tenant)
    found, silent = False, []
    for node, name in routes.nodes.items():
        try:
            found |= routes.access(node).life.release_hold(digest, handle)
        except UnavailableError:
            silent.append(name)
    return Released(found, tuple(silent))


def inspect(keys: Keys, routes: Routes) -> Inspected:
    """Ask every node what it knows of blocks."""
    answers: dict[str, tuple[Inspection, ...]] = {}
    silent = []
    for node, name in routes.nodes.items():
        found: list[Inspection] = []
        try:
            for part in _parts(keys, INSPECT_KEYS_MAX):
                found += routes.access(node).life.inspect(part)
        except UnavailableError:
            silent.append(name)
        else:
            answers[name] = tuple(found)
    return Inspected(answers, tuple(silent))


def _promise(promise: Promise, keys: Keys, masks: Masks, routes: Routes) -> Held | None:
    """Ask for it node by node; who declined, if one did: then the others have let go again."""
    fresh: list[int] = []
    for node, mask, part in _shares(keys, masks):
        request = HoldRequest(
            promise.tenant, promise.handle, part, mask, promise.ttl_ms, promise.replicas,
            promise.tenant_epoch,
        )  # fmt: skip
        outcome, extended = HoldOutcome.FAILED, False  # it may have granted all the same
        with suppress(UnavailableError):
            granted = routes.access(node).life.hold(request)
            outcome, extended = granted.reply.outcome, granted.extended
        if not extended:
            fresh.append(node)
        if outcome is not HoldOutcome.GRANTED:
            # A promise that was there before is kept, whatever became of its extension.
            for holder in fresh:
                with suppress(UnavailableError):  # then it ends by itself
                    routes.access(holder).life.release_hold(promise.tenant, promise.handle)
            return Held(outcome, node=_name(node, routes))
    return None


def _shares(keys: Keys, masks: Masks) -> Iterator[tuple[int, int, Keys]]:
    """Who is asked to keep what: a node, a mask of cells, the blocks that it keeps these of."""
    for node, wanted in masks.items():
        for mask in np.unique(wanted[wanted > 0]).tolist():
            for part in _parts(keys[wanted == mask], HOLD_KEYS_MAX):
                yield node, mask, part


def _share_bytes(block: Inspection, mask: int) -> int:
    """What the cells of ``mask`` have of a block's bytes, which are counted once for each tier."""
    counted = block.arena_mask.bit_count() + block.disk_mask.bit_count()
    return block.size_bytes * mask.bit_count() // max(1, counted)


def _size_bytes(plan: Plan) -> int:
    grid = plan.namespace.grid
    tokens = [int(stop) - plan.start(row) for row, stop in enumerate(plan.stops)]
    return sum(grid.cell_bytes(cell.index, each) for each in tokens for cell in plan.cells)


def _names(pending: frozenset[int], own_is_done: bool, routes: Routes) -> set[str]:
    names = {_name(node, routes) for node in pending}
    return names if own_is_done else names | {_name(OWN_NODE, routes)}


def _name(node: int, routes: Routes) -> str:
    if node == OWN_NODE:
        return routes.access(OWN_NODE).identity.node_id
    return routes.nodes.get(node, f"node {node}")


def _parts(keys: Keys, size: int) -> list[Keys]:
    return [keys[at : at + size] for at in range(0, len(keys), size)]
