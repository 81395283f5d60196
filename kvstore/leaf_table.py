"""Leaves in somebody's memory: where each of them lies.

    an engine's rows   one array for each layer   ──> some tokens of each (``kvstore.rows``)
    a payload          bytes, lengths known       ──> one leaf behind the other

Native code reads the table of places; Python goes through the arrays, which are made only where
somebody does. A prompt has thousands of leaves: what they share is asked of an array once, and the
places of a cell are computed from that together.

Does not cover: moving and hashing them (``kvstore.leaves``).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Self

import numpy as np
import numpy.typing as npt

from kvstore.block import Leaf, payload_leaves
from kvstore.errors import GeometryError

START, HEAD_STRIDE, HEADS, HEAD_BYTES = range(4)
"""What a place is: the address of the first head, how far it is from one head to the next (in
bytes, modulo 2^64), how many there are, and how long each."""
PLACE_WORDS = 4
_U64_MASK = (1 << 64) - 1
_BYTE = np.dtype(np.uint8)

Words = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True, eq=False)
class Leaves:
    """Some leaves, in order. ``view`` makes their arrays, and keeps their memory alive."""

    places: Words
    """``[leaves, PLACE_WORDS]``, never written to."""
    is_writeable: bool
    view: Callable[[], Sequence[Leaf]]

    @classmethod
    def of(cls, arrays: Sequence[Leaf]) -> Self:
        """All of some arrays; raises ``GeometryError`` for what is no leaf."""
        places = np.array([_place(array) for array in arrays], np.uint64)
        is_writeable = all(array.flags.writeable for array in arrays)
        return cls(places.reshape(len(arrays), PLACE_WORDS), is_writeable, lambda: arrays)

    @classmethod
    def packed(cls, payload: npt.NDArray[np.uint8], sizes: Sequence[int]) -> Self:
        """A payload's leaves, of these lengths."""
        assert payload.flags.c_contiguous
        assert sum(sizes) == payload.nbytes, "payload and lengths disagree"
        places = np.zeros((len(sizes), PLACE_WORDS), np.uint64)
        places[:, HEADS] = 1
        places[:, HEAD_BYTES] = sizes
        places[:, START] = payload.ctypes.data + starts(places[:, HEAD_BYTES])
        shapes = [(1, 1, size_bytes) for size_bytes in sizes]
        return cls(places, payload.flags.writeable, partial(payload_leaves, payload, shapes))

    @classmethod
    def joined(cls, several: Sequence[Self]) -> Self:
        """The first one's leaves, then the next one's. There must be one at least."""
        places = np.concatenate([one.places for one in several])
        is_writeable = all(one.is_writeable for one in several)
        return cls(places, is_writeable, lambda: list(chain.from_iterable(several)))

    def __len__(self) -> int:
        return len(self.places)

    def __iter__(self) -> Iterator[Leaf]:
        return iter(self.view())

    def __getitem__(self, part: slice) -> "Leaves":
        return Leaves(self.places[part], self.is_writeable, lambda: self.view()[part])

    @property
    def sizes(self) -> Words:
        """Bytes of each leaf."""
        sizes: Words = self.places[:, HEADS] * self.places[:, HEAD_BYTES]
        return sizes


def starts(sizes: Words) -> Words:
    """Where each begins when they lie one behind the other."""
    behind: Words = sizes.cumsum() - sizes
    return behind


def _place(leaf: Leaf) -> tuple[int, int, int, int]:
    if leaf.ndim != 3 or leaf.dtype != _BYTE or leaf.strides[1:] != (leaf.shape[2], 1):
        raise GeometryError(
            "a leaf must be uint8 [heads, tokens, row_bytes] with each head contiguous, "
            f"got {leaf.dtype} {leaf.shape} with strides {leaf.strides}"
        )
    heads, tokens, row_bytes = leaf.shape
    return leaf.ctypes.data, leaf.strides[0] & _U64_MASK, heads, tokens * row_bytes
