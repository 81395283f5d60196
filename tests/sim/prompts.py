"""What clients ask for, and what they must get: the bytes of a token follow from the tokens so far.

So whoever reads a block can say whether it is right, without having been told who wrote it. The
prompts share prefixes, end inside blocks, and live in two namespaces. No boundary lies within the
first 16 tokens: a shorter tail is found only by prompts that have those in common, too.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from random import Random

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

from kvstore.cell import BLOCK_TOKENS_MIN, Grid
from kvstore.key import Chain
from kvstore.mix import mix64
from kvstore.namespace import Namespace

LAYERS, HEADS, ROW_BYTES, BLOCK_TOKENS = 2, 2, 8, 16
GRID = Grid((ROW_BYTES,) * LAYERS, HEADS, BLOCK_TOKENS, head_groups=2)
NAMESPACES = tuple(
    Namespace("weights", "form", "float32", "gqa", GRID, tenant=tenant) for tenant in ("a", "b")
)
KV = npt.NDArray[np.uint8]
Block = tuple[bytes, int, int]
"""Key, first token and end."""


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

    def edition(self, epoch: int) -> "Prompt":
        """The same text after its tenant was erased so often."""
        return replace(self, namespace=replace(self.namespace, tenant_epoch=epoch))

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """All its blocks, full ones first."""
        chain = Chain.of(self.namespace, self.tokens, self.boundaries)
        spans = [chain.block(index) for index in range(chain.blocks)]
        keys = [bytes(key) for key in chain.keys]
        spans += [chain.tail(boundary) for boundary in chain.tails]
        keys += [bytes(key) for key in chain.tails.values()]
        named = zip(keys, spans, strict=True)
        return tuple((key, span.start, span.stop) for key, span in named)


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
        boundary = random.randint(min(BLOCK_TOKENS_MIN, len(text)), len(text))
        found.append(Prompt(number, random.choice(NAMESPACES), text, (boundary,)))
    return found


def epochs_of(prompts: Iterable[Prompt]) -> dict[bytes, int]:
    """Of which epoch of its tenant each of their blocks is."""
    return {key: prompt.namespace.tenant_epoch for prompt in prompts for key, _, _ in prompt.blocks}


def keys_behind(prompt: Prompt, start: int) -> list[bytes]:
    """The blocks that a put or a delete from ``start`` on is about: full ones and all tails."""
    first = start - start % BLOCK_TOKENS
    return [k for k, begin, end in prompt.blocks if end % BLOCK_TOKENS or begin >= first]


def delivered(prompt: Prompt, stop: int) -> list[bytes]:
    """The blocks that a read up to ``stop`` has certainly read."""
    spans = prompt.blocks
    whole = [key for key, _, end in spans if end <= stop and not end % BLOCK_TOKENS]
    # The last token is never read: the block that ends there is cut by one.
    ends = {stop, len(prompt.tokens)} if stop == len(prompt.tokens) - 1 else {stop}
    last = [key for key, begin, end in spans if begin < stop and end in ends and key not in whole]
    return whole + last if len(last) == 1 else whole
