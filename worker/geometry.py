"""From a model's configuration to the shape and the form of its KV.

    config ─┬─> Layout: layers, KV heads, widths of K and V ──> Grid ─┐
            └─> kv_form: RoPE, channel basis, quantisation, numerics ─┼─> Namespace
    files ────> weights revision (see worker.weights) ────────────────┘

A row of the canonical payload is one token's K then V of one KV head. Multi-head and grouped-query
attention have a row per KV head; multi-head latent attention (MLA) has one head, whose row is the
compressed latent, then the rotary key.

Refused, because token ids would not determine KV or a prefix would not be enough: RoPE that
depends on the call (dynamic, longrope), non-causal models, encoder-decoders, sliding windows and
chunked attention (until blocks of a window have a hit rule), linear-attention and state-space
layers, layers of differing KV heads, and KV quantised with scales made at run time.

Does not cover: the weights revision (see ``worker.weights``), or whether an engine's own cache
really has this layout (each engine checks that at its start).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

from kvstore.cell import Grid
from kvstore.errors import UsageError
from kvstore.namespace import Namespace

HEAD_GROUPS_MAX = 8
CHANNEL_BASIS = "hf-half-split"
ITEM_BYTES: Mapping[str, int] = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "fp8_e4m3": 1,
    "fp8_e5m2": 1,
}
_ROPE_FIXED = frozenset({"default", "linear", "llama3", "yarn"})
_ROPE_PER_CALL = frozenset({"dynamic", "longrope", "su"})


class ModelConfig(Protocol):
    """The one thing that is asked of an engine's model configuration."""

    def to_dict(self) -> dict[str, Any]:
        """The configuration as the engine runs it, overrides included."""
        ...


class Attention(Enum):
    """What a row belongs to."""

    MHA = "mha"
    GQA = "gqa"
    MLA = "mla"


@dataclass(frozen=True, slots=True)
class Layout:
    """One layer's KV per token: ``kv_heads`` rows of ``k_width + v_width`` elements."""

    attention: Attention
    layers: int
    kv_heads: int
    k_width: int
    v_width: int
    dtype: str

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's K and V of one head."""
        return (self.k_width + self.v_width) * ITEM_BYTES[self.dtype]


def layout_of(config: ModelConfig, dtype: str) -> Layout:
    """The layout of ``config``'s KV in ``dtype``; raises ``UsageError`` if it can't be cached."""
    if dtype not in ITEM_BYTES:
        raise UsageError(f"KV dtype {dtype!r} is unknown: use one of {', '.join(ITEM_BYTES)}")
    fields = config.to_dict()
    refuse_uncacheable(fields)
    layers = _positive(fields, "num_hidden_layers", "n_layer")
    heads = _positive(fields, "num_attention_heads", "n_head")
    if fields.get("kv_lora_rank"):
        rope_width = _positive(fields, "qk_rope_head_dim")
        return Layout(Attention.MLA, layers, 1, int(fields["kv_lora_rank"]), rope_width, dtype)
    kv_heads = int(fields.get("num_key_value_heads") or heads)
    width = int(fields.get("head_dim") or _positive(fields, "hidden_size", "n_embd") // heads)
    kind = Attention.MHA if kv_heads == heads else Attention.GQA
    return Layout(kind, layers, kv_heads, width, width, dtype)


def grid_of(layout: Layout, block_tokens: int, head_groups: int | None = None) -> Grid:
    """The grid of a layout in a tier whose blocks have ``block_tokens``.

    Head groups default to the finest split that suits all TP sizes.
    """
    return Grid(
        row_bytes=(layout.row_bytes,) * layout.layers,
        kv_heads=layout.kv_heads,
        block_tokens=block_tokens,
        head_groups=head_groups or default_head_groups(layout.kv_heads),
    )


def default_head_groups(kv_heads: int) -> int:
    """The largest power of two that divides ``kv_heads``, at most ``HEAD_GROUPS_MAX``."""
    return min(kv_heads & -kv_heads, HEAD_GROUPS_MAX)


def kv_form_of(config: ModelConfig, numerics: str, quantisation: str = "none") -> str:
    """What besides weights and shape decides KV bits, as one readable line.

    ``numerics`` names the engine's family of kernels, such as "torch-sdpa-cpu": two families give
    different bits for equal weights, so they share only under one name.
    """
    fields = config.to_dict()
    refuse_uncacheable(fields)
    rope = json.dumps(_rope(fields), sort_keys=True, separators=(",", ":"))
    return f"rope={rope} basis={CHANNEL_BASIS} quantisation={quantisation} numerics={numerics}"


def namespace_of(
    config: ModelConfig,
    grid: Grid,
    layout: Layout,
    weights: str,
    numerics: str,
    *,
    adapter: str = "",
    tenant: str = "",
) -> Namespace:
    """The namespace of one model as one engine runs it."""
    return Namespace(
        weights=weights,
        kv_form=kv_form_of(config, numerics),
        dtype=layout.dtype,
        attention=layout.attention.value,
        grid=grid,
        adapter=adapter,
        tenant=tenant,
    )


def refuse_uncacheable(fields: Mapping[str, Any]) -> None:
    """Raise ``UsageError`` with one sentence if a prefix of token ids does not determine KV."""
    model = fields.get("model_type") or "this model"
    if fields.get("is_encoder_decoder"):
        raise UsageError(f"{model} is an encoder-decoder: only decoder-only models can be cached")
    if fields.get("is_causal") is False or fields.get("use_bidirectional_attention"):
        raise UsageError(f"{model} is not causal, so a prefix does not determine its KV")
    windowed = fields.get("sliding_window") and fields.get("use_sliding_window") is not False
    if windowed or fields.get("attention_chunk_size"):
        raise UsageError(f"{model} attends within a sliding window, which is not supported yet")
    kinds = set(fields.get("layer_types") or ()) - {"full_attention"}
    if kinds:
        names = ", ".join(sorted(kinds))
        raise UsageError(f"{model} has layers of kind {names}: only full attention is supported")
    if fields.get("per_layer_config") or fields.get("num_kv_shared_layers"):
        raise UsageError(f"{model} has layers of differing KV shape, which is not supported yet")
    kind = str(_rope(fields).get("rope_type", "none"))
    if kind in _ROPE_PER_CALL:
        raise UsageError(
            f"{model} uses {kind} RoPE, whose angles depend on the length of each call: "
            "set a fixed rope_type (default, linear, llama3 or yarn) or run without the tier"
        )
    if kind not in _ROPE_FIXED | {"none"}:
        raise UsageError(f"{model} uses {kind} RoPE, which is not known to be the same every call")


def _rope(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The resolved RoPE type with all its factors; empty for models without RoPE."""
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    resolved = {str(name): value for name, value in rope.items() if value is not None}
    nested = [value for value in resolved.values() if isinstance(value, dict)]
    if nested:
        if any(value != nested[0] for value in nested):
            raise UsageError("layers of one model use differing RoPE, which is not supported yet")
        resolved = dict(nested[0])
    if not resolved and not fields.get("rope_theta"):
        return {}
    resolved["rope_type"] = resolved.get("rope_type") or resolved.pop("type", None) or "default"
    for name in ("rope_theta", "partial_rotary_factor"):
        if fields.get(name) is not None:
            resolved.setdefault(name, fields[name])
    return resolved


def _positive(fields: Mapping[str, Any], *names: str) -> int:
    for name in names:
        value = fields.get(name)
        if isinstance(value, int) and value > 0:
            return value
    raise UsageError(f"the model's configuration names no {' or '.join(names)}")
