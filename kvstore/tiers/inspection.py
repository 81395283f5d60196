"""Inspection: whether a held cell still is what was committed, by the node's own reading.

A reader that finds a cell damaged says so, but its word is not enough to drop it: the bytes may
have been damaged on the way, or the reader may be. The node knows header and digests and reads the
slot itself; only how long each leaf is it has to be told, because headers do not say.

Does not cover: what happens to a damaged cell (``kvstore.tiers.host``).
"""

from collections.abc import Sequence

from kvstore import leaf_sizes
from kvstore.arena import Arena
from kvstore.block import HEADER_BYTES, FormatFault, Header, parse_header
from kvstore.table import KeyTable


def held_header(arena: Arena, table: KeyTable, slot: int) -> Header | None:
    """The header of a held cell, ``None`` if it is not the one that the table promises."""
    record = table.slots[slot]
    page = arena.view(int(record["offset"]), HEADER_BYTES)
    header = parse_header(page.data, int(table.entries[int(record["entry"])]["header_digest"]))
    promised = (table.key_of(slot), int(record["cell"]), int(record["length"]))
    if isinstance(header, FormatFault):
        return None
    return header if (header.key, header.cell, header.payload_bytes) == promised else None


def is_announced(arena: Arena, table: KeyTable, slot: int, key: bytes, header_digest: int) -> bool:
    """Whether a slot that was written holds the cell that was announced."""
    record = table.slots[slot]
    # A copy, because the writer could still change what is checked.
    page = arena.view(int(record["offset"]), HEADER_BYTES).tobytes()
    header = parse_header(page, header_digest)
    announced = (key, int(record["cell"]), int(record["tokens"]), int(record["length"]))
    return not isinstance(header, FormatFault) and announced == (
        header.key, header.cell, header.tokens, header.payload_bytes,
    )  # fmt: skip


def is_whole(arena: Arena, table: KeyTable, slot: int, leaf_bytes: Sequence[int]) -> bool:
    """Whether every leaf of a held cell matches its digest.

    Lengths that cannot be those of the cell say nothing against it.
    """
    record = table.slots[slot]
    header = held_header(arena, table, slot)
    if header is None:
        return False
    if sum(leaf_bytes) != header.payload_bytes or len(leaf_bytes) != len(header.leaf_digests):
        return True
    payload = arena.view(int(record["offset"]) + HEADER_BYTES, header.payload_bytes)
    return leaf_sizes.is_whole(header, payload, leaf_bytes)
