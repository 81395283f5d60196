"""Rows: how an engine shows its KV to the tier, as bytes by token position.

Whatever an engine's cache looks like, the tier sees one array per layer and range of tokens,
``[KV heads here, tokens, row_bytes]``, that it may read (put) or write (get) in place. An engine
that runs one rank of a tensor-parallel group shows only its own heads.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kvstore.block import Leaf
from kvstore.cell import Cell, Grid
from kvstore.errors import GeometryError
from kvstore.leaf_table import HEAD_BYTES, START, Leaves, Words

_BYTE = np.dtype(np.uint8)


class KVRows(Protocol):
    """One prompt's KV in host memory."""

    def rows(self, layer: int, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """A view of tokens ``[start, stop)``, uint8 ``[heads, stop - start, row_bytes]``.

        ``layer`` is the model's own number, tokens are positions in the prompt, and may be all that
        is moved: many blocks. Each head's ``[stop - start, row_bytes]`` must be contiguous; heads
        may lie anywhere.
        """
        ...


class CellRows:
    """Cuts one reader's (or writer's) rows into the leaves of its cells. For several threads.

    ``tokens`` is all that will be cut. The engine is asked for that when something is, once per
    layer; one that shows its rows wrongly hears of it there (``GeometryError``).
    """

    def __init__(self, grid: Grid, cells: Sequence[Cell], rows: KVRows, tokens: range) -> None:
        self._grid = grid
        self._rows = rows
        self._tokens = tokens
        self._first_head = min(cell.heads.start for cell in cells)
        self._heads = max(cell.heads.stop for cell in cells) - self._first_head
        self._layers: dict[int, Leaf] = {}
        self._cells: dict[int, _CellRows] = {}

    def leaves(self, cell: Cell, start: int, stop: int) -> Leaves:
        """The leaves of ``cell`` for the block of tokens ``[start, stop)``."""
        first, end = self._tokens.start, self._tokens.stop
        assert first <= start < stop <= end
        rows = self._cells.get(cell.index)
        if rows is None:
            rows = self._cells[cell.index] = self._rows_of(cell)
        return rows.cut(start - first, stop - first)

    def _rows_of(self, cell: Cell) -> "_CellRows":
        heads = slice(cell.heads.start - self._first_head, cell.heads.stop - self._first_head)
        whole = Leaves.of([self._layer(layer)[heads] for layer in cell.layers])
        row_bytes = np.array([self._grid.row_bytes[layer] for layer in cell.layers], np.uint64)
        return _CellRows(whole, row_bytes)

    def _layer(self, layer: int) -> Leaf:
        """All heads and tokens of a layer. Two threads may ask the engine for it at once."""
        view = self._layers.get(layer)
        if view is None:
            view = self._layers[layer] = self._shown(layer)
        return view

    def _shown(self, layer: int) -> Leaf:
        tokens = self._tokens
        view = self._rows.rows(layer, tokens.start, tokens.stop)
        expected = (self._heads, len(tokens), self._grid.row_bytes[layer])
        if view.shape != expected or view.dtype != _BYTE:
            raise GeometryError(
                f"rows of layer {layer}, tokens {tokens.start}:{tokens.stop} must be uint8 "
                f"{list(expected)}, got {view.dtype} {list(view.shape)}"
            )
        return view


@dataclass(frozen=True, slots=True, eq=False)
class _CellRows:
    """One cell's heads of its layers, all tokens of them."""

    whole: Leaves
    row_bytes: Words

    def cut(self, start: int, stop: int) -> Leaves:
        places = self.whole.places.copy()
        places[:, START] += start * self.row_bytes
        places[:, HEAD_BYTES] = (stop - start) * self.row_bytes
        return Leaves(places, self.whole.is_writeable, partial(_cut, self.whole, start, stop))


def _cut(whole: Leaves, start: int, stop: int) -> list[Leaf]:
    return [array[:, start:stop] for array in whole]
