"""The slab: a preallocated file of extents, whose slots say themselves what they hold.

    page 0     | extent 0                                   | extent 1 ...
    identity   | extent page | slot | slot | ... | rest     | extent page | ...
                               header page | payload | padding

An *extent page* says which size of slots its extent is cut into, and since which sequence; what is
older in there is a leftover of an earlier use. A slot's *header page* is the cell's header as in
the arena, with a trailer in the zeros at its end:

    offset  size
    3976    8     magic "SMVSLOT1"
    3984    8     XXH3-64 of the payload, seeded by key and cell
    3992    96    the cell's record (``kvstore.tiers.nvme.record``)
    4088    8     XXH3-64 of all before it in the page, seeded by the slab's id

So a slot that was moved, torn, left over from another slab or crafted as some cell's payload is
none. The payload's digest stands in for the leaf digests, because a header does not say how long
its leaves are; whoever gets the cell checks those where it is delivered, as always.

Does not cover: which slots are in use (``extents``), what is promised (``catalog``).
"""

import errno
import struct
from collections.abc import Sequence

import numpy as np
from xxhash import xxh3_64_intdigest

from kvstore.block import HEADER_BYTES, FormatFault, parse_header
from kvstore.fs import Mapped
from kvstore.tiers.nvme.disk import Disk, aligned_bytes
from kvstore.tiers.nvme.identity import IDENTITY_BYTES, Identity
from kvstore.tiers.nvme.record import (
    PAGE_BYTES,
    RECORD,
    is_possible,
    key_bytes,
    stored_bytes_of,
)

SLAB_FILE = "slab"
_SLOT_MAGIC = b"SMVSLOT1"
_EXTENT_MAGIC = b"SMVEXTNT"
_TRAILER_START = 3976
_CHECKSUM_START = 4088
_EXTENT = struct.Struct("<8sQQQ")
"""Magic, extent number, bytes of a slot, sequence; then their checksum."""

assert HEADER_BYTES == PAGE_BYTES
assert _TRAILER_START + 16 + RECORD.itemsize == _CHECKSUM_START


class Slab:
    """Slots and extent pages of one file. May be used from several threads."""

    def __init__(self, disk: Disk, identity: Identity) -> None:
        self.disk = disk
        self.identity = identity
        self._seed = int.from_bytes(identity.slab_id[:8], "little")
        self._zeros = aligned_bytes(PAGE_BYTES)

    def write_identity(self) -> None:
        """Put the identity into the first page, durably."""
        page = aligned_bytes(PAGE_BYTES)
        page[:IDENTITY_BYTES] = np.frombuffer(self.identity.pack(), np.uint8)
        write_whole(self.disk, [page], 0)
        self.disk.sync()

    def write_slot(self, record: np.void, source: Mapped) -> bool:
        """Write a cell out of ``source``, header page first; ``False`` if it is not that cell.

        Not durable before ``sync``. Raises ``OSError``; the slot then holds no one knows what.
        """
        page = aligned_bytes(PAGE_BYTES)
        page[:_TRAILER_START] = source[:_TRAILER_START]
        if not _is_header_of(page, record):
            return False
        payload = source[HEADER_BYTES : HEADER_BYTES + int(record["length"])]
        digest = xxh3_64_intdigest(payload.data, seed=_payload_seed(record))
        trailer = _SLOT_MAGIC + struct.pack("<Q", digest) + record.tobytes()
        page[_TRAILER_START:_CHECKSUM_START] = np.frombuffer(trailer, np.uint8)
        checksum = xxh3_64_intdigest(page[:_CHECKSUM_START].data, seed=self._seed)
        page[_CHECKSUM_START:] = np.frombuffer(struct.pack("<Q", checksum), np.uint8)
        rest = source[HEADER_BYTES : stored_bytes_of(int(record["length"]))]
        write_whole(self.disk, [page, rest], int(record["offset"]))
        return True

    def read_slot(self, record: np.void, target: Mapped) -> bool:
        """Read a cell into ``target`` as it was in the arena; ``False`` if it is not whole.

        Then, and after an ``OSError``, what is in ``target`` is undefined.
        """
        page = aligned_bytes(PAGE_BYTES)
        rest = target[HEADER_BYTES : stored_bytes_of(int(record["length"]))]
        read_whole(self.disk, [page, rest], int(record["offset"]))
        found = self._record_in(page, int(record["offset"]))
        if found is None or not _is_same_write(found, record):
            return False
        payload = target[HEADER_BYTES : HEADER_BYTES + int(record["length"])]
        digest = xxh3_64_intdigest(payload.data, seed=_payload_seed(record))
        if page[_TRAILER_START + 8 : _TRAILER_START + 16].tobytes() != struct.pack("<Q", digest):
            return False
        target[:_TRAILER_START] = page[:_TRAILER_START]
        target[_TRAILER_START:HEADER_BYTES] = 0
        return True

    def record_at(self, offset: int) -> np.void | None:
        """What the slot at ``offset`` says that it holds, ``None`` if it holds no cell.

        Its payload is not looked at. A page that can't be read holds none.
        """
        page = aligned_bytes(PAGE_BYTES)
        try:
            read_whole(self.disk, [page], offset)
        except OSError:
            return None
        return self._record_in(page, offset)

    def wipe(self, offset: int) -> None:
        """Make the slot, or extent, that begins at ``offset`` hold nothing; durable after sync."""
        write_whole(self.disk, [self._zeros], offset)

    def write_extent(self, extent: int, slot_bytes: int, sequence: int) -> None:
        """Say which slots an extent is cut into from now on; durable after sync."""
        fixed = _EXTENT.pack(_EXTENT_MAGIC, extent, slot_bytes, sequence)
        packed = fixed + struct.pack("<Q", xxh3_64_intdigest(fixed, seed=self._seed))
        page = aligned_bytes(PAGE_BYTES)
        page[: len(packed)] = np.frombuffer(packed, np.uint8)
        write_whole(self.disk, [page], self.identity.extent_start(extent))

    def read_extent(self, extent: int) -> tuple[int, int] | None:
        """Bytes of a slot, and since which sequence; ``None`` if the extent is cut into none."""
        page = aligned_bytes(PAGE_BYTES)
        try:
            read_whole(self.disk, [page], self.identity.extent_start(extent))
        except OSError:
            return None
        packed = page[: _EXTENT.size + 8].tobytes()
        checksum = struct.pack("<Q", xxh3_64_intdigest(packed[: _EXTENT.size], seed=self._seed))
        magic, number, slot_bytes, sequence = _EXTENT.unpack_from(packed)
        good = packed[_EXTENT.size :] == checksum and (magic, number) == (_EXTENT_MAGIC, extent)
        return (slot_bytes, sequence) if good else None

    def _record_in(self, page: Mapped, offset: int) -> np.void | None:
        checksum = xxh3_64_intdigest(page[:_CHECKSUM_START].data, seed=self._seed)
        if page[_CHECKSUM_START:].tobytes() != struct.pack("<Q", checksum):
            return None
        if page[_TRAILER_START : _TRAILER_START + 8].tobytes() != _SLOT_MAGIC:
            return None
        packed = page[_TRAILER_START + 16 : _CHECKSUM_START].tobytes()
        record: np.void = np.frombuffer(packed, RECORD)[0]
        good = int(record["offset"]) == offset and is_possible(record)
        return record if good and _is_header_of(page, record) else None


def read_whole(disk: Disk, buffers: Sequence[Mapped], offset: int) -> None:
    """Fill all buffers, going on after a short read; the end of the file is an ``OSError``."""
    left = list(buffers)
    while left:
        got = disk.read(left, offset)
        if got <= 0:
            raise OSError(errno.EIO, f"the slab ends at {offset}")
        offset += got
        left = _behind(left, got)


def write_whole(disk: Disk, buffers: Sequence[Mapped], offset: int) -> None:
    """Write all buffers, going on after a short write."""
    left = list(buffers)
    while left:
        gone = disk.write(left, offset)
        if gone <= 0:
            raise OSError(errno.EIO, f"nothing could be written at {offset}")
        offset += gone
        left = _behind(left, gone)


def _behind(buffers: list[Mapped], done_bytes: int) -> list[Mapped]:
    """What is left of buffers after so many bytes.

    A transfer that stopped within a page is refused: O_DIRECT can't go on from there.
    """
    if done_bytes % PAGE_BYTES:
        raise OSError(errno.EIO, f"a transfer stopped within a page, after {done_bytes} bytes")
    left = []
    for buffer in buffers:
        if done_bytes < len(buffer):
            left.append(buffer[done_bytes:])
        done_bytes = max(0, done_bytes - len(buffer))
    return left


def _is_header_of(page: Mapped, record: np.void) -> bool:
    """Whether a header page is that of the recorded cell."""
    header = parse_header(page.data, int(record["header_digest"]))
    return not isinstance(header, FormatFault) and (
        (header.key, header.cell, header.payload_bytes)
        == (key_bytes(record), int(record["cell"]), int(record["length"]))
    )


def _is_same_write(found: np.void, record: np.void) -> bool:
    """Whether what a slot holds is what the record promises; expiry and use may have moved on."""
    names = ("key", "cell", "offset", "sequence", "length", "header_digest")
    return all(found[name].tobytes() == record[name].tobytes() for name in names)


def _payload_seed(record: np.void) -> int:
    return xxh3_64_intdigest(key_bytes(record), seed=int(record["cell"]))
