"""Prompts whose right bytes follow from their number, so that whoever reads them can tell.

Geometry of all these tests: 3 layers of different widths, 2 KV heads, blocks of 16 tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kvstore.cell import Grid
from kvstore.client import Samovar
from kvstore.namespace import Namespace

TOKENS_MAX = 1760
BLOCK_TOKENS = 16
LAYERS = 3
HEADS = 2
ROW_BYTES = (24, 8, 40)
WHOLE = Grid(ROW_BYTES, HEADS, BLOCK_TOKENS)
SPLIT = Grid(ROW_BYTES, HEADS, BLOCK_TOKENS, head_groups=HEADS)
"""Cell h of a block is KV head h."""
HOLE = 0xEE
"""What a reader's rows are full of before it reads."""


def namespace(grid: Grid = WHOLE, tenant: str = "") -> Namespace:
    return Namespace("feed", "test", "uint8", "gqa", grid, tenant=tenant)


def token_ids(number: int, tokens: int) -> npt.NDArray[np.int32]:
    """The first tokens of prompt ``number``."""
    source = np.random.default_rng([1, number])
    return source.integers(0, 50_000, TOKENS_MAX, np.int32)[:tokens]


def right_rows(number: int, tenant: str, layer: int) -> npt.NDArray[np.uint8]:
    """KV of a layer for all of a prompt, ``[heads, tokens, row_bytes]``."""
    source = np.random.default_rng([2, number, layer, *tenant.encode()])
    return source.integers(0, 256, (HEADS, TOKENS_MAX, ROW_BYTES[layer]), np.uint8)


@dataclass
class Rows:
    """One reader's or writer's KV; ``before`` is called before rows are shown."""

    arrays: list[npt.NDArray[np.uint8]]
    before: Callable[[], None] = field(default=lambda: None)

    @classmethod
    def of(cls, number: int, tenant: str, heads: slice) -> "Rows":
        return cls([right_rows(number, tenant, layer)[heads] for layer in range(LAYERS)])

    def emptied(self) -> "Rows":
        return Rows([np.full_like(array, HOLE) for array in self.arrays])

    def rows(self, layer: int, start: int, stop: int) -> npt.NDArray[np.uint8]:
        self.before()
        return self.arrays[layer][:, start:stop]

    def same(self, other: "Rows", tokens: int) -> bool:
        """Whether the first ``tokens`` tokens are the same in both."""
        return all(
            np.array_equal(mine[:, :tokens], theirs[:, :tokens])
            for mine, theirs in zip(self.arrays, other.arrays, strict=True)
        )


def right(number: int) -> Rows:
    """A prompt's rows, all heads, of nobody's."""
    return Rows.of(number, "", slice(None))


def fetched(client: Samovar, number: int, tokens: int, deadline_s: float | None = None) -> int:
    """How many of a prompt's first tokens can be read; their bytes are right."""
    rows = right(number).emptied()
    plan = client.longest_prefix(namespace(), token_ids(number, tokens + 1))
    found = client.get_into(plan, rows, deadline_s).tokens
    assert rows.same(right(number), found)
    return found
