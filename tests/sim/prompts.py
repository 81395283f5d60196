"""What clients ask for, and what they must get: the bytes of a token follow from the tokens so far.

So whoever reads a block can say whether it is right, without having been told who wrote it. The
prompts share prefixes, end inside blocks, and live in two namespaces.
"""

from dataclasses import dataclass
from functools import cached_property
from random import Random

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

from kvstore.cell import Grid
from kvstore.mix import mix64
from kvstore.namespace import Namespace

LAYERS, HEADS, ROW_BYTES, BLOCK_TOKENS = 2, 2, 8, 16
GRID = Grid((ROW_BYTES,) * LAYERS, HEADS, BLOCK_TOKENS, head_groups=2)
NAMESPACES = tuple(
    Namespace("weights", "form", "float32", "gqa", GRID, tenant=tenant) for tenant in ("a", "b")
)
KV = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Prompt:
    """A prompt of one namespace, with the boundaries that clients name."""

    number: int
    namespace: Namespace
    tokens: tuple[int, ...]
    boundaries: tuple[int, ...]

    @cached_property
    def kv(self) -> KV:
        """Its right bytes, uint8 ``[layer, head, token, row]``."""
        data = np.array(self.tokens, "<i4").tobytes()
        salt = int.from_bytes(self.namespace.digest[:8], "little")
        named = [
            xxh3_64_intdigest(data[: 4 * stop], salt) for stop in range(1, len(self.tokens) + 1)
        ]
        places = np.arange(LAYERS * HEADS, dtype=np.uint64).reshape(LAYERS, HEADS, 1)
        words = mix64(np.array(named, np.uint64) ^ (places << np.uint64(32)))
        return np.ascontiguousarray(words).view(np.uint8).reshape(LAYERS, HEADS, -1, ROW_BYTES)


class Rows:
    """An engine's cache, right or still empty. Shows only ``heads``, as a rank does."""

    def __init__(self, kv: KV, heads: slice) -> None:
        self.kv = kv
        self._heads = heads

    @classmethod
    def empty(cls, tokens: int, heads: slice) -> "Rows":
        return cls(np.zeros((LAYERS, HEADS, tokens, ROW_BYTES), np.uint8), heads)

    def rows(self, layer: int, start: int, stop: int) -> KV:
        view: KV = self.kv[layer, self._heads, start:stop]
        return view


def prompts_of(random: Random, count: int) -> list[Prompt]:
    """A family of prompts: each goes on from a prefix of an earlier one, or starts anew."""
    texts: list[tuple[int, ...]] = []
    found = []
    for number in range(count):
        parent = random.choice(texts) if texts and random.random() < 0.7 else ()
        kept = random.randint(0, len(parent))
        more = random.choice([3, 17, 32, 40, 64])
        text = (*parent[:kept], *(random.randrange(1000) for _ in range(more)))[:80]
        texts.append(text)
        boundary = random.randint(1, len(text))
        found.append(Prompt(number, random.choice(NAMESPACES), text, (boundary,)))
    return found
