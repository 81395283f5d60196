"""Two engines through the embedded tier: real keys, arena, digests and copies."""

from pathlib import Path

import numpy as np
import pytest
import torch

from kvstore.client import Samovar
from kvstore.clock import ManualClock, SystemClock
from tests.engine.tiny import tiny_model
from worker.connector import Connector
from worker.engines.transformers import TransformersEngine, layout_for, numerics_of
from worker.geometry import grid_of, namespace_of

pytestmark = pytest.mark.engine
BLOCK, CAPACITY, PROMPT_TOKENS = 16, 192, 100


# Inside a block, one before its end, at its end, and just behind it.
@pytest.mark.parametrize("boundary", [71, 79, 80, 81])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_warm_logits_equal_an_own_hit_bit_for_bit(
    tmp_path: Path, dtype: torch.dtype, boundary: int
) -> None:
    model = tiny_model(dtype)
    grid = grid_of(layout_for(model), BLOCK)
    namespace = namespace_of(model.config, grid, layout_for(model), "tiny", numerics_of(model))
    prompt = np.random.default_rng(3).integers(0, 300, PROMPT_TOKENS).astype(np.int32)
    second = np.concatenate([prompt[:boundary], (prompt[boundary:] + 1) % 300])
    with Samovar.open(64 << 20, tmp_path, block_tokens=BLOCK) as tier:
        connector = Connector(tier, namespace, SystemClock())
        producer = TransformersEngine(model, ManualClock(), connector, CAPACITY)
        producer.generate(prompt, 4, boundaries=[boundary])
        producer.flush()
        reader = TransformersEngine(model, ManualClock(), connector, CAPACITY)
        warm = reader.generate(second, 8, boundaries=[boundary])
        connector.close()
    alone = TransformersEngine(model, ManualClock(), None, CAPACITY)
    alone.generate(prompt, 4)
    own = alone.generate(second, 8)
    assert warm.report.local_tokens == own.report.own_tokens == boundary
    assert warm.report.prefilled_tokens == PROMPT_TOKENS - boundary
    assert torch.equal(reader.prefill_logits, alone.prefill_logits)
    assert warm.tokens == own.tokens
    for engine in (producer, reader, alone):
        engine.close()
