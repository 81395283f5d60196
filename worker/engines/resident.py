"""The KV that an engine holds from its last request, and the token ids it belongs to.

    positions  0 ............ length ............ capacity
               [ KV of tokens ][      free      ]

Does not cover: where the KV lies (see ``worker.engines.cache``), and who may write it when: an
engine settles with its connector first.
"""

import numpy as np
import torch

from kvstore.key import Tokens
from worker.cuda_staging import CudaStaging
from worker.engines.cache import InPlaceCache
from worker.geometry import Layout
from worker.staging import HostStaging, Staging


class Resident:
    """One cache, the tokens in it, and its way to host memory."""

    def __init__(
        self, layout: Layout, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._layout = layout
        self._dtype = dtype
        self._device = device
        self._tokens = np.zeros(capacity, np.int32)
        self.cache = self._empty()
        self.staging = self._way()

    def renew(self) -> None:
        """Take fresh host memory, because somebody may still write to the old; nothing is held."""
        if self._device.type == "cpu":
            self.cache = self._empty()
        self.cache.truncate(0)
        self.staging = self._way()

    @property
    def capacity(self) -> int:
        """How many tokens fit."""
        return len(self._tokens)

    @property
    def length(self) -> int:
        """How many tokens have KV here."""
        return self.cache.get_seq_length()

    @property
    def tokens(self) -> Tokens:
        """A copy of the tokens that have KV here."""
        return self._tokens[: self.length].copy()

    def shared(self, prompt: Tokens) -> int:
        """How many first tokens of ``prompt`` have KV here, leaving at least one to run."""
        usable = min(self.length, len(prompt) - 1)
        differing = np.flatnonzero(self._tokens[:usable] != prompt[:usable])
        return int(differing[0]) if len(differing) else usable

    def hold(self, tokens: Tokens) -> None:
        """From now on the cache holds the KV of just these tokens, which somebody put there."""
        self._tokens[: len(tokens)] = tokens
        self.cache.truncate(len(tokens))
        self.staging.rewritten(len(tokens))  # soon, by what is run behind them

    def ran(self, tokens: Tokens) -> None:
        """The model has just written these tokens' KV behind the others."""
        self._tokens[self.length - len(tokens) : self.length] = tokens

    def _empty(self) -> InPlaceCache:
        return InPlaceCache(self._layout, self.capacity, self._dtype, self._device)

    def _way(self) -> Staging:
        """The cache's own way to host memory: on a CPU it lies there already."""
        on_host = self._device.type == "cpu"
        return HostStaging(self.cache) if on_host else CudaStaging(self.cache.bytes)
