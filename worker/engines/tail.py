"""Running a short tail behind a long cached prefix: the same model, in the shape that suits it.

A warm request runs a few tokens that attend to thousands. With a mask, grouped-query attention of
plain transformers first copies the whole cached K and V once for every query head of a group. Here
the group's queries are stacked as more rows of their KV head: the same kernel on the same numbers,
and no copy. The sums are the same; where a library adds up a matrix of more rows in another order,
their last bits may not be.

Nothing of the model is changed for longer than one run, and nothing at all for a prompt that is
run from its first token, or for single tokens.

Does not cover: which tokens to run (``worker.engines.transformers``), or where K and V lie
(``worker.engines.cache``).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

TAIL_TOKENS_MAX = 128
"""A longer tail is mostly its own work, and its stacked mask would be large."""
_PLAIN = "sdpa"
_STACKED = "samovar_stacked_sdpa"


@contextmanager
def short_tail(model: PreTrainedModel, cached_tokens: int, tokens: int) -> Iterator[None]:
    """Run the model in here on ``tokens`` tokens that have ``cached_tokens`` before them."""
    if not cached_tokens or not 1 < tokens <= TAIL_TOKENS_MAX:
        yield
        return
    config: Any = model.config
    # Models that choose their attention only once, or are not run with SDPA, keep what they have.
    stacks = model._supports_attention_backend and config._attn_implementation == _PLAIN
    if stacks:
        config._attn_implementation = _STACKED
    try:
        yield
    finally:
        if stacks:
            config._attn_implementation = _PLAIN


def _stacked_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of ``[batch, head, token, width]``, without a copy of K and V per query head."""
    batch, heads, tokens, width = query.shape
    kv_heads = key.shape[1]
    group = heads // kv_heads
    biased = kwargs.get("position_bias") is not None
    if group == 1 or biased or attention_mask is None or attention_mask.shape[1] != 1:
        whole: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **kwargs
        )
        return whole
    stacked = functional.scaled_dot_product_attention(
        query.reshape(batch, kv_heads, group * tokens, width),
        key,
        value,
        attn_mask=attention_mask.repeat(1, 1, group, 1),
        dropout_p=dropout,
        scale=scaling,
    )
    out = stacked.reshape(batch, heads, tokens, value.shape[-1])
    return out.transpose(1, 2).contiguous(), None


def _additive_mask(*args: Any, dtype: torch.dtype, **kwargs: Any) -> torch.Tensor | None:
    """The mask as SDPA's kernel wants it, made once and not again by every layer."""
    allowed = sdpa_mask(*args, dtype=dtype, **kwargs)
    if allowed is None:
        return None
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(
        ~allowed, -torch.inf
    )


AttentionInterface.register(_STACKED, _stacked_attention)
AttentionMaskInterface.register(_STACKED, _additive_mask)
