"""Layouts, grids and KV forms from model configurations, and what is refused."""

from dataclasses import dataclass, field
from typing import Any

import pytest

from kvstore.errors import UsageError
from worker.geometry import (
    Attention,
    default_head_groups,
    grid_of,
    kv_form_of,
    layout_of,
    namespace_of,
)


@dataclass
class Config:
    """A model's configuration as plain fields."""

    changes: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        fields = {
            "model_type": "llama",
            "num_hidden_layers": 3,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "hidden_size": 64,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        }
        return fields | self.changes


@pytest.mark.parametrize(
    ("dtype", "row_bytes"),
    [("float32", 64), ("float16", 32), ("bfloat16", 32), ("fp8_e4m3", 16), ("fp8_e5m2", 16)],
)
def test_grouped_heads_have_a_row_of_k_then_v_each(dtype: str, row_bytes: int) -> None:
    layout = layout_of(Config(), dtype)
    assert (layout.attention, layout.kv_heads, layout.k_width) == (Attention.GQA, 4, 8)
    assert layout.row_bytes == row_bytes
    assert layout.layers == 3


def test_as_many_kv_heads_as_heads_is_mha() -> None:
    layout = layout_of(Config({"num_key_value_heads": None}), "float32")
    assert (layout.attention, layout.kv_heads) == (Attention.MHA, 8)


def test_latent_attention_has_one_head_of_latent_and_rotary_key() -> None:
    layout = layout_of(Config({"kv_lora_rank": 512, "qk_rope_head_dim": 64}), "bfloat16")
    assert (layout.attention, layout.kv_heads) == (Attention.MLA, 1)
    assert layout.row_bytes == (512 + 64) * 2


def test_gpt2_names_are_understood() -> None:
    names = {"num_hidden_layers": None, "num_attention_heads": None, "hidden_size": None}
    old = {"n_layer": 2, "n_head": 4, "n_embd": 32, "rope_parameters": None}
    layout = layout_of(Config(names | old | {"num_key_value_heads": None}), "float32")
    assert (layout.layers, layout.kv_heads, layout.k_width) == (2, 4, 8)


@pytest.mark.parametrize(
    ("kv_heads", "groups"), [(1, 1), (2, 2), (3, 1), (4, 4), (6, 2), (8, 8), (32, 8), (40, 8)]
)
def test_head_groups_are_a_power_of_two_and_at_most_eight(kv_heads: int, groups: int) -> None:
    assert default_head_groups(kv_heads) == groups


def test_grid_and_namespace_come_from_the_layout() -> None:
    layout = layout_of(Config(), "float32")
    grid = grid_of(layout, block_tokens=16)
    assert (grid.row_bytes, grid.head_groups, grid.layer_ranges) == ((64, 64, 64), 4, 1)
    namespace = namespace_of(Config(), grid, layout, "w", "torch-sdpa-cpu", tenant="t")
    assert (namespace.attention, namespace.dtype, namespace.tenant) == ("gqa", "float32", "t")


@pytest.mark.parametrize(
    "other",
    [
        {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0},
        {"rope_type": "default", "rope_theta": 500_000.0},
        {"rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0},
    ],
)
def test_forms_differ_with_rope(other: dict[str, Any]) -> None:
    form = kv_form_of(Config(), "torch-sdpa-cpu")
    assert kv_form_of(Config({"rope_parameters": other}), "torch-sdpa-cpu") != form


def test_forms_differ_with_numerics_and_quantisation() -> None:
    forms = {
        kv_form_of(Config(), "torch-sdpa-cpu"),
        kv_form_of(Config(), "torch-sdpa-cuda"),
        kv_form_of(Config(), "torch-sdpa-cpu", quantisation="fp8-static"),
    }
    assert len(forms) == 3


def test_old_and_new_spelling_of_rope_have_one_form() -> None:
    old = {"rope_parameters": None, "rope_theta": 10_000.0, "rope_scaling": None}
    assert kv_form_of(Config(old), "x") == kv_form_of(Config(), "x")
    scaled = {"type": "linear", "factor": 2.0}
    new = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}}
    assert kv_form_of(Config(old | {"rope_scaling": scaled}), "x") == kv_form_of(Config(new), "x")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic RoPE"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "longrope RoPE"),
        ({"rope_parameters": {"rope_type": "novel"}}, "not known to be the same"),
        ({"is_causal": False}, "not causal"),
        ({"use_bidirectional_attention": True}, "not causal"),
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"sliding_window": 4096}, "sliding window"),
        ({"attention_chunk_size": 8192}, "sliding window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
        ({"num_kv_shared_layers": 2}, "differing KV shape"),
        ({"num_hidden_layers": None}, "names no num_hidden_layers"),
    ],
)
def test_refuses_in_one_sentence(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence) as refusal:
        layout_of(Config(changes), "float32")
    assert "\n" not in str(refusal.value)


def test_a_window_that_is_switched_off_is_full_attention() -> None:
    changes = {"sliding_window": 4096, "use_sliding_window": False}
    assert layout_of(Config(changes), "float32").layers == 3


def test_refuses_an_unknown_dtype() -> None:
    with pytest.raises(UsageError, match="int3"):
        layout_of(Config(), "int3")
