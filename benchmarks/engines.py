"""The engine of the TTFT rows: SmolLM2-135M in fp32 on the CPU, all cores, with or without a tier.

Prompts are random token ids, since what they mean takes no time. Cold is what somebody without a
tier runs: plain transformers with its own cache and SDPA, same model, same threads, and one greedy
token. All times are from token ids to first token, with the model warmed up.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from benchmarks.measure import Run, timed
from kvstore.client import Samovar
from kvstore.clock import SystemClock
from kvstore.key import Tokens
from kvstore.namespace import Namespace
from worker.connector import Connector
from worker.demo.model import ensure_model
from worker.engines.transformers import TransformersEngine, layout_for, load_model, numerics_of
from worker.geometry import grid_of, namespace_of

CACHE_FOLDER = Path.home() / ".cache" / "samovar"


class ColdReference:
    """Plain transformers, for one prompt at a time."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self.first_token = -1

    def ttft_s(self, prompt: Tokens) -> float:
        """Prefill all of it and choose a token."""
        return timed(lambda: self._first_token(prompt))

    @torch.inference_mode()
    def _first_token(self, prompt: Tokens) -> None:
        output = self._model(
            input_ids=torch.from_numpy(prompt.astype(np.int64)).to(self._model.device)[None],
            past_key_values=DynamicCache(config=self._model.config),
            use_cache=True,
            logits_to_keep=1,
        )
        self.first_token = int(output.logits[0, -1].argmax())


def model_of(run: Run) -> PreTrainedModel:
    """The model, fetched and converted the first time, on as many threads as there are cores."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    disable_progress_bar()
    path = run.model or ensure_model(CACHE_FOLDER, lambda text: None)
    model = load_model(path)
    # The first run of each shape is slower than all others.
    ColdReference(model).ttft_s(prompt_of(model, 256, 0))
    return model


def namespace_for(model: PreTrainedModel, block_tokens: int) -> Namespace:
    """The model's namespace; its weights have a name here, since nobody shares with this tier."""
    layout = layout_for(model)
    grid = grid_of(layout, block_tokens)
    return namespace_of(
        model.config, grid, layout, weights="benchmark", numerics=numerics_of(model)
    )


def prompt_of(model: PreTrainedModel, tokens: int, seed: int) -> Tokens:
    """Random token ids; two seeds differ from the first token on."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, model.config.vocab_size, tokens, np.int32)


@contextmanager
def engine_for(model: PreTrainedModel, tier: Samovar | None) -> Iterator[TransformersEngine]:
    """An engine with the tier behind it, or alone."""
    clock = SystemClock()
    connector = (
        None if tier is None else Connector(tier, namespace_for(model, tier.block_tokens), clock)
    )
    engine = TransformersEngine(model, clock, connector)
    try:
        yield engine
    finally:
        engine.close()
        if connector is not None:
            connector.close()
