"""Adoption: what a host tier takes over from a predecessor that died.

    slot's state     what the successor makes of it
    COMMITTED        held, if table entry, record and cell header agree; else UNUSED
    RESERVED         to be retired: its writer may still be writing; UNUSED if it is retired already
    QUARANTINED      UNUSED: whoever was late reading it will notice

Everything below the frontier that is neither held nor retired, nor to be retired, is free. A folder
of another boot, size, page size or version, or one that is torn, is refused as a whole: then the
tier starts empty, with new files, and whoever still maps the old ones harms nobody.

Does not cover: payloads (every reader verifies its copy), what a tier does with the free ranges
and the retired slots (``kvstore.tiers.host``).
"""

from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kvstore.arena import ARENA_FILE, SPARSE_FACTOR, Arena
from kvstore.block import HEADER_BYTES
from kvstore.errors import StateError
from kvstore.fs import FileSystem
from kvstore.table import KeyTable, Slots, SlotState
from kvstore.tiers.inspection import held_header

Extent = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Inheritance:
    """A predecessor's arena and table, put in order.

    ``held`` are the slots with whole cells, ``unfinished`` those to be retired, ``free`` the ranges
    ``(start, length)`` that have memory and belong to nobody.
    """

    arena: Arena
    table: KeyTable
    held: Slots
    unfinished: Slots
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
    retired = _retired_ranges(table)
    held, unfinished = _settle(arena, table, retired)
    return Inheritance(arena, table, held, unfinished, _free_ranges(table, retired))


def _retired_ranges(table: KeyTable) -> list[Extent]:
    """What is retired, as ``(start, stop)`` in order; what a death left overlapping is joined."""
    page_bytes, frontier = int(table.header["page_bytes"]), int(table.header["frontier"])
    joined: list[Extent] = []
    for start, stop in table.retired_ranges():
        if stop > frontier or start % page_bytes or stop % page_bytes:
            raise StateError("the arena's table is torn: what was retired lies outside the arena")
        if joined and start <= joined[-1][1]:
            start, stop = joined[-1][0], max(stop, joined.pop()[1])
        joined.append((start, stop))
    return joined


def _settle(arena: Arena, table: KeyTable, retired: list[Extent]) -> tuple[Slots, Slots]:
    """Bring slots to a state that a living tier knows; those that are held, those to be retired."""
    states = table.slots["state"]
    committed = np.flatnonzero(states == SlotState.COMMITTED).astype(np.uint32)
    agreed = table.entries_are_whole(committed) & _inside(table, committed)
    whole = [s for s in committed[agreed].tolist() if held_header(arena, table, s) is not None]
    held = np.array(whole, np.uint32)
    states[np.setdiff1d(committed, held)] = SlotState.UNUSED
    states[states == SlotState.QUARANTINED] = SlotState.UNUSED
    reserved = np.flatnonzero(states == SlotState.RESERVED).astype(np.uint32)
    # The predecessor may have died between retiring the range and letting go of its record.
    done = _within(table.slots["offset"][reserved], retired)
    states[reserved[done]] = SlotState.UNUSED
    table.keep_only(held)
    return held, reserved[~done]


def _within(offsets: npt.NDArray[np.uint64], ranges: list[Extent]) -> npt.NDArray[np.bool_]:
    """Which offsets lie in one of the ranges, which are in order."""
    edges = np.fromiter(chain.from_iterable(ranges), np.uint64, 2 * len(ranges))
    inside: npt.NDArray[np.bool_] = np.searchsorted(edges, offsets, side="right") % 2 == 1
    return inside


def _inside(table: KeyTable, slots: Slots) -> npt.NDArray[np.bool_]:
    """Which slots lie in backed memory and are large enough for their cells."""
    records = table.slots[slots]
    size = records["size_bytes"].astype(np.uint64)
    page_bytes = table.header["page_bytes"]
    inside: npt.NDArray[np.bool_] = records["offset"] + size <= table.header["frontier"]
    inside &= records["length"].astype(np.uint64) + np.uint64(HEADER_BYTES) <= size
    inside &= (records["offset"] % page_bytes == 0) & (size % page_bytes == 0)
    return inside


def _free_ranges(table: KeyTable, retired: list[Extent]) -> tuple[Extent, ...]:
    """``(start, length)`` of what lies between all that is taken, up to the frontier."""
    states = table.slots["state"]
    slots = table.slots[(states == SlotState.COMMITTED) | (states == SlotState.RESERVED)]
    starts = slots["offset"].tolist()
    sizes = slots["size_bytes"].tolist()
    taken = [(start, start + size) for start, size in zip(starts, sizes, strict=True)]
    free = []
    position = 0
    for start, stop in sorted([*taken, *retired]):
        if start < position:
            raise StateError("the arena's table is torn: two slots share memory")
        if start > position:
            free.append((position, start - position))
        position = stop
    frontier = int(table.header["frontier"])
    if position > frontier:
        raise StateError("the arena's table is torn: a slot lies beyond the frontier")
    if position < frontier:
        free.append((position, frontier - position))
    return tuple(free)
