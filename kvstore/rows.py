"""Rows: how an engine shows its KV to the tier, as bytes by token position.

Whatever an engine's cache looks like, the tier sees one array per layer and range of tokens,
``[KV heads here, tokens, row_bytes]``, that it may read (put) or write (get) in place. An engine
that runs one rank of a tensor-parallel group shows only its own heads.
"""

from collections.abc import Sequence
from dataclasses import dataclass
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

        ``layer`` is the model's own number, tokens are positions in the prompt. Each head's
        ``[stop - start, row_bytes]`` must be contiguous; heads may lie anywhere.
        """
        ...


class CellRows:
    """Cuts one reader's (or writer's) rows into the leaves of its cells. For several threads."""

    def __init__(self, grid: Grid, cells: Sequence[Cell], rows: KVRows) -> None:
        self._grid = grid
        self._rows = rows
        self._first_head = min(cell.heads.start for cell in cells)
        self._heads = max(cell.heads.stop for cell in cells) - self._first_head
        self._seen = _Block(0, 0, {})

    def leaves(self, cell: Cell, start: int, stop: int) -> tuple[Leaf, ...]:
        """The leaves of ``cell`` for the block of tokens ``[start, stop)``."""
        first = cell.heads.start - self._first_head
        last = cell.heads.stop - self._first_head
        views = self._views(cell.layers, start, stop)
        if last - first == self._heads:
            return tuple(views)
        return tuple(view[first:last] for view in views)

    def _views(self, layers: range, start: int, stop: int) -> list[Leaf]:
        """All heads of some layers. A block's cells are cut one after the other, so the engine is
        asked once for all of its head groups."""
        block = self._seen
        if (block.start, block.stop) != (start, stop):
            block = self._seen = _Block(start, stop, {})
        if layers not in block.views:
            block.views[layers] = [self._layer(layer, start, stop) for layer in layers]
        return block.views[layers]

    def _layer(self, layer: int, start: int, stop: int) -> Leaf:
        view = self._rows.rows(layer, start, stop)
        expected = (self._heads, stop - start, self._grid.row_bytes[layer])
        if view.shape != expected or view.dtype != _BYTE:
            raise GeometryError(
                f"rows of layer {layer}, tokens {start}:{stop} must be uint8 {list(expected)}, "
                f"got {view.dtype} {list(view.shape)}"
            )
        return view


@dataclass(frozen=True, slots=True)
class _Block:
    """What the engine has shown of the block that was asked for last, by layer range."""

    start: int
    stop: int
    views: dict[range, list[Leaf]]
