"""The prefix that the byte rows move: SmolLM2-135M's KV in fp32, as an engine's cache holds it.

    one layer's buffer  uint8 [3 KV heads, capacity, 512]   a block of 64 tokens: 30 x 3 x 64 x 512
                                                            = 2.9 MB, in pieces of 32 KiB

Memory is touched before anything is timed. The limit is what as many threads as a read
gets copy of as many bytes between two such stretches of memory, without keys, tables or digests.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from benchmarks.measure import timed
from kvstore.cell import Grid
from kvstore.key import Tokens
from kvstore.namespace import Namespace
from kvstore.transport.local import THREADS_MAX
from kvstore.transport.shares import hands

GRID = Grid(row_bytes=(512,) * 30, kv_heads=3, block_tokens=64)
NAMESPACE = Namespace("benchmark", "rope=default", "float32", "gqa", GRID)
BLOCK_BYTES = GRID.cell_bytes(0, GRID.block_tokens)
SLOT_BYTES = BLOCK_BYTES + (1 << 16)
"""What a block takes in an arena at most: its payload, a header page, whole pages."""
PIECE_BYTES = 2 << 20
COPY_THREADS = hands(THREADS_MAX)
VOCABULARY = 49152


def blocks_of(size_bytes: int) -> int:
    """How many whole blocks come nearest to a size from below."""
    return size_bytes // BLOCK_BYTES


def prompt_of(blocks: int) -> Tokens:
    """A prompt of exactly so many blocks, and one token more, which is never cached."""
    count = blocks * GRID.block_tokens + 1
    return np.random.default_rng(blocks).integers(0, VOCABULARY, count, np.int32)


def fresh_namespace(number: int) -> Namespace:
    """The same geometry under other keys: nothing of it is in any tier yet."""
    return replace(NAMESPACE, salt=number.to_bytes(8, "little"))


class EngineRows:
    """A prompt's KV as the transformers engine lays it out: one buffer for each layer."""

    def __init__(self, blocks: int, filled: bool) -> None:
        layers, heads, row = GRID.layers, GRID.kv_heads, GRID.row_bytes[0]
        shape = (layers, heads, blocks * GRID.block_tokens, row)
        self.data = random_bytes(math.prod(shape)).reshape(shape) if filled else zeros(shape)

    def rows(self, layer: int, start: int, stop: int) -> npt.NDArray[np.uint8]:
        view: npt.NDArray[np.uint8] = self.data[layer, :, start:stop]
        return view


def random_bytes(size_bytes: int) -> npt.NDArray[np.uint8]:
    """Bytes that no copy gets for free."""
    words = np.random.default_rng(7).integers(0, 1 << 63, size_bytes // 8 + 1, np.uint64)
    return words.view(np.uint8)[:size_bytes]


def zeros(shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """Memory whose pages are there already."""
    array = np.empty(shape, np.uint8)
    array.fill(1)
    return array


class CopyLimit:
    """Copies ``size_bytes`` between two stretches of memory, in as many threads as a read gets."""

    def __init__(self, size_bytes: int) -> None:
        self._source = random_bytes(size_bytes)
        self._target = zeros((size_bytes,))
        self._threads = ThreadPoolExecutor(COPY_THREADS)

    def __call__(self) -> float:
        return timed(lambda: list(self._threads.map(self._copy, range(COPY_THREADS))))

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown()

    def _copy(self, share: int) -> None:
        step = COPY_THREADS * PIECE_BYTES
        for start in range(share * PIECE_BYTES, len(self._source), step):
            stop = start + PIECE_BYTES
            np.copyto(self._target[start:stop], self._source[start:stop])
