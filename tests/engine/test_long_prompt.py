"""A prompt of over 4k tokens, cold, then warm in a fresh engine: what long prompts alone reach.

Of 64 tokens a block, as models have it; every other test of an engine uses short prompts.
"""

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
DOCUMENT_TOKENS, TAIL_TOKENS, NEW_TOKENS, CAPACITY = 4100, 30, 8, 4200
GAP_MIN = 1e-3


def test_a_document_of_4k_tokens_is_warm_in_a_fresh_engine() -> None:
    model = tiny_model(torch.float32, max_position_embeddings=CAPACITY)
    layout = layout_for(model)
    tokens = np.random.default_rng(11).integers(0, 300, DOCUMENT_TOKENS + TAIL_TOKENS, np.int32)
    with Samovar.open(64 << 20) as tier:
        grid = grid_of(layout, tier.block_tokens)
        namespace = namespace_of(model.config, grid, layout, "tiny", numerics_of(model))
        connector = Connector(tier, namespace, SystemClock())
        producer = TransformersEngine(model, ManualClock(), connector, CAPACITY)
        cold = producer.generate(tokens, NEW_TOKENS, boundaries=[DOCUMENT_TOKENS])
        producer.close()
        reader = TransformersEngine(model, ManualClock(), connector, CAPACITY)
        question = (tokens[DOCUMENT_TOKENS:] + 1) % 300
        other = np.concatenate([tokens[:DOCUMENT_TOKENS], question])
        asked = reader.generate(other, 1, boundaries=[DOCUMENT_TOKENS])
        reader.forget()
        warm = reader.generate(tokens, NEW_TOKENS)
        reader.close()
        connector.close()
    assert (cold.report.cached_tokens, cold.report.prefilled_tokens) == (0, len(tokens))
    # To the named boundary, which ends a tail of four tokens, or to the last whole block.
    assert (asked.report.local_tokens, asked.report.prefilled_tokens) == (4100, TAIL_TOKENS)
    assert (warm.report.local_tokens, warm.report.prefilled_tokens) == (4096, 34)
    assert min(cold.gaps) > GAP_MIN  # so that greedy tokens must agree
    assert warm.tokens == cold.tokens
