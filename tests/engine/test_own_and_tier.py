"""A prompt of which the engine holds the beginning itself and an embedded tier holds more.

0 ........ 96 ... 100 ............ 192 .. 200
[ kept    ][ from the tier         ][ run ]     all is well
[ kept    ][ run                          ]     the tier's blocks are damaged, or gone
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch

from kvstore.access import InProcessNode
from kvstore.block import HEADER_BYTES
from kvstore.client import Samovar
from kvstore.clock import ManualClock, SystemClock
from kvstore.key import Tokens
from kvstore.plan import OWN_NODE, Fetched, Plan
from kvstore.rows import KVRows
from tests.engine.tiny import tiny_model
from worker.connector import Connector
from worker.engines.answer import Report
from worker.engines.transformers import TransformersEngine, layout_for, numerics_of
from worker.geometry import grid_of, namespace_of

pytestmark = pytest.mark.engine
BLOCK, CAPACITY, PROMPT_TOKENS, OWN_TOKENS, NEW_TOKENS = 16, 256, 200, 100, 8
GAP_MIN = 1e-3


class Evicting(Samovar):
    """A tier whose blocks have given way to others between look-up and transfer."""

    def get_into(
        self, plan: Plan, rows: KVRows, deadline_s: float | None = None, start: int = 0
    ) -> Fetched:
        gone = replace(plan, keys=plan.keys ^ np.uint8(1))
        return super().get_into(gone, rows, deadline_s, start)


class Scene:
    """A reader that holds the first tokens of a prompt whose blocks the tier holds."""

    def __init__(self, tier: Samovar) -> None:
        self.model = tiny_model(torch.float32)
        layout = layout_for(self.model)
        numerics = numerics_of(self.model)
        grid = grid_of(layout, BLOCK)
        self.tier = tier
        self.namespace = namespace_of(self.model.config, grid, layout, "tiny", numerics)
        self.prompt: Tokens = np.random.default_rng(5).integers(0, 300, PROMPT_TOKENS, np.int32)

    @contextmanager
    def engine(self) -> Iterator[TransformersEngine]:
        connector = Connector(self.tier, self.namespace, SystemClock())
        engine = TransformersEngine(self.model, ManualClock(), connector, CAPACITY)
        yield engine
        engine.close()
        connector.close()

    def corrupt(self, block: int) -> None:
        """Flip a byte of a block where it lies."""
        plan = self.tier.longest_prefix(self.namespace, self.prompt)
        access = self.tier._routes.access(OWN_NODE)
        assert isinstance(access, InProcessNode)
        tier = access._node.tier
        found = tier.find(plan.keys[block : block + 1], np.zeros(1, np.uint8))
        tier.arena.view(int(found.offsets[0]) + HEADER_BYTES, 1)[:] ^= 0x40

    def report(self, damaged_block: int | None) -> Report:
        """What the whole prompt costs a reader; its tokens are those of a cold run."""
        with self.engine() as reader, self.engine() as producer:
            reader.generate(self.prompt[:OWN_TOKENS], 1)
            reader.flush()
            producer.generate(self.prompt, 1)
            producer.flush()
            if damaged_block is not None:
                self.corrupt(damaged_block)
            answer = reader.generate(self.prompt, NEW_TOKENS)
        alone = TransformersEngine(self.model, ManualClock(), None, CAPACITY)
        cold = alone.generate(self.prompt, NEW_TOKENS)
        alone.close()
        assert min(cold.gaps) > GAP_MIN  # so that greedy tokens must agree
        assert answer.tokens == cold.tokens
        report = answer.report
        assert report.remote_tokens == 0
        assert report.prefilled_tokens == PROMPT_TOKENS - report.cached_tokens
        return report


def test_the_tier_goes_on_where_the_own_tokens_end() -> None:
    with Samovar.open(64 << 20, block_tokens=BLOCK) as tier:
        report = Scene(tier).report(damaged_block=None)
    assert (report.own_tokens, report.local_tokens, report.prefilled_tokens) == (96, 96, 8)


@pytest.mark.parametrize(("damaged_block", "local_tokens"), [(3, 96), (6, 0), (7, 16), (11, 80)])
def test_a_damaged_block_costs_what_is_behind_it_and_no_own_token(
    damaged_block: int, local_tokens: int
) -> None:
    with Samovar.open(64 << 20, block_tokens=BLOCK) as tier:
        report = Scene(tier).report(damaged_block)
    assert (report.own_tokens, report.local_tokens) == (96, local_tokens)


def test_blocks_that_are_gone_cost_no_own_token() -> None:
    with Evicting.open(64 << 20, block_tokens=BLOCK) as tier:
        report = Scene(tier).report(damaged_block=None)
    assert (report.own_tokens, report.local_tokens) == (96, 0)
