"""Engines on a real GPU through the embedded tier: warm answers are the engine's own, bit for bit.

Own and warm run the same kernels on the same bytes, so all logits are equal; cold runs other
shapes, so its rounding differs and greedy tokens are compared where they can't depend on it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from kvstore.client import Samovar
from kvstore.clock import ManualClock, SystemClock
from kvstore.key import Tokens
from tests.engine.tiny import tiny_model
from worker.connector import Connector
from worker.engines.transformers import TransformersEngine, layout_for, numerics_of
from worker.geometry import grid_of, namespace_of

pytestmark = pytest.mark.engine
if not torch.cuda.is_available():
    pytest.skip("torch finds no GPU", allow_module_level=True)

BLOCK, CAPACITY, PROMPT_TOKENS = 16, 256, 100
GAP_MIN = 1e-3
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PROMPT: Tokens = np.random.default_rng(3).integers(0, 300, PROMPT_TOKENS, np.int32)


@contextmanager
def engine(
    tier: Samovar | None, dtype: torch.dtype, device: str = "cuda"
) -> Iterator[TransformersEngine]:
    """The same random model each time, with the tier behind it or alone."""
    made: Any = tiny_model(dtype)
    model: PreTrainedModel = made.to(device)
    layout = layout_for(model)
    grid = grid_of(layout, BLOCK)
    namespace = namespace_of(model.config, grid, layout, "tiny", numerics_of(model))
    connector = None if tier is None else Connector(tier, namespace, SystemClock())
    engine = TransformersEngine(model, ManualClock(), connector, CAPACITY)
    yield engine
    engine.close()
    if connector is not None:
        connector.close()


def branching(at: int) -> Tokens:
    """A prompt that shares just ``at`` first tokens with ``PROMPT``."""
    return np.concatenate([PROMPT[:at], (PROMPT[at:] + 1) % 300]).astype(np.int32)


# Inside a block, one before its end, at its end, and just behind it.
@pytest.mark.parametrize("boundary", [71, 79, 80, 81])
@pytest.mark.parametrize("dtype", DTYPES)
def test_warm_logits_equal_an_own_hit_bit_for_bit(dtype: str, boundary: int) -> None:
    second = branching(boundary)
    with (
        Samovar.open(64 << 20, block_tokens=BLOCK) as tier,
        engine(tier, DTYPES[dtype]) as producer,
        engine(tier, DTYPES[dtype]) as reader,
        engine(None, DTYPES[dtype]) as alone,
    ):
        producer.generate(PROMPT, 4, boundaries=[boundary])
        producer.flush()
        warm = reader.generate(second, 8, boundaries=[boundary])
        alone.generate(PROMPT, 4)
        own = alone.generate(second, 8)
        assert warm.report.local_tokens == own.report.own_tokens == boundary
        assert warm.report.prefilled_tokens == PROMPT_TOKENS - boundary
        assert torch.equal(reader.prefill_logits, alone.prefill_logits)
        assert warm.tokens == own.tokens
        assert warm.gaps == own.gaps, "and so is every later token's"


@pytest.mark.parametrize("boundary", [71, 80])
def test_warm_tokens_equal_a_cold_run(boundary: int) -> None:
    second = branching(boundary)
    with (
        Samovar.open(64 << 20, block_tokens=BLOCK) as tier,
        engine(tier, torch.float32) as producer,
        engine(tier, torch.float32) as reader,
        engine(None, torch.float32) as alone,
    ):
        producer.generate(PROMPT, 1, boundaries=[boundary])
        producer.flush()
        warm = reader.generate(second, 8, boundaries=[boundary])
        cold = alone.generate(second, 8)
    assert min(cold.gaps) > GAP_MIN  # so that greedy tokens must agree
    assert warm.tokens == cold.tokens
    assert cold.report.prefilled_tokens == PROMPT_TOKENS
    assert warm.report.prefilled_tokens == PROMPT_TOKENS - boundary


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_the_tier_has_is_what_its_producer_has(dtype: str) -> None:
    """Requests that go on behind rows that were lifted or landed before, or leave them."""
    longer = np.concatenate([PROMPT, PROMPT[:30]])
    longest = np.concatenate([longer, PROMPT[:45]])
    with (
        Samovar.open(64 << 20, block_tokens=BLOCK) as tier,
        engine(tier, DTYPES[dtype]) as first,
        engine(tier, DTYPES[dtype]) as second,
        engine(tier, DTYPES[dtype]) as reader,
    ):
        asked = [
            (first, PROMPT, 0),
            (first, longer, 0),
            (second, longest, 128),
            (second, branching(20), 0),
            (first, branching(50), 0),
        ]
        for producer, prompt, from_tier in asked:
            assert producer.generate(prompt, 6).report.local_tokens == from_tier
            producer.flush()
            tokens = producer._resident.tokens
            stop = len(tokens) // BLOCK * BLOCK
            empty(reader)
            assert reader.generate(np.append(tokens[:stop], 5), 1).report.local_tokens == stop
            assert all(map(torch.equal, kv(reader, stop), kv(producer, stop)))


def test_a_tier_is_shared_by_no_two_families_of_kernels() -> None:
    blocks = PROMPT_TOKENS // BLOCK * BLOCK
    with (
        Samovar.open(64 << 20, block_tokens=BLOCK) as tier,
        engine(tier, torch.float32) as on_gpu,
        engine(tier, torch.float32, device="cpu") as on_cpu,
    ):
        on_gpu.generate(PROMPT, 1)
        on_gpu.flush()
        assert on_cpu.generate(PROMPT, 1).report.cached_tokens == 0
        on_cpu.flush()
        for each in (on_gpu, on_cpu):
            computed = kv(each, blocks)
            empty(each)
            assert each.generate(PROMPT, 1).report.local_tokens == blocks
            assert all(map(torch.equal, kv(each, blocks), computed))


def kv(engine: TransformersEngine, tokens: int) -> list[torch.Tensor]:
    """A copy of the KV of the engine's first tokens, by layer."""
    return [layer[:, :tokens].clone() for layer in engine._resident.cache.bytes]


def empty(engine: TransformersEngine) -> None:
    """Have the engine hold nothing, and nothing lie in its memory either."""
    engine.forget()
    for layer in engine._resident.cache.bytes:
        layer.zero_()
