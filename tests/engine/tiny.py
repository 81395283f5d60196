"""Tiny random models: small enough to run in milliseconds, the same each time."""

from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
)


def tiny_model(dtype: torch.dtype, **changes: Any) -> PreTrainedModel:
    """A random model, the same each time."""
    torch.manual_seed(7)
    fields: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 300,
        "max_position_embeddings": 512,
    }
    config = LlamaConfig(**(fields | changes))
    made: Any = LlamaForCausalLM(config)
    made.set_attn_implementation("sdpa")
    model: PreTrainedModel = made.to(dtype).eval()
    # Random weights this small give logits almost equal: spread them, so greedy means something.
    with torch.no_grad():
        made.get_input_embeddings().weight.mul_(20)
        made.get_output_embeddings().weight.mul_(20)
    return model


def other_model(kind: str) -> PreTrainedModel:
    """A tiny random model of another architecture: no RoPE, wide heads, or latent attention."""
    torch.manual_seed(7)
    shape: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 300,
        "max_position_embeddings": 512,
    }
    special: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2}
    config: Any
    match kind:
        case "gpt2":
            config = GPT2Config(vocab_size=300, n_embd=64, n_layer=2, n_head=4, **special)
        case "qwen3":
            config = Qwen3Config(**shape, head_dim=32)
        case _:
            config = DeepseekV3Config(
                **(shape | {"num_key_value_heads": 4}),
                moe_intermediate_size=32,
                n_routed_experts=4,
                n_group=2,
                topk_group=1,
                num_experts_per_tok=2,
                kv_lora_rank=16,
                q_lora_rank=24,
                qk_rope_head_dim=8,
                qk_nope_head_dim=16,
                v_head_dim=16,
                first_k_dense_replace=1,
            )
    made: Any = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    model: PreTrainedModel = made.eval()
    return model
