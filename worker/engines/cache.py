"""The transformers engine's own KV cache: allocated once, written in place, canonical as it lies.

    one layer's buffer   [1, KV head, capacity, K row | V row]
                                      │          └ K and V are views of one row
                                      └ token positions 0 .. length-1 hold KV, the rest is free

Seen as bytes this is the tier's canonical payload ``[head, token, row]``, so a block is loaded to
and saved from the very memory that attention reads, with no copy between. Nothing is ever
concatenated: a new token's KV is written behind the others, and dropping tokens sets a length.

Works with the cache interface of transformers 4.57 and later, whose ``get_mask_sizes`` was first
given positions and later a count, and whose ``get_max_cache_shape`` became ``get_max_length``.

Does not cover: which tokens the positions hold (see ``worker.engines.transformers``).
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from kvstore.errors import UsageError
from worker.geometry import Layout


class InPlaceLayer(CacheLayerMixin):
    """One layer's KV in a buffer of fixed capacity."""

    keys: torch.Tensor
    values: torch.Tensor

    is_sliding = False
    is_croppable = True

    def __init__(self, layout: Layout, buffer: torch.Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.layout = layout
        self.buffer = buffer
        self.keys = buffer[..., : layout.k_width]
        self.values = buffer[..., layout.k_width :]
        self.length = 0
        self.is_initialized = True

    @property
    def capacity(self) -> int:
        """How many tokens fit."""
        return self.buffer.shape[2]

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing: the buffer was allocated with the cache."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new tokens' KV behind the others; gives views of everything up to there."""
        stop = self.length + key_states.shape[2]
        if stop > self.capacity:
            raise UsageError(f"{stop} tokens do not fit the engine's {self.capacity} tokens of KV")
        self._check(key_states, self.layout.k_width)
        self._check(value_states, self.layout.v_width)
        self.keys[:, :, self.length : stop] = key_states
        self.values[:, :, self.length : stop] = value_states
        self.length = stop
        return self.keys[:, :, :stop], self.values[:, :, :stop]

    def _check(self, states: torch.Tensor, width: int) -> None:
        """Refuse what assignment would broadcast or cast without a word."""
        got = (states.shape[1], states.shape[3], states.dtype)
        expected = (self.layout.kv_heads, width, self.buffer.dtype)
        if got != expected:
            raise UsageError(
                f"the model hands its cache heads, width, dtype {got}, but the cache is made for "
                f"{expected}: give the engine the layout of this very model"
            )

    def get_mask_sizes(self, query: int | torch.Tensor) -> tuple[int, int]:
        """Length and offset of what the next ``query`` tokens (or their positions) attend to."""
        count = query if isinstance(query, int) else query.shape[0]
        return self.length + count, 0

    def get_seq_length(self) -> int:
        """How many tokens have KV."""
        return self.length

    def get_max_length(self) -> int:
        """How many tokens fit."""
        return self.capacity

    def get_max_cache_shape(self) -> int:
        """How many tokens fit, under the name that older transformers know."""
        return self.capacity

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last ``-tokens_to_remove`` tokens, as transformers counts."""
        self.length -= min(abs(tokens_to_remove), self.length)

    def reset(self) -> None:
        """Drop all tokens; the memory stays."""
        self.length = 0


class InPlaceCache(Cache):
    """All layers' KV; also the ``KVRows`` that the tier reads and writes."""

    def __init__(
        self, layout: Layout, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (1, layout.kv_heads, capacity, layout.k_width + layout.v_width)
        # Zeroed by hand: lazily zeroed pages would be faulted in during the first request.
        buffers = [_memory(shape, dtype, device).zero_() for _ in range(layout.layers)]
        self._in_place = [InPlaceLayer(layout, buffer) for buffer in buffers]
        super().__init__(layers=list(self._in_place))
        self.bytes = [buffer[0].view(torch.uint8) for buffer in buffers]
        self._host = [data.numpy() for data in self.bytes] if device.type == "cpu" else []

    def truncate(self, length: int) -> None:
        """Let the first ``length`` positions be what the cache holds, dropped or just loaded."""
        for layer in self._in_place:
            layer.length = length

    def rows(self, layer: int, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """Bytes ``[heads, stop - start, row_bytes]`` of one layer, without copying (host only)."""
        return self._host[layer][:, start:stop]


def _memory(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """On the host it is numpy's, which asks for huge pages: a prompt's rows are all over it."""
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    size_bytes = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.empty(size_bytes, np.uint8)).view(dtype).view(shape)
