"""Grids: every layer and head in exactly one cell, and masks that say what a rank reads."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.cell import CELLS_MAX, LAYERS_MAX, Grid
from kvstore.errors import GeometryError


@st.composite
def grids(draw: st.DrawFn) -> Grid:
    layers = draw(st.integers(1, 24))
    groups = draw(st.sampled_from([1, 2, 4]))
    return Grid(
        row_bytes=tuple(draw(st.lists(st.integers(1, 64), min_size=layers, max_size=layers))),
        kv_heads=groups * draw(st.integers(1, 3)),
        block_tokens=draw(st.sampled_from([16, 64, 4096])),
        layer_ranges=draw(st.integers(1, min(layers, CELLS_MAX // groups))),
        head_groups=groups,
    )


@settings(max_examples=80, deadline=None, derandomize=True)
@given(grids(), st.integers(1, 4096))
def test_cells_cover_everything_once(grid: Grid, tokens: int) -> None:
    places = [(lay, head) for c in grid.cells for lay in c.layers for head in c.heads]
    assert sorted(places) == [(i, j) for i in range(grid.layers) for j in range(grid.kv_heads)]
    assert [cell.index for cell in grid.cells] == list(range(len(grid.cells)))
    total = sum(grid.cell_bytes(cell.index, tokens) for cell in grid.cells)
    assert total == sum(grid.row_bytes) * grid.kv_heads * tokens
    for cell in grid.cells:
        shapes = [(len(cell.heads), tokens, grid.row_bytes[layer]) for layer in cell.layers]
        assert sum(h * t * r for h, t, r in shapes) == grid.cell_bytes(cell.index, tokens)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(grids())
def test_masks_name_their_cells(grid: Grid) -> None:
    everything = range(grid.layers), range(grid.kv_heads)
    assert grid.mask_for(*everything) == grid.full_mask
    assert grid.masked(grid.full_mask) == grid.cells
    for cell in grid.cells:
        assert grid.mask_for(cell.layers, cell.heads) == 1 << cell.index
        assert grid.masked(1 << cell.index) == (cell,)


def test_ranks_of_every_split_share_the_cells() -> None:
    grid = Grid((64,) * 4, kv_heads=4, block_tokens=64, head_groups=4)
    ranks = [
        [grid.mask_for(range(4), range(r * 4 // tp, (r + 1) * 4 // tp)) for r in range(tp)]
        for tp in (1, 2, 4)
    ]
    assert ranks == [[0b1111], [0b0011, 0b1100], [0b0001, 0b0010, 0b0100, 0b1000]]


@pytest.mark.parametrize(
    ("layers", "heads"),
    [
        (range(4), range(1)),
        (range(4), range(1, 3)),
        (range(1), range(4)),
        (range(1, 3), range(4)),
        (range(0), range(4)),
        (range(4, 8), range(4)),
        (range(8), range(4)),
        (range(4), range(6)),
    ],
)
def test_a_cut_through_a_cell_is_refused(layers: range, heads: range) -> None:
    grid = Grid((64,) * 4, kv_heads=4, block_tokens=64, layer_ranges=2, head_groups=2)
    with pytest.raises(GeometryError, match="cut through a cell"):
        grid.mask_for(layers, heads)


@pytest.mark.parametrize("mask", [0, -1, 0b10000, 1 << 64])
def test_a_mask_outside_the_grid_is_refused(mask: int) -> None:
    grid = Grid((64,) * 4, kv_heads=4, block_tokens=64, head_groups=4)
    with pytest.raises(GeometryError, match="names no cell"):
        grid.masked(mask)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"row_bytes": ()}, "1 to 480 layers"),
        ({"row_bytes": (64,) * (LAYERS_MAX + 1)}, "1 to 480 layers"),
        ({"row_bytes": (64, 0)}, "at least 1 byte"),
        ({"kv_heads": 0}, "kv_heads"),
        ({"block_tokens": 8}, "power of two"),
        ({"block_tokens": 48}, "power of two"),
        ({"block_tokens": 0}, "power of two"),
        ({"block_tokens": -64}, "power of two"),
        ({"block_tokens": 8192}, "power of two"),
        ({"head_groups": 3}, "must divide"),
        ({"head_groups": 0}, "must divide"),
        ({"layer_ranges": 0}, "layer_ranges"),
        ({"layer_ranges": 5}, "layer_ranges"),
        ({"kv_heads": 128, "head_groups": 128}, "more than 64 cells"),
        ({"row_bytes": (1 << 25,)}, "use a smaller block_tokens"),
    ],
)
def test_impossible_grids_are_refused(change: dict[str, int], words: str) -> None:
    fields: dict[str, object] = {"row_bytes": (64,) * 4, "kv_heads": 4, "block_tokens": 64}
    with pytest.raises(GeometryError, match=words):
        Grid(**(fields | change))  # type: ignore[arg-type]
