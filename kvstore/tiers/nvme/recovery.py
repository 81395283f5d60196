"""Recovery: what a start makes of the slab and the catalog that it finds.

    slab        catalog            what happens
    none        any                a new slab, an empty catalog
    whole       whole              the catalog's records are held
    whole       damaged, missing   held is what the slots say themselves, newest write first
    page 0 bad  whole              page 0 is written anew from the catalog
    page 0 bad  damaged, missing   a new slab, an empty catalog
    another version's or node's, or not of one another: refused, nothing is changed

What is held goes into a new catalog at every start: a damaged page that reading did not come to
would stop a later commit. A slab that was truncated is made whole again; what lay beyond its end
is gone. Then the *sweep* wipes every slot that describes itself and is not held: what an end
without warning left, and what was evicted at the time. So a delete need only wipe what is held,
and no later loss of the catalog brings anything back that was deleted. Tombstones are lost with
the catalog; ``note`` says so.

Does not cover: expiry (``tier``), reading a catalog that may kill its reader (``walk``).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kvstore.errors import StateError
from kvstore.tiers.nvme.catalog import NOTHING, Catalog, CatalogDamage, Change, Content
from kvstore.tiers.nvme.disk import Disk, aligned_bytes
from kvstore.tiers.nvme.extents import Extents
from kvstore.tiers.nvme.identity import IDENTITY_BYTES, Identity, check_node, parse_identity
from kvstore.tiers.nvme.record import (
    PAGE_BYTES,
    RECORD,
    TOMBSTONE,
    Records,
    Tombstones,
    name_of,
    slot_bytes_of,
    slot_bytes_of_all,
    stored_bytes_of,
)
from kvstore.tiers.nvme.slab import Slab, read_whole


class CatalogPlace(Protocol):
    """Where the catalog is kept."""

    def read(self) -> Content | None:
        """All of it, ``None`` if there is none; raises ``CatalogDamage``."""
        ...

    def discard(self) -> None:
        """Remove it."""
        ...

    def open(self, identity: Identity, change: Change) -> Catalog:
        """Make it anew for writing: ``identity`` and what ``change`` puts, and nothing else.

        All of it or none: a catalog that says whose it is must not be taken for whole before its
        rows are there.
        """
        ...


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the configuration asks for; ``entropy`` gives the id of a new slab."""

    node_id: str
    extent_bytes: int
    extents: int
    cells_max: int
    entropy: Callable[[int], bytes]


@dataclass(frozen=True, slots=True)
class Recovered:
    """A slab and its catalog, in order, and what they hold. ``note`` is for the log, or empty."""

    slab: Slab
    catalog: Catalog
    records: Records
    tombstones: Tombstones
    note: str


def recover(disk: Disk, place: CatalogPlace, wanted: Wanted) -> Recovered:
    """Put slab and catalog in order.

    Raises ``StateError`` for what is not ours, before anything is changed, and ``OSError`` where
    the disk refuses.
    """
    first_page = _identity_on(disk)
    on_slab = None if isinstance(first_page, OSError) else first_page
    try:
        content, damage = place.read(), "there is no catalog"
    except CatalogDamage as fault:
        content, damage = None, str(fault)
    in_catalog = parse_identity(content.identity, "the NVMe catalog") if content else None
    for found, what in ((on_slab, "the NVMe slab"), (in_catalog, "the NVMe catalog")):
        if found is not None:
            check_node(found, wanted.node_id, what)
    if on_slab and in_catalog and on_slab.slab_id != in_catalog.slab_id:
        raise StateError(
            f"the NVMe catalog is of slab {in_catalog.slab_id.hex()}, the slab beside it is "
            f"{on_slab.slab_id.hex()}: remove the one that does not belong here"
        )
    identity = on_slab or (in_catalog if disk.size_bytes() else None)
    if identity is None and isinstance(first_page, OSError):
        raise first_page  # the next time it may be readable, and say what all these bytes are
    if identity is None:
        return _start_empty(disk, place, wanted)
    if content is None or in_catalog is None:
        return _rebuild(disk, place, _resized(identity, wanted), wanted.cells_max, damage)
    return _go_on(disk, place, _resized(identity, wanted), wanted.cells_max, content)


def _identity_on(disk: Disk) -> Identity | OSError | None:
    """What the first page says, if anything, or why it can't be read."""
    page = aligned_bytes(PAGE_BYTES)
    if disk.size_bytes() < PAGE_BYTES:
        return None
    try:
        read_whole(disk, [page], 0)
    except OSError as fault:
        return fault
    return parse_identity(page[:IDENTITY_BYTES].tobytes(), "the NVMe slab")


def _resized(identity: Identity, wanted: Wanted) -> Identity:
    """The same slab with as many of its extents as the configured capacity has room for."""
    extents = max(1, wanted.extents * wanted.extent_bytes // identity.extent_bytes)
    return Identity(identity.slab_id, identity.node_id, identity.extent_bytes, extents)


def _start_empty(disk: Disk, place: CatalogPlace, wanted: Wanted) -> Recovered:
    slab_id = wanted.entropy(16)
    slab = Slab(disk, Identity(slab_id, wanted.node_id, wanted.extent_bytes, wanted.extents))
    note = "the NVMe slab's first page is damaged, and no catalog says what it was: starting empty"
    was_there = disk.size_bytes() > 0
    place.discard()
    disk.allocate(slab.identity.slab_bytes)
    slab.write_identity()
    nothing = np.empty(0, RECORD)
    catalog = place.open(slab.identity, NOTHING)
    return Recovered(slab, catalog, nothing, np.empty(0, TOMBSTONE), note if was_there else "")


def _rebuild(
    disk: Disk, place: CatalogPlace, identity: Identity, cells_max: int, damage: str
) -> Recovered:
    slab = Slab(disk, identity)
    _make_whole(slab)
    records = _newest(_scan(slab), slab)
    extents = Extents(identity)
    records = records[_latest_used(records, cells_max)]
    records = records[_take(extents, records)]
    # A predecessor that was killed may have written some of them and not made durable.
    slab.disk.sync()
    place.discard()
    catalog = place.open(identity, Change(puts=list(records)))
    _sweep(slab, extents)
    note = (
        f"the NVMe catalog is lost ({damage}): {len(records)} cells are held that the slab itself "
        "describes, tombstones are gone"
    )
    return Recovered(slab, catalog, records, np.empty(0, TOMBSTONE), note)


def _go_on(
    disk: Disk, place: CatalogPlace, identity: Identity, cells_max: int, content: Content
) -> Recovered:
    slab = Slab(disk, identity)
    extents = Extents(identity)
    slots = slot_bytes_of_all(content.records["length"]).astype(np.uint64)
    kept = content.records["offset"] + slots <= np.uint64(disk.size_bytes())
    kept &= _outlive(content.records, content.tombstones)
    kept[kept] = _latest_used(content.records[kept], cells_max)
    kept[kept] = _take(extents, content.records[kept])
    records, dropped = content.records[kept], content.records[~kept]
    catalog = place.open(
        identity,
        Change(puts=list(records), removals=list(dropped), tombstones=list(content.tombstones)),
    )
    note = ""
    if len(dropped):
        note = f"{len(dropped)} cells are dropped: deleted, or the slab or its index is smaller now"
    _make_whole(slab)
    _sweep(slab, extents)
    return Recovered(slab, catalog, records, content.tombstones, note)


def _make_whole(slab: Slab) -> None:
    """Give the file its length and its first page."""
    if slab.disk.size_bytes() != slab.identity.slab_bytes:
        slab.disk.allocate(slab.identity.slab_bytes)
    if _identity_on(slab.disk) != slab.identity:
        slab.write_identity()


def _outlive(records: Records, tombstones: Tombstones) -> npt.NDArray[np.bool_]:
    """Which records are younger than the tombstones of their keys."""
    buried = {t["key"].tobytes(): int(t["sequence"]) for t in tombstones}
    kept = np.ones(len(records), np.bool_)
    if buried:
        for at, record in enumerate(records):
            kept[at] = int(record["sequence"]) > buried.get(record["key"].tobytes(), -1)
    return kept


def _latest_used(records: Records, cells_max: int) -> npt.NDArray[np.bool_]:
    """Which records there is room for in memory."""
    latest = np.zeros(len(records), np.bool_)
    latest[np.argsort(records["stamp"])[max(0, len(records) - cells_max) :]] = True
    return latest


def _take(extents: Extents, records: Records) -> npt.NDArray[np.bool_]:
    """Which records have slots of their own, which are taken then."""
    return extents.take_all(records["offset"], slot_bytes_of_all(records["length"]))


def _sweep(slab: Slab, extents: Extents) -> None:
    """Wipe every slot that is free and describes a cell, and every page of a free extent."""
    stale = [
        slab.identity.extent_start(extent)
        for extent in extents.free_extents()
        if slab.read_extent(extent) is not None
    ]
    stale += [offset for offset in extents.free_slots() if slab.record_at(offset) is not None]
    for offset in stale:
        slab.wipe(offset)
    if stale:
        slab.disk.sync()


def _scan(slab: Slab) -> Records:
    """Every record that a slot describes, extent by extent."""
    found = []
    for extent in range(slab.identity.extents):
        cut = slab.read_extent(extent)
        if cut is None:
            continue
        slot_bytes, since = cut
        for offset in slab.identity.slots_of(extent, slot_bytes):
            record = slab.record_at(offset)
            if record is None or int(record["sequence"]) < since:
                continue
            if slot_bytes_of(int(record["length"])) == slot_bytes:
                found.append(record.tobytes())
    return np.frombuffer(b"".join(found), RECORD)


def _newest(records: Records, slab: Slab) -> Records:
    """Of several writes of one cell the last that came to its end."""
    ordered = records[np.argsort(records["sequence"])[::-1]]
    writes: dict[tuple[bytes, int], list[int]] = {}
    for at, record in enumerate(ordered):
        writes.setdefault(name_of(record), []).append(at)
    chosen = [
        next((at for at in some if len(some) > 1 and _is_whole(slab, ordered[at])), some[0])
        for some in writes.values()
    ]
    return ordered[chosen]


def _is_whole(slab: Slab, record: np.void) -> bool:
    """Whether a cell is all there, and can be read."""
    try:
        return slab.read_slot(record, aligned_bytes(stored_bytes_of(int(record["length"]))))
    except OSError:
        return False
