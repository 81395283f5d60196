"""A short tail behind a cached prefix: attention as in plain transformers."""

from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from tests.engine.tiny import other_model, tiny_model
from worker.engines.tail import TAIL_TOKENS_MAX, short_tail

pytestmark = pytest.mark.engine
PREFIX_TOKENS = 70


def logits_of(model: PreTrainedModel, tokens: int, ours: bool) -> torch.Tensor:
    """All logits of ``tokens`` tokens behind a prefix that plain transformers has run."""
    run: Any = model
    ids = torch.randint(0, 300, (1, PREFIX_TOKENS + tokens), generator=torch.manual_seed(1))
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        run(input_ids=ids[:, :PREFIX_TOKENS], past_key_values=cache)
        rest = {"input_ids": ids[:, PREFIX_TOKENS:], "past_key_values": cache}
        with short_tail(model, PREFIX_TOKENS if ours else 0, tokens):
            logits: torch.Tensor = run(**rest).logits
    return logits


@pytest.mark.parametrize("kind", ["llama", "llama-bf16", "qwen3", "gpt2", "deepseek"])
@pytest.mark.parametrize("tokens", [2, 7, 50])
def test_stacked_attention_gives_what_plain_transformers_gives(kind: str, tokens: int) -> None:
    dtype = torch.bfloat16 if kind.endswith("bf16") else torch.float32
    model = tiny_model(dtype) if kind.startswith("llama") else other_model(kind)
    ours, plain = (logits_of(model, tokens, ours=one) for one in (True, False))
    # Some libraries add up in another order where a matrix has more rows.
    torch.testing.assert_close(ours, plain)


def test_stacked_attention_is_what_a_tail_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model, layers = tiny_model(torch.float32), []
    plain = functional.scaled_dot_product_attention

    def spy(query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        layers.append((tuple(query.shape), tuple(key.shape)))
        return plain(query, key, *args, **kwargs)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", spy)
    logits_of(model, 10, ours=True)
    # 4 query heads over 2 KV heads: rows of two heads in one, and keys that nobody repeated.
    assert layers[-3:] == [((1, 2, 20, 16), (1, 2, 80, 16))] * 3


@pytest.mark.parametrize(("cached_tokens", "tokens"), [(0, 20), (70, 1), (70, TAIL_TOKENS_MAX + 1)])
def test_only_short_tails_are_run_otherwise(cached_tokens: int, tokens: int) -> None:
    model = tiny_model(torch.float32)
    with short_tail(model, cached_tokens, tokens):
        assert model.config._attn_implementation == "sdpa"


def test_the_model_is_left_as_it_was_even_by_a_failure() -> None:
    model = tiny_model(torch.float32)

    def fail() -> None:
        with short_tail(model, 70, 20):
            assert model.config._attn_implementation != "sdpa"
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        fail()
    assert model.config._attn_implementation == "sdpa"
