"""A node's folder with cells in it, and ways into it, for the tests of transports."""

import random
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from kvstore.block import HEADER_BYTES, Leaf
from kvstore.clock import Deadline, ManualClock, SystemClock
from kvstore.fs import LinuxFileSystem
from kvstore.leaf_table import Leaves
from kvstore.tiers.host import HostTier
from kvstore.tiers.tier import Commitment, NewCell
from kvstore.transport.base import CellRead, CellWrite, WriteOutcome
from kvstore.transport.bulk_server import BulkServer
from kvstore.transport.local import LocalTransport
from kvstore.transport.mapped import MappedNode
from kvstore.transport.wire import Wire

TOKENS = 16
SHAPES = ((2, TOKENS, 24), (2, TOKENS, 8), (2, TOKENS, 40))
"""Three layers of one cell, each of another width."""

Shapes = Sequence[tuple[int, int, int]]


def soon() -> Deadline:
    """A deadline that a test never reaches."""
    return Deadline.after(SystemClock(), 30.0)


def past() -> Deadline:
    """A deadline that has passed."""
    return Deadline.after(ManualClock(), 0.0)


@contextmanager
def joined(time_s: float = 30.0) -> Iterator[tuple[socket.socket, Wire]]:
    """A socket, and the other end of it as a source that has just so much time."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        sender = socket.create_connection(server.getsockname())
        receiver, _ = server.accept()
    with sender, receiver:
        wire = Wire(receiver)
        wire.until(Deadline.after(ManualClock(), time_s))
        yield sender, wire


@dataclass
class World:
    """One node's tier, with a seeded source of bytes."""

    folder: Path
    tier: HostTier
    random: random.Random

    @classmethod
    def make(cls, folder: Path, capacity_bytes: int = 8 << 20, seed: int = 1) -> "World":
        folder.mkdir()
        tier = HostTier.create(
            LinuxFileSystem(), ManualClock(), folder, capacity_bytes, slots=2048, incarnation=1
        )
        return cls(folder, tier, random.Random(seed))

    def leaves(self, shapes: Shapes = SHAPES) -> tuple[Leaf, ...]:
        """Fresh leaves of random bytes."""
        return tuple(
            np.frombuffer(bytearray(self.random.randbytes(h * t * r)), np.uint8).reshape(h, t, r)
            for h, t, r in shapes
        )

    def reserved(self, leaves: tuple[Leaf, ...], cell: int = 0) -> CellWrite:
        """A write into a slot that is reserved for it."""
        key = self.random.randbytes(32)
        length = sum(leaf.nbytes for leaf in leaves)
        tokens = leaves[0].shape[1]
        slot = self.tier.reserve(NewCell(key, cell, tokens, length, 3, 77, 0), stamp=1)
        record = self.tier.table.slots[slot]
        generation, offset = int(record["generation"]), int(record["offset"])
        place = (int(slot), generation, offset)
        return CellWrite(key, cell, *place, tokens, 3, 77, length, Leaves.of(leaves))

    def stored(self, leaves: tuple[Leaf, ...], cell: int = 0) -> "HeldRead":
        """A cell that is held, and a read of it into zeroed leaves."""
        write = self.reserved(leaves, cell)
        (written,) = LocalTransport.open(LinuxFileSystem(), self.folder).write([write], soon())
        assert written.outcome is WriteOutcome.FILLED
        return self.committed(write, written.header_digest)

    def committed(self, write: CellWrite, header_digest: int) -> "HeldRead":
        """Make a written cell visible; a read of it."""
        assert self.tier.commit(write.slot, header_digest) is Commitment.STORED
        empty = Leaves.of([np.zeros_like(leaf) for leaf in write.leaves])
        place = write.slot, write.generation, write.offset, header_digest
        return HeldRead(write.key, write.cell, write.length, empty, *place)

    def flip(self, read: "HeldRead", at: int) -> None:
        """Turn one bit of byte ``at`` of a slot's header page and payload."""
        self.tier.arena.view(read.offset + at, 1)[0] ^= 0x10

    def flip_payload(self, read: "HeldRead", at: int = 0) -> None:
        self.flip(read, HEADER_BYTES + at)


@dataclass(frozen=True, slots=True)
class HeldRead(CellRead):
    """A read, and where in the arena its cell lies."""

    slot: int
    generation: int
    offset: int
    header_digest: int


AnyRead = TypeVar("AnyRead", bound=CellRead)


def into(read: AnyRead, *leaves: Leaf) -> AnyRead:
    """The same read with other leaves."""
    into_these = Leaves.of(leaves)
    return replace(read, length=int(into_these.sizes.sum()), leaves=into_these)


def same(some: Iterable[Leaf], others: Iterable[Leaf]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(some, others, strict=True))


def strided(shapes: Shapes, tokens: int, start: int) -> tuple[list[Leaf], tuple[Leaf, ...]]:
    """Caches of a longer context, and the leaves in them that begin at token ``start``."""
    caches = [np.full((h, tokens, r), 0xEE, np.uint8) for h, _, r in shapes]
    leaves = tuple(
        cache[:, start : start + t] for cache, (_, t, _) in zip(caches, shapes, strict=True)
    )
    return caches, leaves


@contextmanager
def served(folder: Path, token: bytes | None = None) -> Iterator[str]:
    """A bulk server of this very process; its address."""
    server = BulkServer(MappedNode.map(LinuxFileSystem(), folder), SystemClock(), token)
    with accepting(server.admit) as address:
        yield address


@contextmanager
def accepting(admit: Callable[[socket.socket], None]) -> Iterator[str]:
    """Hand every connection to ``admit``; the address to connect to."""
    listener = socket.create_server(("127.0.0.1", 0))

    def accept() -> None:
        while True:
            try:
                connected, _ = listener.accept()
            except OSError:
                return
            admit(connected)

    thread = threading.Thread(target=accept)
    thread.start()
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
        listener.close()
