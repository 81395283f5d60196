"""Rows: how an engine shows its KV to the tier, as bytes by token position.

Whatever an engine's cache looks like, the tier sees one array per layer and range of tokens,
``[KV heads here, tokens, row_bytes]``, that it may read (put) or write (get) in place. An engine
that runs one rank of a tensor-parallel group shows only its own heads.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kvstore.block import Leaf
from kvstore.cell import Cell, Grid
from kvstore.errors import GeometryError

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

    ``tokens`` is all that will be cut. The engine is asked for that once per layer: a prompt has
    thousands of leaves, and each of them is then a slice and no more.
    """

    def __init__(self, grid: Grid, cells: Sequence[Cell], rows: KVRows, tokens: range) -> None:
        self._grid = grid
        self._rows = rows
        self._tokens = tokens
        self._first_head = min(cell.heads.start for cell in cells)
        self._heads = max(cell.heads.stop for cell in cells) - self._first_head
        self._layers: dict[int, Leaf] = {}

    def leaves(self, cell: Cell, start: int, stop: int) -> tuple[Leaf, ...]:
        """The leaves of ``cell`` for the block of tokens ``[start, stop)``."""
        heads = slice(cell.heads.start - self._first_head, cell.heads.stop - self._first_head)
        tokens = slice(start - self._tokens.start, stop - self._tokens.start)
        return tuple(self._layer(layer)[heads, tokens] for layer in cell.layers)

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
