"""Whether delivered bytes are the cell that was asked for.

Header first: it must be the one whose digest the node's table names, be of this very key and cell,
and describe the leaves that the reader has room for. Then these: what is hashed is what was
delivered, or a copy from which it is delivered, while the processor still has it in its cache
(``kvstore.leaves``). Hashing the source instead would accept what changes or tears on the way.
"""

from kvstore.block import FormatFault, Header, parse_header
from kvstore.transport.base import CellRead


def header_of(read: CellRead, page: bytes | memoryview, digest: int) -> Header | FormatFault:
    """The header in ``page``, if it has this digest and is that of the cell asked for."""
    header = parse_header(page, digest)
    if isinstance(header, FormatFault):
        return header
    if (header.key, header.cell) != (read.key, read.cell):
        return FormatFault.BAD_CELL
    if len(read.leaves) != len(header.leaf_digests):
        return FormatFault.BAD_LEAVES
    return header if header.payload_bytes == read.length else FormatFault.BAD_LENGTH
