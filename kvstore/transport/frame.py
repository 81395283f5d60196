"""The bulk port's wire format, version 2: fixed little-endian structures without holes.

Opening, once for each connection:

    server  GREETING   magic "SMVB", version u16, token wanted u16 (0 or 1), challenge 32
    client  PROOF      32 bytes: BLAKE3 of the challenge, keyed by BLAKE3 of the token; else zeros
    server  VERDICT    u16: 1 welcome, 2 refused (and the server closes)

Then requests, one after the other, each with 1 to 512 cells:

    client  REQUEST    kind u16 (1 read, 2 write), cells u16, milliseconds left u32, and which read
                       of the client's it is part of u32, by any number (0 for a write)
    read:
    client  ASKED      per cell: key 32, payload bytes u32, cell u16, leaves u16
    server  ANSWER     per cell: status u16 (1 found, 2 gone), header digest u64, and the packed
                       header of so many leaves, zeros unless found; then the payloads of what was
                       found
    write:
    client  OFFERED    per cell: key 32, generation u64, offset u64, slot u32, payload bytes u32,
                       cell u16, leaves u16; then the size of every leaf, u32
    server  STATUS     per cell: u16 (1 send it, 2 gone)
    client  HEADED     per cell to be sent: payload, then header bytes u16, header digest u64, and
                       the packed header
    server  STATUS     per cell sent: u16 (1 filled, 3 corrupt)

A header is sent as it lies in the arena, beside the digest that the key table has of it: the
client compares. It comes behind a payload that is written, because its digests are taken on the
way. What breaks a limit, or makes no sense, ends the connection. Digests guard every payload; the
port offers no secrecy: what may listen to the network may read it.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from blake3 import blake3

from kvstore.block import HEADER_BYTES
from kvstore.cell import CELL_BYTES_MAX, CELLS_MAX, LAYERS_MAX
from kvstore.clock import Deadline
from kvstore.transport.base import CellRead, CellWrite

WIRE_VERSION = 2
CELLS_PER_REQUEST_MAX = 512
REMAINING_MS_MAX = 60_000
CHALLENGE_BYTES = 32
PROOF_BYTES = 32
MAGIC = b"SMVB"

GREETING = struct.Struct(f"<4sHH{CHALLENGE_BYTES}s")
REQUEST = struct.Struct("<HHII")
ASKED = struct.Struct("<32sIHH")
ANSWER = struct.Struct("<HQ")
OFFERED = struct.Struct("<32sQQIIHH")
HEADED = struct.Struct("<HQ")
STATUS = struct.Struct("<H")


class BadFrame(ConnectionError):
    """The other side does not speak this protocol: nothing on this connection can be believed."""


class Verdict(IntEnum):
    """What the server thinks of a client's proof."""

    WELCOME = 1
    REFUSED = 2


class Kind(IntEnum):
    """What a request asks for."""

    READ = 1
    WRITE = 2


class Status(IntEnum):
    """What the server says of one cell."""

    GOOD = 1
    GONE = 2
    CORRUPT = 3


@dataclass(frozen=True, slots=True)
class Asked:
    """A cell of so many leaves that a client wants to read."""

    key: bytes
    length: int
    cell: int
    leaves: int


@dataclass(frozen=True, slots=True)
class Offered:
    """A cell that a client wants to write; ``leaf_bytes`` are the sizes of its leaves."""

    key: bytes
    generation: int
    offset: int
    slot: int
    length: int
    cell: int
    leaf_bytes: tuple[int, ...]


def proof(token: bytes, challenge: bytes) -> bytes:
    """What only somebody who knows the token can answer to a challenge."""
    return blake3(challenge, key=blake3(token).digest()).digest()


def pack_read(cells: Sequence[CellRead], deadline: Deadline, read: int) -> bytes:
    """A read request."""
    head = REQUEST.pack(Kind.READ, len(cells), _remaining_ms(deadline), read)
    return head + b"".join(ASKED.pack(c.key, c.length, c.cell, len(c.leaves)) for c in cells)


def pack_write(cells: Sequence[CellWrite], deadline: Deadline) -> bytes:
    """A write request, without the payloads."""
    parts = [REQUEST.pack(Kind.WRITE, len(cells), _remaining_ms(deadline), 0)]
    for c in cells:
        sizes = c.leaves.sizes.tolist()
        parts.append(
            OFFERED.pack(c.key, c.generation, c.offset, c.slot, c.length, c.cell, len(sizes))
        )
        parts.append(struct.pack(f"<{len(sizes)}I", *sizes))
    return b"".join(parts)


def unpack_request(head: bytes) -> tuple[Kind, int, float, int]:
    """Kind, number of cells, seconds left, and which read; raises ``BadFrame``."""
    kind, cells, remaining_ms, read = REQUEST.unpack(head)
    if kind not in (Kind.READ, Kind.WRITE) or not 1 <= cells <= CELLS_PER_REQUEST_MAX:
        raise BadFrame(f"a request of kind {kind} for {cells} cells")
    return Kind(kind), cells, min(remaining_ms, REMAINING_MS_MAX) / 1000, read


def unpack_asked(packed: bytes) -> list[Asked]:
    """The cells of a read request; raises ``BadFrame``."""
    asked = [Asked(*fields) for fields in ASKED.iter_unpack(packed)]
    for one in asked:
        _check_cell(one.cell, one.length)
        _check_leaves(one.leaves)
    return asked


def leaves_offered(packed: bytes) -> int:
    """How many leaf sizes follow this OFFERED; raises ``BadFrame``."""
    leaves: int = OFFERED.unpack(packed)[-1]
    _check_leaves(leaves)
    return leaves


def unpack_offered(packed: bytes, packed_sizes: bytes) -> Offered:
    """One cell of a write request; raises ``BadFrame``."""
    key, generation, offset, slot, length, cell, leaves = OFFERED.unpack(packed)
    sizes = struct.unpack(f"<{leaves}I", packed_sizes)
    _check_cell(cell, length)
    if sum(sizes) != length or min(sizes) < 1:
        raise BadFrame(f"leaves of {sum(sizes)} bytes in a cell of {length}")
    return Offered(key, generation, offset, slot, length, cell, sizes)


def unpack_status(packed: bytes) -> Status:
    """A status word; raises ``BadFrame``."""
    (status,) = STATUS.unpack(packed)
    return _status(status)


def unpack_answer(packed: memoryview) -> tuple[Status, int]:
    """Status of a cell that was asked for, and its header's digest; raises ``BadFrame``."""
    status, digest = ANSWER.unpack_from(packed)
    return _status(status), digest


def unpack_headed(packed: bytes) -> tuple[int, int]:
    """Header bytes and header digest of a cell that was written; raises ``BadFrame``."""
    header_bytes, digest = HEADED.unpack(packed)
    if header_bytes > HEADER_BYTES:
        raise BadFrame(f"a header of {header_bytes} bytes")
    return header_bytes, digest


def _check_leaves(leaves: int) -> None:
    if not 1 <= leaves <= LAYERS_MAX:
        raise BadFrame(f"a cell of {leaves} leaves")


def _check_cell(cell: int, length: int) -> None:
    if cell >= CELLS_MAX or not 1 <= length <= CELL_BYTES_MAX:
        raise BadFrame(f"cell {cell} of {length} bytes")


def _status(status: int) -> Status:
    if status not in (Status.GOOD, Status.GONE, Status.CORRUPT):
        raise BadFrame(f"status {status}")
    return Status(status)


def _remaining_ms(deadline: Deadline) -> int:
    return min(REMAINING_MS_MAX, round(deadline.remaining_s() * 1000))
