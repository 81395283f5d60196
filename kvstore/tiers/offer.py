"""An offer: cells that one writer wants to store, in columns, and what became of each.

Does not cover: where they are stored (``host``), who writes them (``kvstore.sessions``).
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvstore.block import HEADER_BYTES
from kvstore.cell import BLOCK_TOKENS_MAX, CELL_BYTES_MAX, CELLS_MAX
from kvstore.key import KEY_BYTES, Keys, as_keys
from kvstore.table import NO_ENTRY, SLOT, Cells, Generations, Slots, SlotState
from kvstore.tiers.tier import NewCell


@dataclass(frozen=True, slots=True)
class Offer:
    """What a writer says of cells before they are there, one row each; no two are the same."""

    keys: Keys
    cells: Cells
    tokens: npt.NDArray[np.uint32]
    lengths: npt.NDArray[np.uint32]
    depths: npt.NDArray[np.uint32]
    spans: npt.NDArray[np.uint64]
    ttl_s: int
    stamp: int

    @classmethod
    def of(cls, new: NewCell, stamp: int) -> "Offer":
        """A single cell."""
        return cls(
            keys=as_keys(new.key),
            cells=np.array([new.cell], np.uint8),
            tokens=np.array([new.tokens], np.uint32),
            lengths=np.array([new.length], np.uint32),
            depths=np.array([new.depth], np.uint32),
            spans=np.array([new.span], np.uint64),
            ttl_s=new.ttl_s,
            stamp=stamp,
        )

    def are_possible(self) -> npt.NDArray[np.bool_]:
        """Whether there can be such cells."""
        possible: npt.NDArray[np.bool_] = self.keys.any(axis=1) & (self.cells < CELLS_MAX)
        possible &= (self.tokens >= 1) & (self.tokens <= BLOCK_TOKENS_MAX)
        possible &= (self.lengths >= 1) & (self.lengths <= CELL_BYTES_MAX)
        return possible

    def names(self) -> list[tuple[bytes, int]]:
        """Key and cell of each row."""
        packed = self.keys.tobytes()
        starts = range(0, len(packed), KEY_BYTES)
        keys = [packed[start : start + KEY_BYTES] for start in starts]
        return list(zip(keys, self.cells.tolist(), strict=True))

    def rows(self, rows: npt.NDArray[np.intp]) -> "Offer":
        """Some of the cells."""
        return Offer(
            self.keys[rows], self.cells[rows], self.tokens[rows], self.lengths[rows],
            self.depths[rows], self.spans[rows], self.ttl_s, self.stamp,
        )  # fmt: skip

    def size_bytes(self, page_bytes: int) -> npt.NDArray[np.int64]:
        """What each takes of an arena."""
        stored = self.lengths.astype(np.int64) + HEADER_BYTES
        sizes: npt.NDArray[np.int64] = -(-stored // page_bytes) * page_bytes
        return sizes

    def records(
        self, ranges: npt.NDArray[np.void], generations: Generations, wall_ms: int
    ) -> npt.NDArray[np.void]:
        """The records of slots that are reserved for the cells, in these ranges."""
        records = np.zeros(len(self.cells), SLOT)
        records["offset"] = ranges["offset"]
        records["size_bytes"] = ranges["size_bytes"]
        records["generation"] = generations
        records["length"] = self.lengths
        records["entry"] = NO_ENTRY
        records["cell"] = self.cells
        records["tokens"] = self.tokens
        records["depth"] = self.depths
        records["span"] = self.spans
        records["stamp"] = self.stamp
        records["ttl_s"] = self.ttl_s
        records["expires_ms"] = wall_ms + self.ttl_s * 1000 if self.ttl_s else 0
        records["state"] = SlotState.RESERVED
        return records


@dataclass(frozen=True, slots=True)
class Reserved:
    """A slot for each row of an offer that has no ``Refusal``."""

    slots: Slots
    refusals: npt.NDArray[np.uint8]
