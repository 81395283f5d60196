"""The cell format: one header page, then the payload. Version 1.

All integers are little-endian, there are no holes, and the header is bounded.

    offset  size  field
    0       4     magic "SMVR"
    4       2     format version, 1
    6       2     cell index in the grid
    8       4     tokens in the block, 1 to 4096
    12      4     payload bytes
    16      4     chain depth: index of the block in its chain
    20      4     leaves: layers in the cell, 1 to 480
    24      8     span name (see ``kvstore.key``)
    32      32    block key
    64      8xN   leaf digests
    64+8N   ..    zeros up to 4096
    4096    ..    payload: leaf 0, leaf 1, ...; a leaf is ``[head, token, row]``

A *leaf digest* is XXH3-64 of the leaf's bytes, seeded by (key, cell, leaf), so that the right
bytes under a wrong key fail as well. The *header digest* is XXH3-64 of the first 64+8N bytes; it
stands in the key table, not in the header. Reading gives a ``Header`` or a ``FormatFault``,
nothing else; payload that does not match its digests is a miss.

Does not cover: where cells are kept (``kvstore.arena``), who may see them (``kvstore.table``).
"""

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64, xxh3_64_intdigest

from kvstore.cell import BLOCK_TOKENS_MAX, CELL_BYTES_MAX, CELLS_MAX, LAYERS_MAX
from kvstore.key import KEY_BYTES

FORMAT_VERSION = 1
HEADER_BYTES = 4096
_MAGIC = b"SMVR"
_FIXED = struct.Struct("<4sHHIIIIQ32s")
_LEAF_STEPS = np.arange(LAYERS_MAX, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)

_DIGEST_BYTES = 8

assert _FIXED.size == 64
assert _FIXED.size + _DIGEST_BYTES * LAYERS_MAX <= HEADER_BYTES

Leaf = npt.NDArray[np.uint8]
"""uint8 ``[heads, tokens, row_bytes]``; each head's ``[tokens, row_bytes]`` is contiguous."""

Seeds = npt.NDArray[np.uint64]
"""uint64 ``[leaves]``: what their digests are seeded by."""


class FormatFault(Enum):
    """Why bytes are not a cell header: a closed list."""

    TOO_SHORT = "fewer bytes than a header"
    BAD_MAGIC = "not a cell"
    BAD_VERSION = "a cell of another format version"
    BAD_CELL = "cell index out of range"
    BAD_TOKENS = "token count out of range"
    BAD_LENGTH = "payload length out of range"
    BAD_LEAVES = "leaf count out of range"
    BAD_DIGEST = "header does not match its digest"


@dataclass(frozen=True, slots=True)
class Header:
    """What a cell says of itself."""

    key: bytes
    cell: int
    tokens: int
    payload_bytes: int
    depth: int
    span: int
    leaf_digests: tuple[int, ...]

    @property
    def packed_bytes(self) -> int:
        """How long it is without its zero padding."""
        return packed_bytes_of(len(self.leaf_digests))

    def pack(self) -> bytes:
        """The header without its zero padding."""
        fixed = _FIXED.pack(
            _MAGIC,
            FORMAT_VERSION,
            self.cell,
            self.tokens,
            self.payload_bytes,
            self.depth,
            len(self.leaf_digests),
            self.span,
            self.key,
        )
        return fixed + struct.pack(f"<{len(self.leaf_digests)}Q", *self.leaf_digests)


def packed_bytes_of(leaves: int) -> int:
    """How long the header of a cell of so many leaves is without its zero padding."""
    return _FIXED.size + _DIGEST_BYTES * leaves


def header_digest(packed: bytes) -> int:
    """The digest of a packed header, as the key table holds it."""
    return xxh3_64_intdigest(packed)


def parse_header(page: bytes | memoryview, digest: int | None = None) -> Header | FormatFault:
    """Read a header page; with ``digest``, only if the header matches it. Never raises."""
    if len(page) < _FIXED.size:
        return FormatFault.TOO_SHORT
    fields = _FIXED.unpack_from(page)
    magic, version, cell, tokens, payload_bytes, depth, leaves, span, key = fields
    fault = _range_fault(magic, version, cell, tokens, payload_bytes, leaves)
    if fault is not None:
        return fault
    packed_bytes = packed_bytes_of(leaves)
    if len(page) < packed_bytes:
        return FormatFault.TOO_SHORT
    if digest is not None and xxh3_64_intdigest(page[:packed_bytes]) != digest:
        return FormatFault.BAD_DIGEST
    digests = struct.unpack_from(f"<{leaves}Q", page, _FIXED.size)
    return Header(key, cell, tokens, payload_bytes, depth, span, digests)


def _range_fault(
    magic: bytes, version: int, cell: int, tokens: int, payload_bytes: int, leaves: int
) -> FormatFault | None:
    if magic != _MAGIC:
        return FormatFault.BAD_MAGIC
    if version != FORMAT_VERSION:
        return FormatFault.BAD_VERSION
    if cell >= CELLS_MAX:
        return FormatFault.BAD_CELL
    if not 1 <= tokens <= BLOCK_TOKENS_MAX:
        return FormatFault.BAD_TOKENS
    if not 1 <= payload_bytes <= CELL_BYTES_MAX:
        return FormatFault.BAD_LENGTH
    if not 1 <= leaves <= LAYERS_MAX:
        return FormatFault.BAD_LEAVES
    return None


def leaf_seeds(key: bytes, cell: int, leaves: int) -> Seeds:
    """The digest seed of every leaf of a cell."""
    assert len(key) == KEY_BYTES
    return _LEAF_STEPS[:leaves] + np.uint64(xxh3_64_intdigest(key, seed=cell))


def leaf_digest(leaf: Leaf, seed: int) -> int:
    """The digest of one leaf, wherever its heads lie."""
    if leaf.flags.c_contiguous:
        return xxh3_64_intdigest(leaf.data, seed=seed)
    hasher = xxh3_64(seed=seed)
    for head in leaf:
        hasher.update(head.data)
    return hasher.intdigest()


def leaf_digests(key: bytes, cell: int, leaves: Sequence[Leaf]) -> Iterable[int]:
    """The digests of a cell's leaves, computed one by one as they are asked for."""
    seeds = leaf_seeds(key, cell, len(leaves)).tolist()
    return (leaf_digest(leaf, seed) for leaf, seed in zip(leaves, seeds, strict=True))


def payload_leaves(
    payload: npt.NDArray[np.uint8], shapes: Sequence[tuple[int, int, int]]
) -> list[Leaf]:
    """View a cell's contiguous payload as its leaves, without copying."""
    leaves = []
    start = 0
    for heads, tokens, row_bytes in shapes:
        stop = start + heads * tokens * row_bytes
        leaves.append(payload[start:stop].reshape(heads, tokens, row_bytes))
        start = stop
    assert start == len(payload), "payload and shapes disagree"
    return leaves
