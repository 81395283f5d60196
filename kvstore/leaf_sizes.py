"""How long the leaves of a cell are, found out from their digests.

A header says how many leaves a cell has, and their digests, but not where one ends: engines know
that of their own memory. Who has nothing but the cell, and is to verify it leaf by leaf, looks for
the lengths at which the digests come true. All leaves of a cell have the same number of tokens, so
their lengths are multiples of it; the cells of one model have the same rows, so that what was found
for the first of them goes for all.

Does not cover: who needs that (``kvstore.copying``, ``kvstore.tiers.inspection``).
"""

from collections.abc import Sequence
from enum import Enum, auto

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64

from kvstore.block import Header, leaf_seeds
from kvstore.leaf_table import Leaves
from kvstore.leaves import digests

SHAPES_MAX = 64
"""Shapes that are remembered: models, and their cells, that one node holds."""
STEPS_MAX = 1 << 22
"""Of a search; a cell that needs more can't be measured."""

Sizes = tuple[int, ...]


class Unmeasured(Enum):
    """Why nothing was found."""

    DAMAGED = auto()
    """Whatever the lengths are, some digest does not come true."""
    UNKNOWN = auto()
    """A search would take too long."""


class LeafSizes:
    """Measures cells, and remembers their shapes."""

    def __init__(self) -> None:
        self._rows: dict[tuple[int, int, int], Sizes] = {}
        """By cell, number of leaves and bytes of a token: bytes of a token in each leaf."""

    def of(self, header: Header, payload: npt.NDArray[np.uint8]) -> Sizes | Unmeasured:
        """The lengths of the leaves of a whole cell, or why there are none."""
        leaves, tokens = len(header.leaf_digests), header.tokens
        shape = header.cell, leaves, header.payload_bytes // tokens
        for rows in (self._rows.get(shape), _alike(header)):
            if rows is not None:
                sizes = tuple(row * tokens for row in rows)
                if sum(sizes) == header.payload_bytes and is_whole(header, payload, sizes):
                    self._remember(shape, rows)
                    return sizes
        found = _searched(header, payload)
        if not isinstance(found, Unmeasured):
            self._remember(shape, tuple(size // tokens for size in found))
        return found

    def _remember(self, shape: tuple[int, int, int], rows: Sizes) -> None:
        if shape not in self._rows and len(self._rows) >= SHAPES_MAX:
            self._rows.pop(next(iter(self._rows)))
        self._rows[shape] = rows


def is_whole(header: Header, payload: npt.NDArray[np.uint8], sizes: Sequence[int]) -> bool:
    """Whether leaves of these sizes have the digests that the header says."""
    seeds = leaf_seeds(header.key, header.cell, len(sizes))
    return digests(Leaves.packed(payload, sizes), seeds) == header.leaf_digests


def _alike(header: Header) -> Sizes | None:
    """If all leaves are equally long, as those of most models are."""
    leaves = len(header.leaf_digests)
    row, rest = divmod(header.payload_bytes, leaves * header.tokens)
    return None if rest else (row,) * leaves


def _searched(header: Header, payload: npt.NDArray[np.uint8]) -> Sizes | Unmeasured:
    """Each leaf ends at the first multiple of a token where its digest is right."""
    tokens = header.tokens
    if header.payload_bytes % tokens or header.payload_bytes // tokens > STEPS_MAX:
        return Unmeasured.UNKNOWN
    sizes: list[int] = []
    start = 0
    seeds = leaf_seeds(header.key, header.cell, len(header.leaf_digests)).tolist()
    for seed, digest in zip(seeds, header.leaf_digests, strict=True):
        hasher, stop = xxh3_64(seed=seed), start
        while stop < header.payload_bytes:
            hasher.update(payload[stop : stop + tokens].data)
            stop += tokens
            if hasher.intdigest() == digest:
                break
        else:
            return Unmeasured.DAMAGED
        sizes.append(stop - start)
        start = stop
    return tuple(sizes) if start == header.payload_bytes else Unmeasured.DAMAGED
