"""Row ``connector_cold_cost``: what a tier costs a request that finds nothing in it.

    with     look-up, a miss, prefill, first token; KV is offered while the next tokens are made
    without  the same engine with no tier behind it

Counted from token ids to the eighth token, so that a save which slows decoding down is in it. A
round's two requests are the same new prompt. One round scatters by more than what is measured:
there are many, and beside the median stands where it lies with 95 % confidence. The prompts are
of 1k tokens for that, which is the harder case: what the tier does grows with the tokens, and
their prefill with attention grows faster.
"""

import itertools
from collections.abc import Iterator

from benchmarks.engines import engine_for, model_of, prompt_of
from benchmarks.figure import Budget, Figure, Sense, beside_limit
from benchmarks.measure import Run, paired
from kvstore.client import Samovar
from worker.engines.transformers import TransformersEngine

BUDGET = Budget(Sense.AT_MOST, 1.02)
PROMPT_TOKENS = 1024
ROUNDS = 60
NEW_TOKENS = 8
ARENA_BYTES = 1 << 30


def measure(run: Run) -> Iterator[Figure]:
    """A cold prompt of 1k tokens."""
    model = model_of(run)
    count = run.of(PROMPT_TOKENS, PROMPT_TOKENS // 4)
    with (
        Samovar.open(ARENA_BYTES) as tier,
        engine_for(model, tier) as attached,
        engine_for(model, None) as alone,
    ):
        seeds = {attached: itertools.count(1), alone: itertools.count(1)}

        def request(engine: TransformersEngine) -> float:
            engine.forget()
            prompt = prompt_of(model, count, seed=next(seeds[engine]))
            report = engine.generate(prompt, NEW_TOKENS, boundaries=[count]).report
            assert report.cached_tokens == 0, report
            engine.flush()
            return report.total_s

        rounds = run.track(range(run.of(ROUNDS, 1)), "cold requests, with and without a tier")
        pairs = paired(lambda: request(attached), lambda: request(alone), rounds)
    low, high = pairs.cost_interval
    beside = (
        f"{low:.3f} to {high:.3f} at 95 %; {pairs.ours_median_s:.2f} s, without a tier "
        f"{pairs.limit_median_s:.2f} s; {count} tokens, {NEW_TOKENS} new ones, fp32"
    )
    yield beside_limit("connector_cold_cost", "embedded", pairs, BUDGET, "x without", beside)
