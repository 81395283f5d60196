"""The key table: which cell is in which slot, readable without asking anybody.

    file "table", beside the arena
    | header, one page | slot records | buckets of 8 tags | buckets of 8 entries | retired ranges |

The node is the only writer. Engines on the same host map the file read-only and find a whole
prompt with two gathers, of tags and of the entries that they name: an entry is in one of two
buckets, and never moves. A bucket of tags is one cache line; records and entries are 64 bytes each.

Publish: payload, cell header, slot record, entry, tag last. Free: tag and entry cleared, generation
raised, then (after a while) the slot is used again. A reader compares whole keys, checks the
entry's fold (64-byte entries can be seen torn), reads the cell, verifies it, and reads the
generation again. All of that saves it work: what it may *believe* rests on the leaf digests alone.

A generation is ``incarnation << 40 | counter``: never the same twice, also across restarts.
Does not cover: space in the arena, who is evicted (``kvstore.tiers.host``).
"""

from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kvstore import probe
from kvstore.cell import CELLS_MAX
from kvstore.errors import StateError
from kvstore.fs import FileSystem, Mapped
from kvstore.key import KEY_BYTES, Keys

TABLE_FILE = "table"
TABLE_VERSION = 3
HEADER_PAGE_BYTES = 65536
"""One page of the largest size that Linux has on the supported machines."""
WAYS = 8
LOAD_MAX = 0.7
NO_ENTRY = 0xFFFFFFFF
GENERATION_COUNTER_BITS = 40
_MAGIC = b"SMVTABLE"


class SlotState(IntEnum):
    """What a slot's offset may be used for."""

    UNUSED = 0
    RESERVED = 1
    """A client may be writing into it. If it never ends, the range is retired for good."""
    COMMITTED = 2
    """Whole and visible."""
    QUARANTINED = 3
    """Freed a moment ago; a late reader may still look at it."""


HEADER = np.dtype(
    [
        ("magic", "S8"),
        ("version", "<u4"),
        ("page_bytes", "<u4"),
        ("store_id", "V16"),
        ("boot_id", "V16"),
        ("incarnation", "<u8"),
        ("slots", "<u8"),
        ("buckets", "<u8"),
        ("capacity_bytes", "<u8"),
        ("frontier", "<u8"),
        ("sealed", "<u8"),
    ]
)
SLOT = np.dtype(
    [
        ("generation", "<u8"),
        ("offset", "<u8"),
        ("span", "<u8"),
        ("expires_ms", "<u8"),
        ("stamp", "<u8"),
        ("size_bytes", "<u4"),
        ("length", "<u4"),
        ("entry", "<u4"),
        ("depth", "<u4"),
        ("tokens", "<u2"),
        ("state", "u1"),
        ("cell", "u1"),
        ("ttl_s", "<u4"),
    ]
)
ENTRY = np.dtype(
    [
        ("key", "<u8", 4),
        ("generation", "<u8"),
        ("header_digest", "<u8"),
        ("slot", "<u4"),
        ("length", "<u4"),
        ("cell", "<u4"),
        ("fold", "<u4"),
    ]
)
RANGE = np.dtype([("start", "<u8"), ("stop", "<u8")])
TAG_BYTES = 8
assert SLOT.itemsize == 64
assert ENTRY.itemsize == 64

# Powers of an odd number: small numbers in two words have no small common multiple under them.
_FOLD = np.cumprod(np.full(15, 0x9E3779B1, np.uint32), dtype=np.uint32)
_MIX = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F))

Cells = npt.NDArray[np.uint8]
Slots = npt.NDArray[np.uint32]
Generations = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Found:
    """Answers of a look-up, one row per (key, cell). Rows that are not ``held`` mean nothing."""

    held: npt.NDArray[np.bool_]
    slots: Slots
    generations: Generations
    offsets: npt.NDArray[np.uint64]
    lengths: npt.NDArray[np.uint32]
    header_digests: npt.NDArray[np.uint64]

    @classmethod
    def nothing(cls, rows: int) -> "Found":
        """An answer in which no cell is held, with room for one in which some are."""
        return cls(
            held=np.zeros(rows, np.bool_),
            slots=np.zeros(rows, np.uint32),
            generations=np.zeros(rows, np.uint64),
            offsets=np.zeros(rows, np.uint64),
            lengths=np.zeros(rows, np.uint32),
            header_digests=np.zeros(rows, np.uint64),
        )


class KeyTable:
    """A mapped table. ``find`` and the readings are for everybody, the rest for its node."""

    def __init__(self, mapped: Mapped) -> None:
        header = mapped[: HEADER.itemsize].view(HEADER)
        self.header = header[0]
        self._seal = header["sealed"]
        slots, buckets = int(self.header["slots"]), int(self.header["buckets"])
        tags_start = HEADER_PAGE_BYTES + slots * SLOT.itemsize
        entries_start = tags_start + buckets * WAYS * TAG_BYTES
        stop = entries_start + buckets * WAYS * ENTRY.itemsize
        # Rows of eight words are gathered far faster than the same bytes as structures.
        self._slot_words = mapped[HEADER_PAGE_BYTES:tags_start].view("<u8").reshape(slots, 8)
        self._entry_words = mapped[entries_start:stop].view("<u8").reshape(buckets * WAYS, 8)
        self.slots = mapped[HEADER_PAGE_BYTES:tags_start].view(SLOT)
        self._tags = mapped[tags_start:entries_start].view("<u8").reshape(buckets, WAYS)
        self.entries = mapped[entries_start:stop].view(ENTRY)
        self.retired = mapped[stop : _size_bytes(slots, buckets)].view(RANGE)
        self._bucket_count = np.uint64(buckets)
        native = probe.is_native()
        self._probe = probe.NativeProbe(self._tags, self.entries, self.slots) if native else None

    @classmethod
    def create(
        cls, fs: FileSystem, folder: Path, slots: int, capacity_bytes: int, incarnation: int
    ) -> "KeyTable":
        """Make an empty table for ``slots`` slots."""
        path = folder / TABLE_FILE
        buckets = int(slots / LOAD_MAX / WAYS) + 1
        size = _size_bytes(slots, buckets)
        fs.create(path, size)
        fs.allocate(path, 0, size)
        mapped = fs.map(path, writable=True)
        header = mapped[: HEADER.itemsize].view(HEADER)
        header["version"] = TABLE_VERSION
        header["page_bytes"] = fs.page_bytes
        header["store_id"] = np.void(fs.entropy(16))
        header["boot_id"] = np.void(fs.boot_id())
        header["incarnation"] = incarnation
        header["slots"] = slots
        header["buckets"] = buckets
        header["capacity_bytes"] = capacity_bytes
        header["frontier"] = capacity_bytes
        header["magic"] = _MAGIC
        return cls(mapped)

    @classmethod
    def map(cls, fs: FileSystem, folder: Path, writable: bool = False) -> "KeyTable":
        """Map a table that its node has made; raises ``StateError`` for anything else."""
        path = folder / TABLE_FILE
        size = fs.size_bytes(path)
        if size is None or size < HEADER_PAGE_BYTES:
            raise StateError(f"{path} is not a key table: the node has not started, or is gone")
        mapped = fs.map(path, writable)
        header = mapped[: HEADER.itemsize].view(HEADER)[0]
        if bytes(header["magic"]) != _MAGIC:
            raise StateError(f"{path} is not a key table")
        if int(header["version"]) != TABLE_VERSION:
            raise StateError(
                f"{path} has format version {header['version']}, this is version {TABLE_VERSION}: "
                "discard it with `samovar down --purge`"
            )
        slots, buckets = int(header["slots"]), int(header["buckets"])
        expected = _size_bytes(slots, buckets)
        if size != expected or buckets < 1:
            raise StateError(f"{path} is torn: {size} bytes where {expected} were written")
        return cls(mapped)

    @property
    def store_id(self) -> bytes:
        """16 bytes that name this arena and no other."""
        return bytes(self.header["store_id"])

    @property
    def nbytes(self) -> int:
        """Bytes of all sections."""
        return self.slots.nbytes + self._tags.nbytes + self.entries.nbytes + self.retired.nbytes

    @property
    def is_sealed(self) -> bool:
        """Whether nobody may find anything for now."""
        return bool(self._seal[0])

    def set_sealed(self, sealed: bool) -> None:
        """Seal the table, or open it again: for everybody who has it mapped, at once."""
        self._seal[0] = sealed

    def find(self, keys: Keys, cells: Cells) -> Found:
        """Look up many cells at once. A cell that is being written is not found."""
        return Found.nothing(len(keys)) if self._seal[0] else self.find_sealed(keys, cells)

    def find_living(self, keys: Keys, cells: Cells, wall_ms: int) -> Found:
        """``find`` of what has not expired."""
        found = self.find(keys, cells)
        found.held[:] &= ~self.expired(found.slots, wall_ms)
        return found

    def find_sealed(self, keys: Keys, cells: Cells) -> Found:
        """``find`` for the node itself: sealed or not."""
        if self._probe is None:
            return self.find_in_numpy(keys, cells)
        found = Found.nothing(len(keys))
        self._probe.find(keys, cells, found)
        return found

    def slots_of(self, keys: Keys) -> Slots:
        """The slots of all cells of these blocks, sealed or not."""
        cells = np.tile(np.arange(CELLS_MAX, dtype=np.uint8), len(keys))
        found = self.find_sealed(np.repeat(keys, CELLS_MAX, axis=0), cells)
        return np.unique(found.slots[found.held])

    def find_in_numpy(self, keys: Keys, cells: Cells) -> Found:
        """``find_sealed`` where nothing was compiled (see ``kvstore.probe``)."""
        held, rows = self._gather(keys, cells)
        held &= (_fold(rows) == rows["fold"]) & (rows["slot"] < len(self.slots))
        slots = np.where(held, rows["slot"], 0).astype(np.uint32)
        records = self._slot_words[slots].view(SLOT)[:, 0]
        held &= records["generation"] == rows["generation"]
        held &= records["state"] == SlotState.COMMITTED
        return Found(
            held, slots, rows["generation"], records["offset"], rows["length"],
            rows["header_digest"],
        )  # fmt: skip

    def expired(self, slots: Slots, wall_ms: int) -> npt.NDArray[np.bool_]:
        """Which of ``slots`` are past their expiry (0 is never)."""
        expires = self.slots["expires_ms"][slots]
        past: npt.NDArray[np.bool_] = (expires != 0) & (expires <= np.uint64(wall_ms))
        return past

    def is_current(self, slot: int, generation: int, state: SlotState) -> bool:
        """Whether a descriptor still means what it meant when it was handed out."""
        if slot >= len(self.slots):
            return False
        record = self.slots[slot]
        return int(record["generation"]) == generation and int(record["state"]) == state

    def insert_all(
        self, keys: Keys, slots: Slots, header_digests: npt.NDArray[np.uint64]
    ) -> npt.NDArray[np.bool_]:
        """Publish slots whose records are complete; ``False`` where both its buckets are full."""
        records = self.slots[slots]
        words, cells = np.ascontiguousarray(keys).view("<u8"), records["cell"]
        rows = np.zeros(len(slots), ENTRY)
        rows["key"], rows["cell"], rows["slot"] = words, cells, slots
        rows["generation"], rows["length"] = records["generation"], records["length"]
        rows["header_digest"] = header_digests
        rows["fold"] = _fold(rows)
        tags, flat = _tags(words, cells), self._tags.reshape(-1)
        buckets = np.stack(buckets_of(words, cells, self._bucket_count), axis=1).astype(np.intp)
        inserted = np.zeros(len(slots), np.bool_)
        left = np.arange(len(slots))
        while len(left):
            free = self._tags[buckets[left]] == 0
            side = free.sum(axis=2).argmax(axis=1)
            free = free[np.arange(len(left)), side]
            left = left[has_room := free.any(axis=1)]
            # One per bucket and round: who comes next sees what is free then.
            chosen, first = np.unique(buckets[left, side[has_room]], return_index=True)
            at = chosen * WAYS + free[has_room][first].argmax(axis=1)
            now = left[first]
            self.slots["entry"][slots[now]] = at
            self.slots["state"][slots[now]] = SlotState.COMMITTED
            self.entries[at] = rows[now]
            flat[at] = tags[now]
            inserted[now] = True
            left = np.delete(left, first)
        return inserted

    def rivals(self, key: bytes, cell: int) -> list[int]:
        """The slots whose entries fill the two buckets where (key, cell) would go."""
        words = np.frombuffer(key, "<u8").reshape(1, -1)
        pair = buckets_of(words, np.array([cell], np.uint8), self._bucket_count)
        rows = [self.entries[int(b[0]) * WAYS : (int(b[0]) + 1) * WAYS] for b in pair]
        return [int(row["slot"]) for bucket in rows for row in bucket if row["generation"]]

    def clear(self, slot: int) -> None:
        """Make a slot's entry invisible."""
        record = self.slots[slot]
        if int(record["entry"]) != NO_ENTRY:
            at = int(record["entry"])
            self._tags[at // WAYS, at % WAYS] = 0
            self.entries[at] = np.zeros((), ENTRY)
            record["entry"] = NO_ENTRY

    def key_of(self, slot: int) -> bytes:
        """The key of a committed slot."""
        return bytes(self.entries[int(self.slots[slot]["entry"])]["key"].tobytes())

    def keys_of(self, slots: Slots) -> Keys:
        """The keys of committed slots, uint8 ``[n, 32]``."""
        packed = self.entries["key"][self.slots["entry"][slots]]
        return np.ascontiguousarray(packed).view(np.uint8).reshape(-1, KEY_BYTES)

    def retired_ranges(self) -> list[tuple[int, int]]:
        """What is never handed out again, as ``(start, stop)``, lowest first."""
        used = self.retired[self.retired["stop"] > self.retired["start"]]
        return sorted(zip(used["start"].tolist(), used["stop"].tolist(), strict=True))

    def entries_are_whole(self, slots: Slots) -> npt.NDArray[np.bool_]:
        """Of which committed slots record and entry agree, for a successor that adopts them."""
        records = self.slots[slots]
        there = records["entry"] < len(self.entries)
        rows = self.entries[np.where(there, records["entry"], 0)]
        whole: npt.NDArray[np.bool_] = there & (rows["slot"] == slots)
        for name in ("generation", "length", "cell"):
            whole &= rows[name] == records[name]
        whole &= _fold(rows) == rows["fold"]
        return whole

    def keep_only(self, slots: Slots) -> None:
        """Clear every entry but those of ``slots``."""
        kept = self.slots["entry"][slots]
        stray = np.ones(len(self.entries), np.bool_)
        stray[kept] = False
        tags = self._tags.reshape(-1)
        tags[stray] = 0
        self.entries[stray] = np.zeros((), ENTRY)
        tags[kept] = _tags(self.entries["key"][kept], self.entries["cell"][kept])

    def _gather(
        self, keys: Keys, cells: Cells
    ) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.void]]:
        """Which cells have an entry, and a copy of each.

        It is the copy that is compared: the table may have another entry there a moment later.
        """
        words = np.ascontiguousarray(keys).view("<u8")
        buckets = np.stack(buckets_of(words, cells, self._bucket_count), axis=1)
        same = self._tags[buckets].reshape(-1, 2 * WAYS) == _tags(words, cells)[:, None]
        way = same.argmax(axis=1)
        bucket = buckets[np.arange(len(keys)), way // WAYS]
        rows = self._entry_words[bucket.astype(np.intp) * WAYS + way % WAYS].view(ENTRY)[:, 0]
        held = same.any(axis=1) & (rows["cell"] == cells) & (rows["key"] == words).all(axis=1)
        return held, rows


def buckets_of(
    words: npt.NDArray[np.uint64], cells: Cells, count: np.uint64
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    """The two of ``count`` buckets that cells may be in, by their keys as uint64 ``[n, 4]``."""
    wide, half = cells.astype(np.uint64), np.uint64(32)
    first, second = words[:, 0] + wide * _MIX[0], words[:, 1] + wide * _MIX[1]
    return ((first >> half) * count) >> half, ((second >> half) * count) >> half


def _size_bytes(slots: int, buckets: int) -> int:
    """Bytes of a whole table. One retired range more than there are slots always suffices."""
    found_by = buckets * WAYS * (TAG_BYTES + ENTRY.itemsize)
    return HEADER_PAGE_BYTES + slots * SLOT.itemsize + found_by + (slots + 1) * RANGE.itemsize


def _tags(words: npt.NDArray[np.uint64], cells: npt.NDArray[np.integer]) -> npt.NDArray[np.uint64]:
    """What an entry is recognised by before it is read; never 0, which is a free way."""
    mixed: npt.NDArray[np.uint64] = words[:, 2] ^ (cells.astype(np.uint64) * _MIX[0])
    return mixed | np.uint64(1)


def _fold(rows: npt.NDArray[np.void]) -> npt.NDArray[np.uint32]:
    """A 32-bit mix of everything in an entry but the fold itself."""
    words = np.ascontiguousarray(rows).view("<u4").reshape(len(rows), 16)
    mixed = (words[:, :15] ^ (words[:, :15] >> np.uint32(15))) * _FOLD
    folded: npt.NDArray[np.uint32] = np.bitwise_xor.reduce(mixed ^ (mixed >> np.uint32(13)), axis=1)
    return folded
