"""Whether delivered bytes are the cell that was asked for.

Header first: it must be the one whose digest the node's table named, and be of this very key and
cell. Then leaf by leaf, each hashed where it was delivered, right behind its delivery while the
processor still has it in its cache. Hashing the source instead would accept what changes or tears
on the way.
"""

from collections import deque

from kvstore.block import FormatFault, Header, Leaf, leaf_digest, leaf_seeds, parse_header
from kvstore.transport.base import CellRead


def header_of(read: CellRead, page: bytes | memoryview) -> Header | FormatFault:
    """The header in ``page``, if it is that of the cell asked for."""
    header = parse_header(page, read.header_digest)
    if isinstance(header, FormatFault):
        return header
    if (header.key, header.cell) != (read.key, read.cell):
        return FormatFault.BAD_CELL
    if not header.payload_bytes == read.length == sum(leaf.nbytes for leaf in read.leaves):
        return FormatFault.BAD_LENGTH
    if len(header.leaf_digests) != len(read.leaves):
        return FormatFault.BAD_LEAVES
    return header


class LeafChecks:
    """What the leaves of one cell must hash to; asked leaf by leaf, in order, as they arrive."""

    def __init__(self, header: Header) -> None:
        seeds = leaf_seeds(header.key, header.cell, len(header.leaf_digests))
        self._expected = deque(zip(seeds, header.leaf_digests, strict=True))

    def accept(self, leaf: Leaf) -> bool:
        """Whether the next leaf, as it lies in memory now, is what was stored."""
        seed, digest = self._expected.popleft()
        return leaf_digest(leaf, seed) == digest

    def done(self) -> bool:
        """Whether all leaves have been asked about."""
        return not self._expected
