"""Row ``ttft_warm_vs_cold``: a warm prompt's first token, beside plain transformers.

Cold is not slowed down by anything of ours: its own cache, SDPA, same model and threads.
"""

from collections.abc import Iterator

from benchmarks.document import TAIL_TOKENS, Document, on_tiers
from benchmarks.engines import ColdReference, model_of
from benchmarks.figure import Budget, Figure, Sense, Skipped, beside_limit
from benchmarks.measure import Run, paired

ROW = "ttft_warm_vs_cold"
BUDGET = Budget(Sense.AT_LEAST, 20)


def measure(run: Run) -> Iterator[Figure | Skipped]:
    """A document of about 4k tokens and a tail of 32."""
    model = model_of(run)
    cold = ColdReference(model)

    def beside_cold(variant: str, document: Document) -> Figure:
        rounds = run.track(range(run.of(3, 1)), f"warm and cold, {variant}")
        pairs = paired(document.warm_s, lambda: cold.ttft_s(document.prompt()), rounds)
        beside = (
            f"{pairs.ours_median_s:.3f} s, cold {pairs.limit_median_s:.2f} s; "
            f"{len(document.tokens)} cached tokens, tail {TAIL_TOKENS}, fp32"
        )
        return beside_limit(ROW, variant, pairs, BUDGET, "x faster", beside)

    yield from on_tiers(ROW, run, model, beside_cold)
