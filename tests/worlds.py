"""Tiny worlds: folders of shared memory and cells whose right bytes follow from their name.

A cell here has one leaf, as long as its payload, and its payload is a function of key and cell. So
whoever finds a cell can say whether its bytes are right, without being told what was written.
"""

import fcntl
import mmap
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from kvstore.arena import Arena
from kvstore.block import HEADER_BYTES, Header, header_digest, leaf_digests, parse_header
from kvstore.calls import ReserveRequest
from kvstore.clock import Clock
from kvstore.fs import FileSystem
from kvstore.key import Keys, as_keys
from kvstore.machine import SHM_FOLDER
from kvstore.table import Cells, KeyTable
from kvstore.tiers.host import HostTier
from kvstore.tiers.tier import Commitment, NewCell, Refusal

PAGE = mmap.PAGESIZE
SHARED_PREFIX = "samovar-tests-"
LOCKED_WITHIN_S = 10.0
"""A folder that is younger may be one that its run is just about to lock."""


@contextmanager
def shared_folder() -> Iterator[Path]:
    """A folder in shared memory, where holes can be punched; gone afterwards.

    It is locked meanwhile, so that ``sweep_shared_folders`` can tell what killed runs have left.
    """
    sweep_shared_folders()
    with TemporaryDirectory(prefix=SHARED_PREFIX, dir=SHM_FOLDER) as name:
        lock = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield Path(name)
        finally:
            os.close(lock)


@cache
def sweep_shared_folders() -> None:
    """Remove what killed test runs have left: nothing else gives that memory back."""
    for folder in SHM_FOLDER.glob(f"{SHARED_PREFIX}*"):
        with suppress(OSError):
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if time.time() - os.fstat(lock).st_mtime > LOCKED_WITHIN_S:
                    shutil.rmtree(folder)
            finally:
                os.close(lock)


def key_number(number: int) -> bytes:
    """A key that is the same in every run."""
    return blake3(number.to_bytes(8, "little")).digest()


def packed(keys: Sequence[bytes]) -> Keys:
    """Keys as the tier takes them, uint8 ``[n, 32]``."""
    return as_keys(b"".join(keys))


def cells_of(*cells: int) -> Cells:
    return np.array(cells, np.uint8)


def new_cell(number: int, cell: int = 0, pages: int = 1, depth: int = 0, ttl_s: int = 0) -> NewCell:
    """What a writer says of a cell that fills ``pages`` pages besides its header."""
    return NewCell(
        key=key_number(number), cell=cell, tokens=16, length=pages * PAGE - HEADER_BYTES % PAGE,
        depth=depth, span=number, ttl_s=ttl_s,
    )  # fmt: skip


def right_payload(key: bytes, cell: int, length: int) -> npt.NDArray[np.uint8]:
    """The bytes of a cell, from nothing but its name."""
    seed = int.from_bytes(key[:8], "little") ^ cell
    return np.random.default_rng(seed).integers(0, 256, length, np.uint8)


def write_cell(arena: Arena, offset: int, new: NewCell) -> int:
    """Write a cell as a client does, payload first; its header digest."""
    payload = right_payload(new.key, new.cell, new.length)
    arena.view(offset + HEADER_BYTES, new.length)[:] = payload
    leaf = payload.reshape(1, 1, -1)
    header = Header(
        key=new.key, cell=new.cell, tokens=new.tokens, payload_bytes=new.length, depth=new.depth,
        span=new.span, leaf_digests=tuple(leaf_digests(new.key, new.cell, [leaf])),
    ).pack()  # fmt: skip
    arena.view(offset, len(header))[:] = np.frombuffer(header, np.uint8)
    return header_digest(header)


def read_verified(arena: Arena, offset: int, length: int, digest: int) -> Header | None:
    """Read a cell as a client does; ``None`` if a digest says that it is not whole."""
    header = parse_header(arena.view(offset, HEADER_BYTES).tobytes(), digest)
    if not isinstance(header, Header) or header.payload_bytes != length:
        return None
    leaf = arena.view(offset + HEADER_BYTES, length).copy().reshape(1, 1, -1)
    seen = tuple(leaf_digests(header.key, header.cell, [leaf]))
    return header if seen == header.leaf_digests else None


def store(tier: HostTier, new: NewCell, stamp: int | None = None) -> int:
    """Reserve, write and commit; the slot."""
    slot = tier.reserve(new, tier.next_stamp() if stamp is None else stamp)
    assert not isinstance(slot, Refusal), slot.name
    digest = write_cell(tier.arena, int(tier.table.slots[slot]["offset"]), new)
    assert tier.commit(slot, digest) is Commitment.STORED
    return slot


def holds(tier: HostTier, new: NewCell) -> bool:
    """Whether a cell is found, and then its bytes must be right."""
    found = tier.find(packed([new.key]), cells_of(new.cell))
    if not found.held[0]:
        return False
    offset, length = int(found.offsets[0]), int(found.lengths[0])
    header = read_verified(tier.arena, offset, length, int(found.header_digests[0]))
    assert header is not None, "a held cell does not verify"
    assert (header.key, header.cell) == (new.key, new.cell), "another cell's bytes"
    return True


def small_tier(
    fs: FileSystem, clock: Clock, folder: Path, pages: int = 16, slots: int = 16
) -> HostTier:
    """An empty tier of so many pages."""
    return HostTier.create(fs, clock, folder, pages * PAGE, slots, incarnation=1)


def empty_table(fs: FileSystem, folder: Path, slots: int) -> KeyTable:
    """A key table without an arena."""
    return KeyTable.create(fs, folder, slots, capacity_bytes=PAGE, incarnation=1)


def request_for(session: int, operation: int, cells: Sequence[NewCell]) -> ReserveRequest:
    """What a client asks that is about to write these cells, all with the first one's TTL."""
    return ReserveRequest(
        session, operation, packed([new.key for new in cells]),
        cells_of(*(new.cell for new in cells)),
        lengths=np.array([new.length for new in cells], np.uint32),
        tokens=np.array([new.tokens for new in cells], np.uint32),
        depths=np.array([new.depth for new in cells], np.uint32),
        spans=np.array([new.span for new in cells], np.uint64),
        ttl_s=cells[0].ttl_s if cells else 0,
    )  # fmt: skip
