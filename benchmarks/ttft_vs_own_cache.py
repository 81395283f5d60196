"""Row ``ttft_vs_own_cache``: a warm prompt's first token, beside the engine's own hit.

The own hit is the limit: the same engine goes on with the document that it still has, copies
nothing and runs the same tail. From another node the document has to come over sockets, so plain
ones bring as many bytes in the same rounds: an own hit behind that is the least that it can take.
What a lease for the whole read would cost is measured there as well.
"""

from collections.abc import Iterator
from statistics import median
from unittest import mock

from transformers import PreTrainedModel

from benchmarks.document import OTHER_NODE, TAIL_TOKENS, Document, on_tiers
from benchmarks.engines import model_of
from benchmarks.figure import Budget, Figure, Sense, Skipped, beside_limit
from benchmarks.measure import Pairs, Run, paired
from benchmarks.raw_socket import raw_link
from kvstore import reading
from worker.engines.transformers import layout_for

ROW = "ttft_vs_own_cache"
BUDGET = Budget(Sense.AT_MOST, 1.25)


def measure(run: Run) -> Iterator[Figure | Skipped]:
    """A document of about 4k tokens and a tail of 32."""
    model = model_of(run)

    def beside_own(variant: str, document: Document) -> Figure:
        rounds = run.track(range(run.of(15, 1)), f"warm and own hit, {variant}")
        if variant == OTHER_NODE:
            pairs, least = _beside_sockets(model, document, rounds)
            least += _beside_leases(document, run.track(range(run.of(31, 1)), "with a lease"))
        else:
            pairs, least = paired(document.warm_s, document.own_s, rounds), ""
        beside = (
            f"{pairs.ours_median_s * 1e3:.0f} ms, own hit {pairs.limit_median_s * 1e3:.0f} "
            f"ms{least}; {len(document.tokens)} cached tokens, tail {TAIL_TOKENS}, fp32"
        )
        return beside_limit(ROW, variant, pairs, BUDGET, "x own hit", beside)

    yield from on_tiers(ROW, run, model, beside_own)


def _beside_sockets(
    model: PreTrainedModel, document: Document, rounds: Iterator[int]
) -> tuple[Pairs, str]:
    """The pairs, and what plain sockets took for as many bytes, in words."""
    layout = layout_for(model)
    widths = layout.kv_heads * (layout.k_width + layout.v_width)
    size_bytes = len(document.tokens) * layout.layers * widths * model.dtype.itemsize
    sockets_s: list[float] = []
    with raw_link(size_bytes) as link:

        def own_s() -> float:
            sockets_s.append(link())
            return document.own_s()

        pairs = paired(document.warm_s, own_s, rounds)
    behind = (1 + raw / own for raw, own in zip(sockets_s[1:], pairs.limit_s, strict=True))
    least = f"; behind raw sockets, {median(sockets_s) * 1e3:.0f} ms, it would be"
    return pairs, f"{least} {median(behind):.2f} x"


def _beside_leases(document: Document, rounds: Iterator[int]) -> str:
    """What a warm answer takes longer when all of it is read under a lease, in words."""

    def leased_s() -> float:
        with mock.patch.object(reading, "UNLEASED_BYTES_MAX", 0):
            return document.warm_s()

    pairs = paired(document.warm_s, leased_s, rounds)
    more = median(b - a for a, b in zip(pairs.ours_s, pairs.limit_s, strict=True))
    return f"; {more * 1e3:+.1f} ms if it took a lease"
