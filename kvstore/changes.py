"""Changes: what a node has begun and ceased to hold, packed.

A change says that one cell of one block is now held (added) or no longer held. Changes are in
order, and *strict*: a cell is added only when it is not held and removed only when it is. That
makes a digest of all that is held cheap to keep on both sides of a stream:

    held  --change-->  held'         the digest of held' is the digest of held with the changed
    digest --------->  digest'       cell folded in (added and removed alike: XOR undoes itself)

Does not cover: who is told (``kvstore.announce``) and what they remember (``kvstore.directory``).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from kvstore.cell import CELLS_MAX
from kvstore.errors import UsageError
from kvstore.key import KEY_BYTES, Keys

KEY_WORDS = KEY_BYTES // 8

Words = npt.NDArray[np.uint64]
"""Packed keys as four little-endian integers each, uint64 ``[n, 4]``."""
Cells = npt.NDArray[np.uint8]
Spans = npt.NDArray[np.uint64]
Flags = npt.NDArray[np.bool_]
Indexes = npt.NDArray[np.intp]


@dataclass(frozen=True, slots=True, eq=False)
class Changes:
    """``n`` changes in order: keys uint8 ``[n, 32]``, cells uint8, spans uint64, added bool."""

    keys: Keys
    cells: Cells
    spans: Spans
    added: Flags

    def __post_init__(self) -> None:
        count = len(self.keys)
        if self.keys.shape != (count, KEY_BYTES) or self.keys.dtype != np.uint8:
            raise UsageError(f"keys must be uint8 [n, {KEY_BYTES}], got {self.keys.shape}")
        for name, array, kind in (
            ("cells", self.cells, np.uint8),
            ("spans", self.spans, np.uint64),
            ("added", self.added, np.bool_),
        ):
            if array.shape != (count,) or array.dtype != kind:
                raise UsageError(
                    f"{name} of {count} changes must be {np.dtype(kind).name} [{count}], "
                    f"got {array.dtype} {array.shape}"
                )
        if count and int(self.cells.max()) >= CELLS_MAX:
            raise UsageError(f"cell {int(self.cells.max())} is not below {CELLS_MAX}")

    def __len__(self) -> int:
        return len(self.keys)

    @classmethod
    @cache
    def empty(cls) -> "Changes":
        """No changes."""
        return cls(
            np.empty((0, KEY_BYTES), np.uint8),
            np.empty(0, np.uint8),
            np.empty(0, np.uint64),
            np.empty(0, np.bool_),
        )

    @classmethod
    def concat(cls, parts: Sequence["Changes"]) -> "Changes":
        """All of ``parts``, one after the other."""
        if not parts:
            return cls.empty()
        return cls(
            np.concatenate([part.keys for part in parts]),
            np.concatenate([part.cells for part in parts]),
            np.concatenate([part.spans for part in parts]),
            np.concatenate([part.added for part in parts]),
        )

    def select(self, which: Flags | Indexes | slice) -> "Changes":
        """Those of the changes, in order."""
        return Changes(self.keys[which], self.cells[which], self.spans[which], self.added[which])

    def as_removed(self) -> "Changes":
        """The same cells, no longer held."""
        return Changes(self.keys, self.cells, self.spans, np.zeros(len(self), np.bool_))


def as_words(keys: Keys) -> Words:
    """Keys as integers, without copying where the keys are contiguous."""
    return np.ascontiguousarray(keys).view("<u8").reshape(-1, KEY_WORDS)


@dataclass(frozen=True, slots=True)
class Digest:
    """How many cells are held, and the XOR of what names them."""

    cells: int = 0
    fold: bytes = bytes(KEY_BYTES)

    def after(self, words: Words, cells: Cells, added: Flags) -> "Digest":
        """The digest once these cells have been added or removed."""
        if not len(words):
            return self
        gained = 2 * int(np.count_nonzero(added)) - len(added)
        # An odd factor per cell makes a key's cells differ and never maps a word to another's.
        named = words * (2 * cells.astype(np.uint64) + np.uint64(1))[:, None]
        fold = np.frombuffer(self.fold, "<u8") ^ np.bitwise_xor.reduce(named, axis=0)
        return Digest(self.cells + gained, fold.astype("<u8").tobytes())
