"""Adoption: what a host tier takes over from a predecessor that died.

    slot's state     what the successor makes of it
    COMMITTED        held, if table entry, record and cell header agree; else UNUSED
    RESERVED         RETIRED: its writer may still be writing
    RETIRED          RETIRED
    QUARANTINED      UNUSED: whoever was late reading it will notice

Everything below the frontier that is neither held nor retired is free. A folder of another boot,
size, page size or version, or one that is torn, is refused as a whole: then the tier starts empty,
with new files, and whoever still maps the old ones harms nobody.

Does not cover: payloads (every reader verifies its copy), what a tier does with the free ranges
and the retired slots (``kvstore.tiers.host``).
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kvstore.arena import ARENA_FILE, SPARSE_FACTOR, Arena
from kvstore.block import HEADER_BYTES
from kvstore.errors import StateError
from kvstore.fs import FileSystem
from kvstore.table import KeyTable, Slots, SlotState
from kvstore.tiers.inspection import held_header


@dataclass(frozen=True, slots=True)
class Inheritance:
    """A predecessor's arena and table, put in order.

    ``held`` are the slots with whole cells, ``free`` the ranges ``(start, length)`` that have
    memory and belong to nobody.
    """

    arena: Arena
    table: KeyTable
    held: Slots
    free: tuple[tuple[int, int], ...]


def take_over(fs: FileSystem, folder: Path, capacity_bytes: int, incarnation: int) -> Inheritance:
    """Put what a predecessor left in order; ``StateError`` says why there is nothing to adopt."""
    table = KeyTable.map(fs, folder, writable=True)
    header = table.header
    if bytes(header["boot_id"]) != fs.boot_id():
        raise StateError("the arena is of another boot of this machine")
    if int(header["page_bytes"]) != fs.page_bytes:
        raise StateError("the arena was made with another page size")
    if int(header["capacity_bytes"]) != capacity_bytes:
        raise StateError("the arena was made with another capacity")
    if fs.size_bytes(folder / ARENA_FILE) != capacity_bytes * SPARSE_FACTOR:
        raise StateError("the arena file is not the one that its table describes")
    if not capacity_bytes <= int(header["frontier"]) <= capacity_bytes * SPARSE_FACTOR:
        raise StateError("the arena's table is torn: its frontier is outside the arena")
    if int(header["incarnation"]) >= incarnation:
        raise StateError("the arena was last used by a later incarnation of this node")
    arena = Arena.map(fs, folder)
    held = _settle(arena, table)
    return Inheritance(arena, table, held, _free_ranges(table))


def _settle(arena: Arena, table: KeyTable) -> Slots:
    """Bring every slot to a state that a living tier knows; the slots that are held."""
    states = table.slots["state"]
    committed = np.flatnonzero(states == SlotState.COMMITTED).astype(np.uint32)
    agreed = table.entries_are_whole(committed) & _inside(table, committed)
    whole = [s for s in committed[agreed].tolist() if held_header(arena, table, s) is not None]
    held = np.array(whole, np.uint32)
    states[np.setdiff1d(committed, held)] = SlotState.UNUSED
    states[states == SlotState.QUARANTINED] = SlotState.UNUSED
    states[states == SlotState.RESERVED] = SlotState.RETIRED
    table.keep_only(held)
    return held


def _inside(table: KeyTable, slots: Slots) -> npt.NDArray[np.bool_]:
    """Which slots lie in backed memory and are large enough for their cells."""
    records = table.slots[slots]
    size = records["size_bytes"].astype(np.uint64)
    page_bytes = table.header["page_bytes"]
    inside: npt.NDArray[np.bool_] = records["offset"] + size <= table.header["frontier"]
    inside &= records["length"].astype(np.uint64) + np.uint64(HEADER_BYTES) <= size
    inside &= (records["offset"] % page_bytes == 0) & (size % page_bytes == 0)
    return inside


def _free_ranges(table: KeyTable) -> tuple[tuple[int, int], ...]:
    """What lies between the slots that are held or retired, up to the frontier."""
    states = table.slots["state"]
    taken = table.slots[(states == SlotState.COMMITTED) | (states == SlotState.RETIRED)]
    taken = taken[np.argsort(taken["offset"])]
    free = []
    position = 0
    for offset, size in zip(taken["offset"].tolist(), taken["size_bytes"].tolist(), strict=True):
        if offset < position:
            raise StateError("the arena's table is torn: two slots share memory")
        if offset > position:
            free.append((position, offset - position))
        position = offset + size
    frontier = int(table.header["frontier"])
    if position > frontier:
        raise StateError("the arena's table is torn: a slot lies beyond the frontier")
    if position < frontier:
        free.append((position, frontier - position))
    return tuple(free)
