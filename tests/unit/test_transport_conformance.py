"""What every transport keeps: each test runs on all of them, with native code and with its twin.

A transport between processes is tested here with its server in this process; what only shows with
real processes and broken wires is in `test_transport_tcp.py` and `test_transport_bulk.py`.
"""

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kvstore.clock import SystemClock
from kvstore.fs import LinuxFileSystem
from kvstore.key import as_keys
from kvstore.leaf_table import Leaves
from kvstore.leaves import PythonMover, movers
from kvstore.tiers.tier import NewCell
from kvstore.transport.base import CellWrite, ReadOutcome, Transport, WriteOutcome, Written
from kvstore.transport.frame import CELLS_PER_REQUEST_MAX
from kvstore.transport.local import LocalTransport
from kvstore.transport.tcp import TcpTransport
from tests.unit.transport_world import (
    SHAPES,
    TOKENS,
    World,
    into,
    past,
    same,
    served,
    soon,
    strided,
)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World.make(tmp_path / "node")


MOVERS = (movers()[0], PythonMover())


@pytest.fixture(params=MOVERS, ids=lambda mover: mover.implementation.name, autouse=True)
def mover(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who copies and hashes on both sides."""
    monkeypatch.setattr("kvstore.leaves._mover", request.param)


@pytest.fixture(params=["local", "tcp"])
def transport(request: pytest.FixtureRequest, world: World) -> Iterator[Transport]:
    if request.param == "local":
        way: Transport = LocalTransport.open(LinuxFileSystem(), world.folder)
        yield way
        way.close()
    else:
        with served(world.folder, token=b"secret") as address:
            way = TcpTransport(address, token=b"secret")
            yield way
            way.close()


def test_what_was_written_is_read(world: World, transport: Transport) -> None:
    leaves = world.leaves()
    write = world.reserved(leaves, cell=5)
    (written,) = transport.write([write], soon())
    assert written.outcome is WriteOutcome.FILLED
    read = world.committed(write, written.header_digest)
    assert transport.read([read], soon()) == [ReadOutcome.VERIFIED]
    assert same(read.leaves, leaves)


def test_every_transport_reads_what_another_wrote(world: World, transport: Transport) -> None:
    leaves = world.leaves()
    read = world.stored(leaves)
    assert transport.read([read], soon()) == [ReadOutcome.VERIFIED]
    assert same(read.leaves, leaves)


def test_strided_leaves_are_filled_and_nothing_beside_them(
    world: World, transport: Transport
) -> None:
    leaves = world.leaves()
    caches, views = strided(SHAPES, tokens=48, start=16)
    assert transport.read([into(world.stored(leaves), *views)], soon()) == [ReadOutcome.VERIFIED]
    assert same(views, leaves)
    assert all((cache[:, :16] == 0xEE).all() and (cache[:, 32:] == 0xEE).all() for cache in caches)


def test_strided_leaves_are_written(world: World, transport: Transport) -> None:
    _, views = strided(SHAPES, tokens=48, start=16)
    for view, leaf in zip(views, world.leaves(), strict=True):
        np.copyto(view, leaf)
    write = world.reserved(views)
    (written,) = transport.write([write], soon())
    read = world.committed(write, written.header_digest)
    assert transport.read([read], soon()) == [ReadOutcome.VERIFIED]
    assert same(read.leaves, views)


def test_a_leaf_of_more_heads_than_one_system_call_takes(
    world: World, transport: Transport
) -> None:
    shapes = ((1100, 16, 1),)
    leaves = world.leaves(shapes)
    _, views = strided(shapes, tokens=17, start=1)
    assert transport.read([into(world.stored(leaves), *views)], soon()) == [ReadOutcome.VERIFIED]
    assert same(views, leaves)


def test_a_read_is_noted_as_a_use(world: World, transport: Transport) -> None:
    reads = [world.stored(world.leaves()) for _ in range(3)]
    world.tier.evict(reads[1].slot)
    transport.read(reads, soon())
    (slots,) = world.tier.uses.take()
    assert slots.tolist() == sorted([reads[0].slot, reads[2].slot])
    transport.read(reads[1:2], soon())
    assert world.tier.uses.take() == []


def test_what_one_read_uses_is_one_use_and_what_the_next_does_a_later_one(
    world: World, transport: Transport
) -> None:
    shapes = ((4, 16, 2048),) * 10
    reads = [world.stored(world.leaves(shapes)) for _ in range(4)]
    for _ in range(2):
        transport.read(reads, soon())
        transport.read(reads[:1], soon())
        transport.read(reads[1:2], soon())
        later = [read.slot for read in reads[2:]], [reads[0].slot], [reads[1].slot]
        assert [slots.tolist() for slots in world.tier.uses.take()] == [*later]


def test_many_cells_keep_their_order(world: World, transport: Transport) -> None:
    shapes = ((1, 16, 2),)
    content = [world.leaves(shapes) for _ in range(CELLS_PER_REQUEST_MAX + 88)]
    reads = [world.stored(leaves) for leaves in content]
    for read in reads[::7]:
        world.tier.evict(read.slot)
    outcomes = transport.read(reads, soon())
    gone = [index % 7 == 0 for index in range(len(reads))]
    assert outcomes == [ReadOutcome.GONE if g else ReadOutcome.VERIFIED for g in gone]
    assert all(same(r.leaves, c) for r, c, g in zip(reads, content, gone, strict=True) if not g)


def test_enough_bytes_for_several_threads(world: World, transport: Transport) -> None:
    shapes = ((4, 16, 2048), (4, 16, 2048))
    writes = [world.reserved(world.leaves(shapes)) for _ in range(20)]
    answers = transport.write(writes, soon())
    reads = [
        world.committed(write, answer.header_digest)
        for write, answer in zip(writes, answers, strict=True)
    ]
    assert transport.read(reads, soon()) == [ReadOutcome.VERIFIED] * 20
    assert all(same(r.leaves, w.leaves) for r, w in zip(reads, writes, strict=True))


def test_several_callers_at_once(world: World, transport: Transport) -> None:
    content = [world.leaves() for _ in range(40)]
    reads = [world.stored(leaves) for leaves in content]
    good: list[bool] = []

    def read_all(shift: int) -> None:
        mine = [into(r, *(np.zeros_like(leaf) for leaf in r.leaves)) for r in reads[shift:]]
        outcomes = transport.read(mine, soon())
        arrived = all(same(m.leaves, c) for m, c in zip(mine, content[shift:], strict=True))
        good.append(arrived and set(outcomes) == {ReadOutcome.VERIFIED})

    threads = [threading.Thread(target=read_all, args=(shift,)) for shift in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert good == [True] * 6


@pytest.mark.parametrize("at", [0, 2 * 16 * 24, 2 * 16 * 72 - 1])
def test_a_flipped_byte_of_the_payload_is_corrupt(
    world: World, transport: Transport, at: int
) -> None:
    reads = [world.stored(world.leaves()) for _ in range(3)]
    world.flip_payload(reads[1], at)
    assert transport.read(reads, soon()) == [
        ReadOutcome.VERIFIED,
        ReadOutcome.CORRUPT,
        ReadOutcome.VERIFIED,
    ]


@pytest.mark.parametrize("at", [0, 4, 8, 12, 20, 32, 64, 64 + 8 * 3 - 1])
def test_a_flipped_byte_of_the_header_is_corrupt(
    world: World, transport: Transport, at: int
) -> None:
    reads = [world.stored(world.leaves()) for _ in range(2)]
    world.flip(reads[0], at)
    assert transport.read(reads, soon()) == [ReadOutcome.CORRUPT, ReadOutcome.VERIFIED]


def test_a_freed_slot_is_gone(world: World, transport: Transport) -> None:
    read = world.stored(world.leaves())
    world.tier.evict(read.slot)
    assert transport.read([read], soon()) == [ReadOutcome.GONE]


def test_what_lies_in_the_slot_of_another_cell_by_now_is_still_found(
    world: World, transport: Transport
) -> None:
    """A read names a cell, and no place."""
    leaves = world.leaves()
    read = world.stored(leaves)
    world.tier.evict(read.slot)
    assert transport.read([read], soon()) == [ReadOutcome.GONE]
    slot = world.tier.reserve(NewCell(read.key, read.cell, TOKENS, read.length, 3, 77, 0), stamp=1)
    record = world.tier.table.slots[slot]
    assert int(record["offset"]) != read.offset
    place = int(slot), int(record["generation"]), int(record["offset"])
    again = CellWrite(read.key, read.cell, *place, TOKENS, 3, 77, read.length, Leaves.of(leaves))
    (written,) = transport.write([again], soon())
    world.committed(again, written.header_digest)
    assert transport.read([read], soon()) == [ReadOutcome.VERIFIED]
    assert same(read.leaves, leaves)


def test_what_nobody_has_stored_is_gone(world: World, transport: Transport) -> None:
    read = world.stored(world.leaves())
    strangers = [replace(read, key=bytes(32)), replace(read, cell=1)]
    assert transport.read(strangers, soon()) == [ReadOutcome.GONE] * 2
    assert transport.read([*strangers, read], soon())[2] is ReadOutcome.VERIFIED


def test_what_has_expired_is_gone(world: World, transport: Transport) -> None:
    read = world.stored(world.leaves())
    record = world.tier.table.slots[read.slot : read.slot + 1]
    record["expires_ms"] = SystemClock().wall_ms() + 60_000
    assert transport.read([read], soon()) == [ReadOutcome.VERIFIED]
    record["expires_ms"] = SystemClock().wall_ms()
    assert transport.read([read], soon()) == [ReadOutcome.GONE]


def test_a_sealed_node_shows_nothing(world: World, transport: Transport) -> None:
    read = world.stored(world.leaves())
    for sealed, outcome in ((True, ReadOutcome.GONE), (False, ReadOutcome.VERIFIED)):
        world.tier.table.set_sealed(sealed)
        assert transport.read([read], soon()) == [outcome]


def test_the_right_slot_under_a_wrong_key_is_corrupt(world: World, transport: Transport) -> None:
    read, other = world.stored(world.leaves()), bytes(range(32))
    digest = np.array([read.header_digest], np.uint64)
    assert world.tier.table.insert_all(as_keys(other), np.array([read.slot], np.uint32), digest)
    assert transport.read([replace(read, key=other)], soon()) == [ReadOutcome.CORRUPT]


def test_the_right_slot_with_another_header_digest_is_corrupt(
    world: World, transport: Transport
) -> None:
    read = world.stored(world.leaves())
    world.tier.table.clear(read.slot)
    digest = np.array([read.header_digest ^ 1], np.uint64)
    slots = np.array([read.slot], np.uint32)
    assert world.tier.table.insert_all(as_keys(read.key), slots, digest)
    assert transport.read([read], soon()) == [ReadOutcome.CORRUPT]


def test_leaves_of_another_geometry_are_never_verified(world: World, transport: Transport) -> None:
    read = world.stored(world.leaves())
    assert transport.read([into(read, *list(read.leaves)[:2])], soon()) == [ReadOutcome.GONE]
    merged = np.zeros((2, 16, 72), np.uint8)
    assert transport.read([into(read, merged)], soon()) == [ReadOutcome.CORRUPT]


def test_nothing_asked_nothing_answered(transport: Transport) -> None:
    assert transport.read([], soon()) == []
    assert transport.write([], soon()) == []


def test_past_the_deadline_nothing_moves(world: World, transport: Transport) -> None:
    read = world.stored(world.leaves())
    write = world.reserved(world.leaves())
    assert transport.read([read], past()) == [ReadOutcome.FAILED]
    assert not any(leaf.any() for leaf in read.leaves)
    assert transport.write([write], past()) == [Written(WriteOutcome.UNSENT)]
    assert not world.tier.arena.view(write.offset, 4096 + write.length).any()


def test_a_slot_that_is_not_reserved_is_not_written(world: World, transport: Transport) -> None:
    held = world.stored(world.leaves())
    aborted = world.reserved(world.leaves())
    world.tier.abort(aborted.slot)
    intruder = replace(
        aborted, slot=held.slot, generation=held.generation, offset=held.offset, cell=held.cell
    )
    good = world.reserved(world.leaves())
    answers = transport.write([aborted, intruder, good], soon())
    assert [answer.outcome for answer in answers] == [
        WriteOutcome.GONE,
        WriteOutcome.GONE,
        WriteOutcome.FILLED,
    ]
    assert transport.read([held], soon()) == [ReadOutcome.VERIFIED]


def test_a_write_longer_than_its_reservation_is_not_written(
    world: World, transport: Transport
) -> None:
    write = world.reserved(world.leaves())
    neighbour = world.stored(world.leaves())
    more = Leaves.of((*write.leaves, *world.leaves(((2, 16, 400),))))
    longer = replace(write, length=int(more.sizes.sum()), leaves=more)
    assert transport.write([longer], soon()) == [Written(WriteOutcome.GONE)]
    assert transport.read([neighbour], soon()) == [ReadOutcome.VERIFIED]


def test_a_re_used_slot_keeps_nothing_of_the_former_header(
    world: World, transport: Transport
) -> None:
    write = world.reserved(world.leaves())
    page = world.tier.arena.view(write.offset, 4096)
    page[:] = 0xFF
    transport.write([write], soon())
    assert not page[64 + 8 * len(write.leaves) :].any()
