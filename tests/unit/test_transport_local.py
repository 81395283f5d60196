"""The local transport: what only shows where copies are made by this very process."""

from pathlib import Path

import pytest

from kvstore.errors import StateError
from kvstore.fs import LinuxFileSystem, Mapped
from kvstore.table import Found
from kvstore.transport.base import ReadOutcome
from kvstore.transport.local import LocalTransport
from kvstore.transport.mapped import MappedNode
from tests.unit.transport_world import World, soon


class EvictingNode(MappedNode):
    """Frees every slot right after a reader has found it."""

    world: World

    def found_bytes(self, found: Found, row: int, length: int) -> Mapped | None:
        view = super().found_bytes(found, row, length)
        self.world.tier.evict(int(found.slots[row]))
        return view


def test_a_slot_freed_under_its_reader_is_gone(tmp_path: Path) -> None:
    world = World.make(tmp_path / "node")
    read = world.stored(world.leaves())
    node = EvictingNode.map(LinuxFileSystem(), world.folder)
    assert isinstance(node, EvictingNode)
    node.world = world
    assert LocalTransport(node).read([read], soon()) == [ReadOutcome.GONE]


def test_a_folder_without_a_node_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="has not started"):
        LocalTransport.open(LinuxFileSystem(), tmp_path)


class RecordingFileSystem(LinuxFileSystem):
    """Remembers what was faulted in."""

    def __init__(self) -> None:
        super().__init__()
        self.populated: list[tuple[int, int]] = []

    def populate(self, mapped: Mapped, start: int, length: int) -> None:
        self.populated.append((start, length))


def test_memory_is_faulted_in_but_for_what_was_retired(tmp_path: Path) -> None:
    world = World.make(tmp_path / "node")
    writes = [world.reserved(world.leaves()) for _ in range(3)]
    world.tier.retire(writes[1].slot)
    ((start, stop),) = world.tier.table.retired_ranges()
    assert start == writes[1].offset
    fs = RecordingFileSystem()
    MappedNode.map(fs, world.folder).populate()
    frontier = int(world.tier.table.header["frontier"])
    assert fs.populated == [(0, start), (stop, frontier - stop)]
