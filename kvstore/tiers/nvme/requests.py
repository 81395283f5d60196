"""What the tier asks of its disk process, and what that answers: packed, of fixed size.

    request   32 bytes (kind, extent, ticket, arena offset, extent's sequence), then a record
    answer    16 bytes (ticket, outcome)
    opening   one, before all answers: a preamble, a text, all records, all tombstones

Does not cover: how they travel (``disk_process``, ``worker``), what is done for them (``drive``).
"""

import struct
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from kvstore.tiers.nvme.identity import IDENTITY_BYTES
from kvstore.tiers.nvme.record import RECORD, TOMBSTONE, Records, Tombstones, rows_in

NO_EXTENT = 0xFFFFFFFF
_REQUEST = struct.Struct("<B3xIQQQ")
REQUEST_BYTES = _REQUEST.size + RECORD.itemsize
ANSWER = struct.Struct("<QB7x")
PREAMBLE = struct.Struct(f"<BxxxIQQ{IDENTITY_BYTES}s")
"""Kind, bytes of the text, records, tombstones, identity."""


class RequestKind(IntEnum):
    """What is to be done with a record's slot or row."""

    READ = 1
    """Slot into the arena, verified."""
    WRITE = 2
    """Arena into the slot, durable; then the row."""
    FREE = 3
    """Row removed, durable; then the slot wiped, so that it can be used again."""
    ERASE = 4
    """``FREE``, and the wipe is durable too."""
    TOUCH = 5
    """The row anew, with a later expiry and stamp."""
    BURY = 6
    """A tombstone, of the record's key and sequence, with the time in its stamp."""
    FORGET = 7
    """The tombstone of that key removed."""
    CHECK = 8
    """The slot read and verified, for nobody."""


class Outcome(IntEnum):
    """What became of a request."""

    DONE = 1
    DAMAGED = 2
    """The bytes are not those of the cell."""
    FAILED = 3
    """The disk or the catalog refused; what was to be durable is not."""


class OpeningKind(IntEnum):
    """How a disk process begins."""

    OPENED = 1
    REFUSED = 2
    """Slab or catalog are not this node's, or of another version; the text says so."""
    FAILED = 3
    """The disk refuses, for now; the text says what. The process ends."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request; ``extent`` is the one whose page has to be written first, if any."""

    kind: RequestKind
    ticket: int
    record: np.void
    arena_offset: int = 0
    extent: int = NO_EXTENT
    extent_sequence: int = 0

    def pack(self) -> bytes:
        """For the wire."""
        fixed = _REQUEST.pack(
            self.kind, self.extent, self.ticket, self.arena_offset, self.extent_sequence
        )
        return fixed + self.record.tobytes()


@dataclass(frozen=True, slots=True)
class Opening:
    """What a disk process found: the identity and all that is held, or why it refuses."""

    kind: OpeningKind
    text: str
    identity: bytes
    records: Records
    tombstones: Tombstones

    def pack(self) -> bytes:
        """For the wire."""
        text = self.text.encode()
        preamble = PREAMBLE.pack(
            self.kind, len(text), len(self.records), len(self.tombstones), self.identity
        )
        return b"".join((preamble, text, self.records.tobytes(), self.tombstones.tobytes()))


def about_block(key: bytes, sequence: int, now_ms: int) -> np.void:
    """The record of a request that is about a block and no cell."""
    record = np.zeros(1, RECORD)
    record["key"] = np.frombuffer(key, "<u8")
    record["sequence"] = sequence
    record["stamp"] = now_ms
    named: np.void = record[0]
    return named


def unpack_request(packed: bytes) -> Request:
    """What ``Request.pack`` wrote."""
    kind, extent, ticket, arena_offset, sequence = _REQUEST.unpack_from(packed)
    record: np.void = np.frombuffer(packed, RECORD, offset=_REQUEST.size)[0]
    return Request(RequestKind(kind), ticket, record, arena_offset, extent, sequence)


def opening_bytes(packed: bytes | bytearray) -> int:
    """Length of an opening whose preamble is there."""
    _, text_bytes, records, tombstones, _ = PREAMBLE.unpack_from(packed)
    rows = records * RECORD.itemsize + tombstones * TOMBSTONE.itemsize
    return int(PREAMBLE.size + text_bytes + rows)


def unpack_opening(packed: bytes) -> Opening:
    """What ``Opening.pack`` wrote."""
    kind, text_bytes, records, tombstones, identity = PREAMBLE.unpack_from(packed)
    at = PREAMBLE.size + text_bytes
    text = packed[PREAMBLE.size : at].decode(errors="replace")
    return Opening(OpeningKind(kind), text, identity, *rows_in(packed, at, records, tombstones))


def no_opening(kind: OpeningKind, reason: str) -> Opening:
    """What a disk process says that does not serve."""
    nothing = (np.empty(0, RECORD), np.empty(0, TOMBSTONE))
    return Opening(kind, reason, bytes(IDENTITY_BYTES), *nothing)
