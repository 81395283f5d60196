"""One model's two prompts, and what a warm answer to the second must be: the engine's own.

Does not cover: whose tier it is, and where its blocks come from (the tests say).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import torch

from kvstore.client import Samovar
from kvstore.clock import ManualClock, SystemClock
from kvstore.key import Tokens
from kvstore.namespace import Namespace
from tests.engine.tiny import tiny_model
from tests.ray_tier import BLOCK_TOKENS, eventually
from worker.connector import Connector
from worker.engines.answer import Completion
from worker.engines.transformers import TransformersEngine, layout_for, numerics_of
from worker.geometry import grid_of, namespace_of

CAPACITY, PROMPT_TOKENS, NEW_TOKENS = 192, 100, 8
GAP_MIN = 1e-3
# Inside a block, at its end, and just behind it.
BOUNDARIES = (71, 80, 81)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Connecting(Protocol):
    """A tier whose nodes are known by their index."""

    def connect(self, index: int) -> Samovar:
        """A client on the host of a node."""
        ...


class Scene:
    """One model's two prompts, which share their first ``boundary`` tokens."""

    def __init__(self, dtype: str, boundary: int, tenant: str) -> None:
        torch.set_num_threads(1)  # the model is tiny: another one would only wait for the first
        self.model = tiny_model(DTYPES[dtype])
        self.boundary = boundary
        layout = layout_for(self.model)
        self.namespace: Namespace = namespace_of(
            self.model.config,
            grid_of(layout, BLOCK_TOKENS),
            layout,
            "tiny",
            numerics_of(self.model),
            tenant=tenant,
        )
        self.first = np.random.default_rng(3).integers(0, 300, PROMPT_TOKENS).astype(np.int32)
        rest = (self.first[boundary:] + 1) % 300
        self.second: Tokens = np.concatenate([self.first[:boundary], rest])

    @contextmanager
    def engine(self, tier: Connecting, index: int) -> Iterator[TransformersEngine]:
        """An engine on the host of node ``index``."""
        with tier.connect(index) as client, self._engine_of(client) as engine:
            yield engine

    def own_hit(self) -> tuple[Completion, torch.Tensor]:
        """The second prompt, continued in the cache that the first one left."""
        engine = TransformersEngine(self.model, ManualClock(), None, CAPACITY)
        engine.generate(self.first, NEW_TOKENS)
        answer = engine.generate(self.second, NEW_TOKENS)
        assert answer.report.own_tokens == self.boundary
        return answer, engine.prefill_logits

    def cold(self) -> Completion:
        """The second prompt with no cache at all."""
        return TransformersEngine(self.model, ManualClock(), None, CAPACITY).generate(
            self.second, NEW_TOKENS
        )

    def produce(self, tier: Connecting, index: int) -> None:
        with self.engine(tier, index) as producer:
            producer.generate(self.first, NEW_TOKENS, boundaries=[self.boundary])
            producer.flush()

    def assert_warm(self, tier: Connecting, index: int, source: str) -> None:
        """Warm on node ``index`` with all shared tokens from ``source``; the bits of an own hit."""
        with tier.connect(index) as client:
            # The same client as then asks: a first contact may take too long for its answer.
            eventually(lambda: self.found(client) == self.boundary)
            with self._engine_of(client) as reader:
                warm = reader.generate(self.second, NEW_TOKENS, boundaries=[self.boundary])
                logits = reader.prefill_logits
        report = warm.report
        cached = {
            "local": report.local_tokens, "remote": report.remote_tokens, "nvme": report.nvme_tokens
        }  # fmt: skip
        assert cached == dict.fromkeys(cached, 0) | {source: self.boundary}
        assert warm.report.prefilled_tokens == PROMPT_TOKENS - self.boundary
        own, own_logits = self.own_hit()
        assert torch.equal(logits, own_logits)
        assert warm.tokens == own.tokens
        if self.model.dtype == torch.float32:
            assert_same_answer(warm, self.cold())

    def found(self, client: Samovar) -> int:
        plan = client.longest_prefix(self.namespace, self.second, [self.boundary])
        return int(plan.tokens)

    @contextmanager
    def _engine_of(self, client: Samovar) -> Iterator[TransformersEngine]:
        connector = Connector(client, self.namespace, SystemClock())
        engine = TransformersEngine(self.model, ManualClock(), connector, CAPACITY)
        yield engine
        engine.close()
        connector.close()


def assert_same_answer(warm: Completion, cold: Completion) -> None:
    """Equal tokens; a first difference is allowed only where the reference itself hesitates."""
    for at, (ours, theirs) in enumerate(zip(warm.tokens, cold.tokens, strict=True)):
        if ours != theirs:
            print(f"token {at} differs: the reference's top-2 gap is {cold.gaps[at]}")
            assert cold.gaps[at] < GAP_MIN
            return
