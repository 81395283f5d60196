"""Row ``ttft_vs_own_cache``: a warm prompt's first token, beside the engine's own hit.

The own hit is the limit: the same engine goes on with the document that it still has, copies
nothing and runs the same tail.
"""

from collections.abc import Iterator

from benchmarks.document import TAIL_TOKENS, Document, on_tiers
from benchmarks.engines import model_of
from benchmarks.figure import Budget, Figure, Sense, Skipped, beside_limit
from benchmarks.measure import Run, paired

ROW = "ttft_vs_own_cache"
BUDGET = Budget(Sense.AT_MOST, 1.25)


def measure(run: Run) -> Iterator[Figure | Skipped]:
    """A document of about 4k tokens and a tail of 32."""
    model = model_of(run)

    def beside_own(variant: str, document: Document) -> Figure:
        rounds = run.track(range(run.of(15, 1)), f"warm and own hit, {variant}")
        pairs = paired(document.warm_s, document.own_s, rounds)
        beside = (
            f"{pairs.ours_median_s * 1e3:.0f} ms, own hit {pairs.limit_median_s * 1e3:.0f} "
            f"ms; {len(document.tokens)} cached tokens, tail {TAIL_TOKENS}, fp32"
        )
        return beside_limit(ROW, variant, pairs, BUDGET, "x own hit", beside)

    yield from on_tiers(ROW, run, model, beside_own)
