"""What must hold of a node's disk, at every moment: it adds up, and what is held is durable.

Looks at the disk's image as a power loss would leave it, at the catalog's rows, and at what the
node goes by. Does not cover: what must be there after a start (``tests.sim.disks`` compares), what
readers get (``tests.sim.clients``).
"""

from collections.abc import Mapping

import numpy as np

from kvstore.block import HEADER_BYTES
from kvstore.tiers.nvme.record import RECORD, slot_bytes_of
from kvstore.tiers.nvme.shelf import State
from kvstore.tiers.nvme.spill import Phase
from tests.sim.disks import Name, name_of
from tests.sim.storage import StorageNode


def check_disk(node: StorageNode, right: Mapping[Name, bytes]) -> list[str]:
    """What is broken on a node's disk just now."""
    if node.nvme is None or node.nvme.phase is not Phase.OPEN:
        return []
    return [*_adds_up(node), *_is_durable(node, right)]


def disk_pending(node: StorageNode) -> list[str]:
    """What a node still waits for from its disk."""
    if node.nvme is None:
        return []
    if node.nvme.phase is not Phase.OPEN or node.disk_process is None:
        return [f"its disk is {node.nvme.phase.name}: {node.nvme.reason}"]
    in_doubt = len(node.nvme.held_records()) - len(node.nvme.sure_records())
    left = [f"{in_doubt} cells of its disk are in doubt"] if in_doubt else []
    promised = np.count_nonzero(node.node.life.holds._protection._below)
    assert node.nvme._open is not None
    pins = int(node.nvme._open.shelf._pins.sum()) - promised
    return [*left, f"{pins} pins on its disk that no hold has"] if pins else left


def readable_on_disk(node: StorageNode) -> set[Name]:
    """Cells that a reader can be given from there."""
    nvme, disk = node.nvme, node.machine.disk
    if nvme is None:
        return set()
    wall_ms = node.machine.clock.wall_ms()
    return {
        name_of(record)
        for record in nvme.held_records()
        if not disk.is_rotten(record)
        and (not record["expires_ms"] or int(record["expires_ms"]) > wall_ms)
    }


def _adds_up(node: StorageNode) -> list[str]:
    """Every slot of the slab is free, or some record's, and no two records share a byte."""
    nvme = node.nvme
    assert nvme is not None
    assert nvme._open is not None
    shelf, stats = nvme._open.shelf, nvme.stats
    faults = []
    used = shelf.records[shelf._state != State.UNUSED]
    sizes = np.array([slot_bytes_of(int(length)) for length in used["length"]], np.uint64)
    if int(sizes.sum()) != shelf.extents.used_bytes:
        faults.append(f"{int(sizes.sum())} bytes of {shelf.extents.used_bytes} in use have a cell")
    order = np.argsort(used["offset"])
    ends = (used["offset"] + sizes)[order]
    if (ends[:-1] > used["offset"][order][1:]).any():
        faults.append("two records share a slot")
    held = shelf.records[shelf._state == State.HELD]
    held_bytes = sum(slot_bytes_of(int(length)) for length in held["length"])
    if (len(held), held_bytes) != (shelf.held_cells, shelf.held_bytes):
        faults.append("the counters of what the disk holds are wrong")
    in_doubt = len(nvme.held_records()) - len(nvme.sure_records())
    if in_doubt != len(nvme._open.doubts):
        faults.append(f"{in_doubt} held cells are in doubt, {len(nvme._open.doubts)} are counted")
    if stats.held_bytes > stats.capacity_bytes:
        faults.append("the disk holds more than it may")
    return faults


def _is_durable(node: StorageNode, right: Mapping[Name, bytes]) -> list[str]:
    """Every cell that is held would be there after a power loss now, whole and right.

    Where one in doubt is being written again, that may be the new write, before it is answered.
    """
    nvme, disk = node.nvme, node.machine.disk
    assert nvme is not None
    assert nvme._open is not None
    faults = []
    for held in nvme.held_records():
        name, record = name_of(held), held
        row = disk.catalog.rows.get(name)
        if row is not None and name in nvme._open._writing:
            record = np.frombuffer(row, RECORD)[0]
        if row is None or np.frombuffer(row, RECORD)[0]["sequence"] != record["sequence"]:
            faults.append(f"a cell is held on disk without a row: {name[0].hex()[:8]}")
        start = int(record["offset"]) + HEADER_BYTES
        stored = bytes(disk.slab.image[start : start + int(record["length"])])
        if stored != right.get(name) and not disk.is_rotten(record):
            faults.append(f"a cell is held on disk and not durable: {name[0].hex()[:8]}")
    return faults
