"""Choosing the next token from a model's logits: greedy or sampled, seeded.

Does not cover: running the model (see ``worker.engines.transformers``).
"""

from dataclasses import dataclass

import torch

from kvstore.errors import UsageError


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to choose. The default is greedy; ``top_k`` 0 and ``top_p`` 1 leave all tokens in."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise UsageError(f"temperature must be 0 (greedy) or more, got {self.temperature}")
        if self.top_k < 0:
            raise UsageError(f"top_k must be 0 (off) or more, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p must be over 0 and at most 1, got {self.top_p}")


GREEDY = Sampling()


@dataclass(frozen=True, slots=True)
class Choice:
    """A chosen token, and how far the likeliest token's logit was over the second's.

    Two runs whose kernels round differently may differ where ``gap`` is tiny, and nowhere else.
    """

    token: int
    gap: float


class Sampler:
    """Chooses tokens for one answer; the same seed and logits give the same tokens."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._generator = torch.Generator().manual_seed(sampling.seed)

    def choose(self, logits: torch.Tensor) -> Choice:
        """The next token for ``logits``, a vector over the vocabulary."""
        scores = logits.float().cpu()
        best = scores.topk(2)
        gap = float(best.values[0] - best.values[1])
        if self._sampling.temperature == 0:
            return Choice(int(best.indices[0]), gap)
        chances = self._filtered(scores / self._sampling.temperature).softmax(-1)
        return Choice(int(torch.multinomial(chances, 1, generator=self._generator)), gap)

    def _filtered(self, scores: torch.Tensor) -> torch.Tensor:
        """``scores`` with what top-k, then top-p leave out set to minus infinity."""
        if 0 < self._sampling.top_k < len(scores):
            least = scores.topk(self._sampling.top_k).values[-1]
            scores = scores.masked_fill(scores < least, -torch.inf)
        if self._sampling.top_p < 1:
            ordered, order = scores.sort(descending=True)
            before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
            scores = scores.clone()
            scores[order[before >= self._sampling.top_p]] = -torch.inf
        return scores
