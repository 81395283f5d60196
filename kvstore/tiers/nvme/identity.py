"""Whose slab and catalog these are: the same 128 bytes in the slab's first page and the catalog.

    0    8   magic                    40  8   bytes of an extent
    8    8   XXH3-64 of the rest      48  8   extents in the slab
    16   4   format version           56  64  node id, UTF-8, zeros behind it
    20   4   bytes of the node id     120 8   zeros
    24   16  slab id, random

Damaged and foreign are two things: what does not match its checksum is repaired from the other
copy, what is whole and of another version, node or slab is refused and left alone.

Does not cover: what is done about it (``recovery``).
"""

import struct
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

from kvstore.errors import StateError
from kvstore.tiers.nvme.record import PAGE_BYTES

NVME_FORMAT_VERSION = 1
IDENTITY_BYTES = 128
NODE_ID_BYTES_MAX = 64
_MAGIC = b"SMVNVME\0"
_START = struct.Struct("<8sQ")
_REST = struct.Struct("<II16sQQ64s8x")
assert _START.size + _REST.size == IDENTITY_BYTES


@dataclass(frozen=True, slots=True)
class Identity:
    """Which slab, of which node, of what shape."""

    slab_id: bytes
    node_id: str
    extent_bytes: int
    extents: int

    def pack(self) -> bytes:
        """For the slab's first page, and for the catalog."""
        node = self.node_id.encode()
        assert len(node) <= NODE_ID_BYTES_MAX, "a node id is at most 64 bytes"
        rest = _REST.pack(
            NVME_FORMAT_VERSION, len(node), self.slab_id, self.extent_bytes, self.extents, node
        )
        return _START.pack(_MAGIC, xxh3_64_intdigest(rest)) + rest

    @property
    def slab_bytes(self) -> int:
        """Length of the slab file."""
        return self.extent_start(self.extents)

    @property
    def slot_bytes_max(self) -> int:
        """The largest slot that there can be."""
        return self.extent_bytes - PAGE_BYTES

    def extent_start(self, extent: int) -> int:
        """Where an extent begins."""
        return PAGE_BYTES + extent * self.extent_bytes

    def extent_of(self, offset: int) -> int:
        """The extent that a slot is in."""
        return (offset - PAGE_BYTES) // self.extent_bytes

    def extents_of(self, offsets: npt.NDArray[np.uint64]) -> npt.NDArray[np.intp]:
        """``extent_of`` for many."""
        return ((offsets - np.uint64(PAGE_BYTES)) // np.uint64(self.extent_bytes)).astype(np.intp)

    def slots_of(self, extent: int, slot_bytes: int) -> range:
        """Offsets of the slots that an extent is cut into."""
        first = self.extent_start(extent) + PAGE_BYTES
        count = (self.extent_bytes - PAGE_BYTES) // slot_bytes
        return range(first, first + count * slot_bytes, slot_bytes)

    def have_slots(
        self, offsets: npt.NDArray[np.uint64], slot_bytes: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.bool_]:
        """Where slots of that size can be."""
        from_first = offsets.astype(np.int64) - PAGE_BYTES
        extents, within = np.divmod(from_first, self.extent_bytes)
        into = within - PAGE_BYTES
        can_be: npt.NDArray[np.bool_] = (extents >= 0) & (extents < self.extents) & (into >= 0)
        can_be &= (into % slot_bytes == 0) & (into + slot_bytes <= self.slot_bytes_max)
        return can_be


def parse_identity(packed: bytes, what: str) -> Identity | None:
    """What ``pack`` wrote, ``None`` if it is damaged or absent.

    Raises ``StateError`` for one that is whole and of another format version.
    """
    if len(packed) < IDENTITY_BYTES:
        return None
    magic, checksum = _START.unpack_from(packed)
    rest = packed[_START.size : IDENTITY_BYTES]
    if magic != _MAGIC or checksum != xxh3_64_intdigest(rest):
        return None
    version, node_bytes, slab_id, extent_bytes, extents, node = _REST.unpack(rest)
    if version != NVME_FORMAT_VERSION:
        raise StateError(
            f"{what} has format version {version}, this is version {NVME_FORMAT_VERSION}: remove "
            "it to start with an empty NVMe tier"
        )
    return Identity(slab_id, node[:node_bytes].decode(errors="replace"), extent_bytes, extents)


def check_node(found: Identity, node_id: str, what: str) -> None:
    """Refuse what another node has written."""
    if found.node_id != node_id:
        raise StateError(
            f"{what} is of node {found.node_id}, this is node {node_id}: give this node a folder "
            "of its own"
        )
