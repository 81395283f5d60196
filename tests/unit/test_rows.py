"""Rows: an engine shows its memory once, and every cell's leaves are cut out of it."""

import gc
import weakref

import numpy as np
import numpy.typing as npt
import pytest

from kvstore.cell import Grid
from kvstore.errors import GeometryError
from kvstore.leaf_table import Leaves
from kvstore.rows import CellRows

GRID = Grid(row_bytes=(8, 24, 40), kv_heads=4, block_tokens=16, layer_ranges=2, head_groups=2)
TOKENS = range(32, 96)


class Engine:
    """A cache of 128 tokens, of which ``heads`` are here; remembers what it was asked for."""

    def __init__(self, heads: range = range(4)) -> None:
        random = np.random.default_rng(5)
        self.layers = [
            random.integers(0, 256, (GRID.kv_heads, 128, row), np.uint8) for row in GRID.row_bytes
        ]
        self._heads = slice(heads.start, heads.stop)
        self.asked: list[tuple[int, int, int]] = []

    def rows(self, layer: int, start: int, stop: int) -> npt.NDArray[np.uint8]:
        self.asked.append((layer, start, stop))
        return self.layers[layer][self._heads, start:stop]


@pytest.mark.parametrize("heads", [range(4), range(2), range(2, 4)], ids=str)
def test_leaves_are_a_cells_layers_heads_and_tokens(heads: range) -> None:
    engine = Engine(heads)
    cells = GRID.masked(GRID.mask_for(range(3), heads))
    cut = CellRows(GRID, cells, engine, TOKENS)
    for cell in cells:
        for start, stop in ((32, 48), (48, 64), (80, 95), (32, 96), (50, 51)):
            wanted = [
                engine.layers[layer][cell.heads.start : cell.heads.stop, start:stop]
                for layer in cell.layers
            ]
            leaves = cut.leaves(cell, start, stop)
            assert leaves.places.tolist() == Leaves.of(wanted).places.tolist()
            assert all(np.array_equal(a, b) for a, b in zip(leaves, wanted, strict=True))
            assert all(a.strides == b.strides for a, b in zip(leaves, wanted, strict=True))


def test_the_engine_is_asked_once_for_a_layer_and_not_before_something_is_cut() -> None:
    engine = Engine()
    cut = CellRows(GRID, GRID.cells, engine, TOKENS)
    assert engine.asked == []
    for cell in GRID.cells:
        cut.leaves(cell, 32, 48)
        cut.leaves(cell, 48, 64)
    assert engine.asked == [(layer, TOKENS.start, TOKENS.stop) for layer in range(3)]


@pytest.mark.parametrize(("start", "stop"), [(31, 48), (80, 97), (48, 48)])
def test_nothing_is_cut_outside_of_what_was_shown(start: int, stop: int) -> None:
    cut = CellRows(GRID, GRID.cells, Engine(), TOKENS)
    with pytest.raises(AssertionError):
        cut.leaves(GRID.cells[0], start, stop)


def test_leaves_keep_the_memory_that_they_point_to() -> None:
    engine = Engine()
    memory = [weakref.ref(layer) for layer in engine.layers]
    leaves = CellRows(GRID, GRID.cells, engine, TOKENS).leaves(GRID.cells[0], 32, 48)
    of_cell = len(GRID.cells[0].layers)
    del engine
    gc.collect()
    assert all(layer() is not None for layer in memory[:of_cell])
    del leaves
    gc.collect()
    assert all(layer() is None for layer in memory)


def test_an_engine_that_shows_something_else_hears_of_it() -> None:
    engine = Engine()
    engine.layers[2] = engine.layers[2][:, :90]
    cell = next(cell for cell in GRID.cells if 2 in cell.layers)
    with pytest.raises(GeometryError, match=r"layer 2, tokens 32:96 must be uint8 \[4, 64, 40\]"):
        CellRows(GRID, GRID.cells, engine, TOKENS).leaves(cell, 32, 48)
    engine.layers[2] = np.zeros((4, 256, 40), np.uint8)[:, ::2]
    with pytest.raises(GeometryError, match="each head contiguous"):
        CellRows(GRID, GRID.cells, engine, TOKENS).leaves(cell, 32, 48)
