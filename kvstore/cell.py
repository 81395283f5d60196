"""Cells: the pieces in which a block is stored, fetched, verified and evicted.

A block's canonical payload is one array ``[layer, KV head, token, row]``, where a row is one
token's K then V of one KV head (opaque bytes; for MLA the latent, as a single head). A ``Grid``
cuts it into cells, layer ranges times head groups:

              head group 0   head group 1
    layers  ┌──────────────┬──────────────┐
    0..L/2  │    cell 0    │    cell 1    │   cell payload: [layer][head in group][token][row]
            ├──────────────┼──────────────┤   leaf: one layer of a cell, the unit of a digest
    L/2..L  │    cell 2    │    cell 3    │
            └──────────────┴──────────────┘

The grid is part of a namespace and is fixed at the finest tensor-parallel split that the
namespace allows, so that readers of every coarser split share one cache. A reader says which
cells it wants with a mask: bit ``c`` stands for cell ``c``.

Does not cover: how an engine lays out its own cache (see ``worker``).
"""

from dataclasses import dataclass
from functools import cached_property

from kvstore.errors import GeometryError

CELLS_MAX = 64
LAYERS_MAX = 480
"""Leaf digests of a cell must fit the one header page (see ``kvstore.block``)."""
BLOCK_TOKENS_MIN = 16
BLOCK_TOKENS_MAX = 4096
BLOCK_TOKENS_DEFAULT = 64
CELL_BYTES_MAX = 1 << 30


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell of a grid: its number, the model's layers and the KV heads that it holds."""

    index: int
    layers: range
    heads: range


@dataclass(frozen=True)
class Grid:
    """How the blocks of a namespace are shaped and cut.

    ``row_bytes[layer]`` is the width of K plus V of one token and one KV head, in bytes.
    """

    row_bytes: tuple[int, ...]
    kv_heads: int
    block_tokens: int
    layer_ranges: int = 1
    head_groups: int = 1

    def __post_init__(self) -> None:
        layers = len(self.row_bytes)
        if not 1 <= layers <= LAYERS_MAX:
            raise GeometryError(f"a model needs 1 to {LAYERS_MAX} layers with KV, got {layers}")
        if min(self.row_bytes) < 1:
            raise GeometryError(f"every layer's row must be at least 1 byte: {self.row_bytes}")
        if self.kv_heads < 1:
            raise GeometryError(f"kv_heads must be at least 1, got {self.kv_heads}")
        check_block_tokens(self.block_tokens)
        if self.head_groups < 1 or self.kv_heads % self.head_groups:
            raise GeometryError(
                f"head_groups must divide the {self.kv_heads} KV heads, got {self.head_groups}"
            )
        if not 1 <= self.layer_ranges <= layers:
            raise GeometryError(f"layer_ranges must be 1 to {layers}, got {self.layer_ranges}")
        if self.layer_ranges * self.head_groups > CELLS_MAX:
            raise GeometryError(
                f"{self.layer_ranges} layer ranges x {self.head_groups} head groups are more than "
                f"{CELLS_MAX} cells: use fewer"
            )
        largest = max(self.cell_bytes(cell.index, self.block_tokens) for cell in self.cells)
        if largest > CELL_BYTES_MAX:
            raise GeometryError(
                f"a cell of {largest} bytes is over {CELL_BYTES_MAX}: use a smaller block_tokens "
                "or more head groups"
            )

    @property
    def layers(self) -> int:
        """How many layers hold KV."""
        return len(self.row_bytes)

    @cached_property
    def cells(self) -> tuple[Cell, ...]:
        """All cells, by index: layer range major, head group minor."""
        heads_each = self.kv_heads // self.head_groups
        bounds = [self.layers * i // self.layer_ranges for i in range(self.layer_ranges + 1)]
        return tuple(
            Cell(
                index=r * self.head_groups + g,
                layers=range(bounds[r], bounds[r + 1]),
                heads=range(g * heads_each, (g + 1) * heads_each),
            )
            for r in range(self.layer_ranges)
            for g in range(self.head_groups)
        )

    @property
    def full_mask(self) -> int:
        """The mask of a reader that wants everything."""
        return (1 << len(self.cells)) - 1

    def mask_for(self, layers: range, heads: range) -> int:
        """The cells that make up ``layers`` x ``heads``; refuses a cut through a cell."""
        mask = 0
        covered = 0
        for cell in self.cells:
            inside = _within(cell.layers, layers) and _within(cell.heads, heads)
            if inside:
                mask |= 1 << cell.index
                covered += len(cell.layers) * len(cell.heads)
        if covered == 0 or covered != len(layers) * len(heads):
            raise GeometryError(
                f"layers {layers.start}:{layers.stop} and KV heads {heads.start}:{heads.stop} cut "
                f"through a cell of the {self.layer_ranges} x {self.head_groups} grid"
            )
        return mask

    def masked(self, mask: int) -> tuple[Cell, ...]:
        """The cells of ``mask``, by index."""
        if not 0 < mask <= self.full_mask:
            raise GeometryError(f"mask {mask:#x} names no cell, or one outside the grid")
        return tuple(cell for cell in self.cells if mask >> cell.index & 1)

    def cell_bytes(self, index: int, tokens: int) -> int:
        """Payload bytes of cell ``index`` of a block of ``tokens`` tokens."""
        cell = self.cells[index]
        row_total_bytes = sum(self.row_bytes[cell.layers.start : cell.layers.stop])
        return row_total_bytes * len(cell.heads) * tokens


def _within(inner: range, outer: range) -> bool:
    return outer.start <= inner.start and inner.stop <= outer.stop


def check_block_tokens(block_tokens: int) -> int:
    """The number itself; raises ``GeometryError`` if no block can have that many tokens."""
    power_of_two = block_tokens & (block_tokens - 1) == 0
    if not (power_of_two and BLOCK_TOKENS_MIN <= block_tokens <= BLOCK_TOKENS_MAX):
        raise GeometryError(
            f"block_tokens must be a power of two from {BLOCK_TOKENS_MIN} to "
            f"{BLOCK_TOKENS_MAX}, got {block_tokens}"
        )
    return block_tokens
