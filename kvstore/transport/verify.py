"""Whether delivered bytes are the cell that was asked for.

Header first: it must be the one whose digest the node's table named, and be of this very key and
cell. Then the leaves that it describes: what is hashed is what was delivered, or a copy from which
it is delivered, while the processor still has it in its cache (``kvstore.leaves``). Hashing the
source instead would accept what changes or tears on the way.
"""

from kvstore.block import FormatFault, Header, parse_header
from kvstore.leaf_table import Leaves
from kvstore.transport.base import CellRead


def header_of(read: CellRead, page: bytes | memoryview) -> Header | FormatFault:
    """The header in ``page``, if it is that of the cell asked for."""
    header = parse_header(page, read.header_digest)
    if isinstance(header, FormatFault):
        return header
    if (header.key, header.cell) != (read.key, read.cell):
        return FormatFault.BAD_CELL
    return header if header.payload_bytes == read.length else FormatFault.BAD_LENGTH


def leaves_for(read: CellRead, header: Header) -> Leaves | FormatFault:
    """The leaves that the payload behind this header goes into, if it fits them."""
    leaves = read.leaves
    if len(leaves) != len(header.leaf_digests):
        return FormatFault.BAD_LEAVES
    fits = leaves.sizes.sum() == header.payload_bytes
    return leaves if fits else FormatFault.BAD_LENGTH
