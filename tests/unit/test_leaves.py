"""Moving and hashing leaves: the native libraries, their twin in Python and xxhash agree."""

import fcntl
import os
import shlex
import shutil
import socket
import sys
import termios
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from unittest import mock

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from kvstore import leaves
from kvstore.block import Leaf, Seeds
from kvstore.leaf_table import Leaves
from kvstore.leaves import (
    Arrived,
    Implementation,
    Mover,
    Moving,
    NativeMover,
    Parcel,
    PythonMover,
    movers,
)
from kvstore.transport.wire import Wire
from tests.unit.transport_world import joined

U64 = (1 << 64) - 1
EMPTY = 0xEE
SEED = np.array([7], np.uint64)
EACH_MOVER = pytest.mark.parametrize("mover", movers(), ids=lambda mover: mover.implementation.name)
EXAMPLES = settings(max_examples=60, deadline=None, derandomize=True)


@dataclass(frozen=True)
class Placed:
    """A leaf with random content, somewhere in an engine's cache that holds nothing else."""

    cache: npt.NDArray[np.uint8]
    leaf: Leaf
    content: bytes
    seed: int

    def fill(self) -> None:
        self.leaf[:] = np.frombuffer(self.content, np.uint8).reshape(self.leaf.shape)

    def is_filled_alone(self) -> bool:
        """Whether the content is in the leaf, and nothing of it beside it. Empties the leaf."""
        filled = self.leaf.tobytes() == self.content
        self.leaf[:] = EMPTY
        return filled and bool((self.cache == EMPTY).all())


@st.composite
def placed(draw: st.DrawFn) -> Placed:
    """Heads with anything between them, in any order; XXH3 goes another way at some lengths."""
    heads, tokens = draw(st.integers(1, 4)), draw(st.integers(1, 70))
    row_bytes = draw(st.sampled_from([1, 3, 8, 16, 17, 128, 129, 240, 241, 256, 511, 1024, 4099]))
    before, behind, step = draw(st.integers(0, 3)), draw(st.integers(0, 3)), draw(st.integers(1, 3))
    cache = np.full((heads * step, before + tokens + behind, row_bytes), EMPTY, np.uint8)
    leaf = cache[::step, before : before + tokens]
    if draw(st.booleans()):
        leaf = leaf[::-1]
    content = np.random.default_rng(draw(st.integers(0, 99))).bytes(leaf.size)
    return Placed(cache, leaf, content, draw(st.integers(0, U64)))


Cell = Sequence[Placed]
CELLS = st.lists(st.lists(placed(), min_size=1, max_size=4), max_size=3)
FAR_BYTES = st.sampled_from([0, leaves.FAR_BYTES])
"""Whether any copy is taken for a long one, or one of a few kilobytes for what it is."""


def payload_of(cell: Cell) -> bytes:
    return b"".join(one.content for one in cell)


def digests_of(cell: Cell) -> tuple[int, ...]:
    return tuple(xxh3_64_intdigest(one.content, one.seed) for one in cell)


def leaves_of(cell: Cell) -> Leaves:
    return Leaves.of([one.leaf for one in cell])


def seeds_of(cell: Cell) -> Seeds:
    return np.array([one.seed for one in cell], np.uint64)


def parcel(cell: Cell, payload: bytes) -> Parcel:
    in_memory = np.frombuffer(bytearray(payload), np.uint8)
    return Parcel(in_memory, leaves_of(cell), seeds_of(cell))


def moved(moving: Moving) -> list[int]:
    """Move all leaves, the last ones first; their digests."""
    half = len(moving.sizes) // 2
    for part in (slice(half, len(moving.sizes)), slice(0, half), slice(half, half)):
        moving.move(part)
    found: list[int] = moving.digests.tolist()
    return found


@EACH_MOVER
@EXAMPLES
@given(cells=CELLS, far_bytes=FAR_BYTES)
def test_payloads_are_scattered_and_hashed_where_they_went(
    mover: Mover, cells: Sequence[Cell], far_bytes: int
) -> None:
    parcels = [parcel(cell, payload_of(cell)) for cell in cells]
    with mock.patch.object(leaves, "FAR_BYTES", far_bytes):
        moving = mover.scattering(parcels)
    assert moved(moving) == [d for cell in cells for d in digests_of(cell)]
    assert all(one.is_filled_alone() for cell in cells for one in cell)


@EACH_MOVER
@EXAMPLES
@given(cells=CELLS, far_bytes=FAR_BYTES)
def test_leaves_are_gathered_and_hashed_as_they_were_packed(
    mover: Mover, cells: Sequence[Cell], far_bytes: int
) -> None:
    for cell in cells:
        for one in cell:
            one.fill()
    parcels = [parcel(cell, bytes(len(payload_of(cell)))) for cell in cells]
    with mock.patch.object(leaves, "FAR_BYTES", far_bytes):
        moving = mover.gathering(parcels)
    assert moved(moving) == [d for cell in cells for d in digests_of(cell)]
    assert [one.payload.tobytes() for one in parcels] == [payload_of(cell) for cell in cells]
    assert all(one.is_filled_alone() for cell in cells for one in cell)


@EACH_MOVER
@pytest.mark.parametrize("shift", [0, 1, 16])
def test_a_long_copy_arrives_wherever_it_lies(mover: Mover, shift: int) -> None:
    cell = [large(number) for number in range(5)]
    stream = payload_of(cell)
    assert len(stream) > leaves.FAR_BYTES
    payload = np.frombuffer(bytearray(bytes(shift) + stream), np.uint8)[shift:]
    parcels = [Parcel(payload, leaves_of(cell), seeds_of(cell))]
    assert moved(mover.scattering(parcels)) == list(digests_of(cell))
    payload[:] = 0
    assert moved(mover.gathering(parcels)) == list(digests_of(cell))
    assert payload.tobytes() == stream
    assert all(one.is_filled_alone() for one in cell)


@EACH_MOVER
@EXAMPLES
@given(cell=st.lists(placed(), max_size=6))
def test_leaves_are_hashed_where_they_lie(mover: Mover, cell: Cell) -> None:
    for one in cell:
        one.fill()
    assert mover.digests(leaves_of(cell), seeds_of(cell)) == digests_of(cell)


def received(mover: Mover, wire: Wire, cell: Cell) -> Arrived:
    return mover.receive(wire, leaves_of(cell), seeds_of(cell))


SEVERAL = st.lists(placed(), min_size=3, max_size=6)


@EACH_MOVER
@EXAMPLES
@given(
    cell=st.lists(placed(), max_size=6),
    piece_bytes=st.integers(1000, 300_000),
    far_bytes=FAR_BYTES,
)
def test_leaves_are_received_and_hashed_on_the_way(
    mover: Mover, cell: Cell, piece_bytes: int, far_bytes: int
) -> None:
    stream = payload_of(cell)

    def send(sender: socket.socket) -> None:
        for start in range(0, len(stream), piece_bytes):
            sender.sendall(stream[start : start + piece_bytes])
        sender.sendall(b"more")

    far = mock.patch.object(leaves, "FAR_BYTES", far_bytes)
    with far, joined() as (sender, wire):
        sending = threading.Thread(target=send, args=(sender,))
        sending.start()
        assert received(mover, wire, cell) == Arrived(digests_of(cell), None)
        sending.join()
        assert wire.receive(4) == b"more"  # not one byte too many was taken
    assert all(one.is_filled_alone() for one in cell)


LARGE_HEADS, LARGE_HEAD_BYTES = 3, 700_001


def large(number: int, heads: int = LARGE_HEADS, head_bytes: int = LARGE_HEAD_BYTES) -> Placed:
    """A leaf of some megabytes: several pieces for every head."""
    empty = np.full((heads, 1, head_bytes), EMPTY, np.uint8)
    return Placed(empty, empty, np.random.default_rng(number).bytes(empty.size), number)


def waiting_bytes(receiver: Wire) -> int:
    """How much has come that was not received."""
    answer = fcntl.ioctl(receiver.fileno(), termios.FIONREAD, bytes(4))
    return int.from_bytes(answer, sys.byteorder)


def wait_until_asleep(receiver: Wire) -> None:
    """Until all is received that has come, or nothing of it any more before more comes."""
    before, now = -1, waiting_bytes(receiver)
    while now and now != before:
        time.sleep(0.02)
        before, now = now, waiting_bytes(receiver)


@EACH_MOVER
@pytest.mark.parametrize("odd_bytes", [0, 1])
def test_much_that_is_received_arrives_wherever_it_lies(mover: Mover, odd_bytes: int) -> None:
    """Behind an odd piece, neither what comes nor where it goes lies as a processor likes it."""
    cell = [large(number) for number in range(5)]
    stream = payload_of(cell)
    assert len(stream) > leaves.FAR_BYTES
    with joined() as (sender, wire):

        def send() -> None:
            sender.sendall(stream[:odd_bytes])
            wait_until_asleep(wire)
            sender.sendall(stream[odd_bytes:])

        sending = threading.Thread(target=send)
        sending.start()
        assert received(mover, wire, cell) == Arrived(digests_of(cell), None)
        sending.join()
    assert all(one.is_filled_alone() for one in cell)


@EACH_MOVER
@pytest.mark.parametrize("late_bytes", [1, 1 << 16, 1 << 20, (1 << 20) + (1 << 18) + 1])
def test_however_late_it_is_woken_it_takes_what_is_its_own(mover: Mover, late_bytes: int) -> None:
    """It has slept already when the last ``late_bytes`` come, and nothing comes behind them."""
    cell = [large(1), large(2)]
    stream = payload_of(cell)

    def send(sender: socket.socket, receiver: Wire) -> None:
        sender.sendall(stream[:-late_bytes])
        wait_until_asleep(receiver)
        sender.sendall(stream[-late_bytes:-1])
        wait_until_asleep(receiver)
        sender.sendall(stream[-1:])

    with joined() as (sender, wire):
        sending = threading.Thread(target=send, args=(sender, wire))
        sending.start()
        assert received(mover, wire, cell) == Arrived(digests_of(cell), None)
        sending.join()
        sender.sendall(b"m")
        assert wire.receive(1) == b"m"  # and sleeps no deeper than before from now on
    assert all(one.is_filled_alone() for one in cell)


@EACH_MOVER
@pytest.mark.parametrize("beside_bytes", [0, 100_000, (1 << 18) - 1, 1 << 18, (1 << 18) + 1])
def test_having_taken_the_beginning_it_is_woken_for_the_rest(
    mover: Mover, beside_bytes: int
) -> None:
    """It sleeps in the middle of what it wanted to take at a time."""
    cell = [large(1, heads=1, head_bytes=(1 << 20) + beside_bytes)]
    stream, beginning_bytes = payload_of(cell), 200_000

    with joined() as (sender, wire):

        def send() -> None:
            wait_until_asleep(wire)
            sender.sendall(stream[beginning_bytes:])

        wire.make_room()
        sender.sendall(stream[:beginning_bytes])
        while waiting_bytes(wire) < beginning_bytes:
            time.sleep(0.001)
        sending = threading.Thread(target=send)
        sending.start()
        assert received(mover, wire, cell) == Arrived(digests_of(cell), None)
        sending.join()


@EACH_MOVER
def test_a_sender_that_stops_halfway_is_noticed_however_much_was_to_come(mover: Mover) -> None:
    cell = [large(1), large(2)]
    stream = payload_of(cell)[: -LARGE_HEAD_BYTES - 9]
    with joined() as (sender, wire):
        sending = threading.Thread(target=send_and_end, args=(sender, stream))
        sending.start()
        arrived = received(mover, wire, cell)
        sending.join()
    assert arrived.digests == digests_of(cell[:1])
    assert isinstance(arrived.fault, ConnectionResetError)


@EACH_MOVER
def test_little_that_has_come_is_taken_when_time_is_over(mover: Mover) -> None:
    cell = [*PAIR, large(1)]
    with joined(time_s=0.2) as (sender, wire):
        sender.sendall(PAIR[0].content + b"half")
        arrived = received(mover, wire, cell)
    assert arrived.digests == digests_of(PAIR[:1])
    assert isinstance(arrived.fault, TimeoutError)


@EACH_MOVER
@EXAMPLES
@given(cell=SEVERAL, short_bytes=st.integers(1, 10_000))
def test_of_a_stream_that_ends_only_whole_leaves_are_answered(
    mover: Mover, cell: Cell, short_bytes: int
) -> None:
    stream = payload_of(cell)
    stop = max(len(stream) - short_bytes, 0)
    stops = accumulate(len(one.content) for one in cell)
    whole = sum(end <= stop for end in stops)
    with joined() as (sender, wire):
        sending = threading.Thread(target=send_and_end, args=(sender, stream[:stop]))
        sending.start()
        arrived = received(mover, wire, cell)
        sending.join()
    assert arrived.digests == digests_of(cell)[:whole]
    assert isinstance(arrived.fault, ConnectionResetError)


def send_and_end(sender: socket.socket, stream: bytes) -> None:
    sender.sendall(stream)
    sender.shutdown(socket.SHUT_WR)


PAIR = [
    Placed(empty, empty, bytes([number]) * 96, number)
    for number in (1, 2)
    for empty in [np.full((2, 3, 16), EMPTY, np.uint8)]
]


@EACH_MOVER
def test_what_had_come_when_time_is_over_is_answered(mover: Mover) -> None:
    with joined(time_s=0.2) as (sender, wire):
        sender.sendall(PAIR[0].content + b"half")
        arrived = received(mover, wire, PAIR)
    assert arrived.digests == digests_of(PAIR[:1])
    assert isinstance(arrived.fault, TimeoutError)


@EACH_MOVER
def test_without_time_nothing_is_received(mover: Mover) -> None:
    with joined(0.0) as (sender, wire):
        sender.sendall(payload_of(PAIR))
        arrived = received(mover, wire, PAIR)
    assert arrived.digests == ()
    assert isinstance(arrived.fault, TimeoutError)


@EACH_MOVER
def test_another_thread_can_end_it(mover: Mover) -> None:
    with joined(time_s=1e10) as (sender, wire):
        sender.sendall(b"half")
        ending = threading.Timer(0.0, wire.shut)
        ending.start()
        arrived = received(mover, wire, PAIR)
        ending.join()
    assert arrived.digests == ()
    assert isinstance(arrived.fault, ConnectionResetError)


@EACH_MOVER
def test_nothing_is_received_into_what_may_not_be_written(mover: Mover) -> None:
    content = bytes(96)
    with joined() as (sender, wire):
        sender.sendall(b"x" * 96)
        with pytest.raises((AssertionError, BufferError, TypeError)):
            mover.receive(wire, Leaves.packed(np.frombuffer(content, np.uint8), [96]), SEED)
    assert content == bytes(96)


@EACH_MOVER
def test_what_may_not_be_written_can_still_be_stored(mover: Mover) -> None:
    content = bytes(range(96))
    fixed = np.frombuffer(content, np.uint8)
    source, other = Leaves.packed(fixed, [96]), Leaves.packed(np.ones(96, np.uint8), [96])
    target = Parcel(np.zeros(96, np.uint8), source, SEED)
    assert moved(mover.gathering([target])) == [xxh3_64_intdigest(content, 7)]
    assert mover.digests(source, SEED) == (xxh3_64_intdigest(content, 7),)
    with pytest.raises((AssertionError, ValueError)):
        moved(mover.scattering([Parcel(np.ones(96, np.uint8), source, SEED)]))
    with pytest.raises((AssertionError, ValueError)):
        moved(mover.gathering([Parcel(fixed, other, SEED)]))
    assert fixed.tobytes() == content


@EACH_MOVER
@pytest.mark.parametrize("payload_bytes", [0, 95, 97])
def test_a_payload_of_another_length_is_not_touched(mover: Mover, payload_bytes: int) -> None:
    leaf = np.full((2, 3, 16), EMPTY, np.uint8)
    payload = np.zeros(payload_bytes, np.uint8)
    for prepared in (mover.scattering, mover.gathering):
        with pytest.raises((AssertionError, ValueError)):
            prepared([Parcel(payload, Leaves.of([leaf]), SEED)])
    assert (leaf == EMPTY).all()
    assert not payload.any()


def test_it_is_native_wherever_there_is_a_compiler() -> None:
    """`make` and every install compile it; a fresh clone in which that went wrong must not pass."""
    compiler = shlex.split(os.environ.get("CC") or "cc")[0]
    if shutil.which(compiler):
        assert leaves.implementation() is not Implementation.PYTHON


@pytest.mark.parametrize("content", [None, b"no library"])
def test_without_a_library_there_is_the_twin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None
) -> None:
    if content is not None:
        (tmp_path / leaves.LIBRARY).write_bytes(content)
    monkeypatch.setattr(leaves, "FOLDER", tmp_path)
    assert [type(mover) for mover in movers()] == [PythonMover]


def test_a_library_of_another_version_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaves, "_VERSION", -1)
    assert not any(isinstance(mover, NativeMover) for mover in movers())
