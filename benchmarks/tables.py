"""Tables and cells without payload worth the name, for rows that measure bookkeeping."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from blake3 import blake3

from benchmarks.folders import shared_folder
from kvstore.block import Header, header_digest
from kvstore.calls import CellOutcome, ReserveRequest
from kvstore.changes import Changes
from kvstore.directory import Announcement, Directory
from kvstore.fs import LinuxFileSystem
from kvstore.key import Keys, as_keys
from kvstore.node import Node
from kvstore.table import KeyTable

PAYLOAD_BYTES = 64


@contextmanager
def filled_table(slots: int, keys: Keys) -> Iterator[KeyTable]:
    """A key table for ``slots`` slots that holds cell 0 of ``keys``, at slots far apart."""
    with shared_folder() as folder:
        table = KeyTable.create(LinuxFileSystem(), folder, slots, 1 << 20, incarnation=1)
        chosen = np.random.default_rng(2).choice(slots, len(keys), replace=False)
        for slot in chosen.tolist():
            record = table.slots[slot]
            record["generation"] = 1 << 40 | slot
            record["length"] = 1
        if not table.insert_all(keys, chosen.astype(np.uint32), chosen.astype(np.uint64)).all():
            raise AssertionError("a table that is nearly empty had no room")
        yield table


def store_tiny(node: Node, first: int, count: int) -> None:
    """Reserve, write headers and commit, as a client would; keys are numbered from ``first``."""
    session = node.open_session()
    keys = numbered_keys("own", first, count)
    small = np.full(count, PAYLOAD_BYTES, np.uint32)
    depths = np.arange(first, first + count, dtype=np.uint32)
    reply = node.reserve(
        ReserveRequest(
            session=session,
            operation=first,
            keys=keys,
            cells=np.zeros(count, np.uint8),
            lengths=small,
            tokens=np.full(count, 16, np.uint32),
            depths=depths,
            spans=(depths // 64).astype(np.uint64),
        )
    )
    digests = []
    for row, offset in enumerate(reply.offsets.tolist()):
        key = keys[row].tobytes()
        depth = int(depths[row])
        packed = Header(key, 0, 16, PAYLOAD_BYTES, depth, depth // 64, (0,)).pack()
        node.tier.arena.view(offset, len(packed))[:] = np.frombuffer(packed, np.uint8)
        digests.append(header_digest(packed))
    packed_digests = np.array(digests, np.uint64)
    outcomes = node.commit(session, reply.slots, reply.generations, packed_digests)
    assert (outcomes == CellOutcome.STORED).all(), "a block was not stored"
    node.close_session(session)


def announce(directory: Directory, node: int, whose: str, blocks: int, step: int) -> None:
    """Tell a shard of all the blocks that a node holds, ``step`` in a message."""
    directory.apply(Announcement(node, 1, 1, 0, Changes.empty()))
    for number, first in enumerate(range(0, blocks, step), start=1):
        count = min(step, blocks - first)
        changes = Changes(
            numbered_keys(whose, first, count),
            np.zeros(count, np.uint8),
            np.zeros(count, np.uint64),
            np.ones(count, np.bool_),
        )
        directory.apply(Announcement(node, 1, 1, number, changes))


def numbered_keys(whose: str, first: int, count: int) -> Keys:
    """Keys that are the same in every run."""
    names = (f"{whose} {number}".encode() for number in range(first, first + count))
    return as_keys(b"".join(blake3(name).digest() for name in names))
