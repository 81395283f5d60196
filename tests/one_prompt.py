"""A prompt of 100 tokens, its namespace, and an engine's rows for it.

Geometry: 3 layers, 4 KV heads in two groups, blocks of 16 tokens, of which it fills six.
"""

import numpy as np
import numpy.typing as npt

from kvstore.cell import Grid
from kvstore.namespace import Namespace

LAYERS, HEADS, ROW_BYTES, BLOCK = 3, 4, 8, 16


class Rows:
    """One prompt's KV, ``[layer][head, token, row]``."""

    def __init__(self, tokens: int, heads: int = HEADS, seed: int | None = None) -> None:
        shape = (LAYERS, heads, tokens, ROW_BYTES)
        random = np.random.default_rng(seed)
        self.kv = (
            np.zeros(shape, np.uint8) if seed is None else random.integers(0, 256, shape, np.uint8)
        )

    def rows(self, layer: int, start: int, stop: int) -> npt.NDArray[np.uint8]:
        view: npt.NDArray[np.uint8] = self.kv[layer][:, start:stop]
        return view


def space(tenant: str = "", weights: str = "w", kv_form: str = "form") -> Namespace:
    grid = Grid((ROW_BYTES,) * LAYERS, HEADS, BLOCK, head_groups=2)
    return Namespace(weights, kv_form, "float32", "gqa", grid, tenant=tenant)


NAMESPACE = space()
PROMPT = list(range(100, 200))
