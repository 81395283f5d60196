"""A short tail behind a cached prefix on a real GPU: attention in plain transformers' bits."""

from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicCache

from tests.engine.tiny import tiny_model
from worker.engines.tail import TAIL_TOKENS_MAX, short_tail

pytestmark = pytest.mark.engine
if not torch.cuda.is_available():
    pytest.skip("torch finds no GPU", allow_module_level=True)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PREFIX_TOKENS = 1000


def logits_of(model: Any, tokens: int, ours: bool) -> torch.Tensor:
    """All logits of ``tokens`` tokens behind a prefix that plain transformers has run."""
    ids = torch.randint(0, 300, (1, PREFIX_TOKENS + tokens), generator=torch.manual_seed(1)).cuda()
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(input_ids=ids[:, :PREFIX_TOKENS], past_key_values=cache)
        with short_tail(model, PREFIX_TOKENS if ours else 0, tokens):
            logits: torch.Tensor = model(
                input_ids=ids[:, PREFIX_TOKENS:], past_key_values=cache
            ).logits
    return logits


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 128])
@pytest.mark.parametrize("tokens", [2, 7, 32, TAIL_TOKENS_MAX])
def test_stacked_attention_gives_the_bits_of_plain_transformers(
    dtype: str, width: int, tokens: int
) -> None:
    model: Any = tiny_model(DTYPES[dtype], head_dim=width, max_position_embeddings=2048)
    model = model.to("cuda")
    assert torch.equal(logits_of(model, tokens, ours=True), logits_of(model, tokens, ours=False))
