"""What ``same_node_get`` and ``same_node_put`` share: tiers on this host, and their limit.

Every byte is copied and hashed where it was delivered. The limit copies as many bytes in as
many threads and hashes nothing. Variant ``embedded`` is a tier within this process, ``own node`` a
storage node's process whose arena this one maps.
"""

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass

from benchmarks.figure import Budget, Figure, Sense, Skip, Skipped, beside_limit
from benchmarks.measure import Pairs, Run, Timed, paired
from benchmarks.prefix import (
    BLOCK_BYTES,
    COPY_THREADS,
    GRID,
    SLOT_BYTES,
    CopyLimit,
    EngineRows,
    blocks_of,
    prompt_of,
)
from benchmarks.storage_nodes import storage_nodes
from kvstore.client import Samovar
from kvstore.key import Tokens

BUDGET = Budget(Sense.AT_LEAST, 0.6)


@dataclass(frozen=True, slots=True)
class Scene:
    """A tier with room for little more than one prefix, a prompt and its KV."""

    tier: Samovar
    prompt: Tokens
    source: EngineRows

    @property
    def blocks(self) -> int:
        """Blocks of the prefix."""
        return len(self.prompt) // GRID.block_tokens


def measure_on_tiers(
    row: str, run: Run, ours: Callable[[Scene], Timed]
) -> Iterator[Figure | Skipped]:
    """Time what ``ours`` makes of a scene beside the limit, on both kinds of tier."""
    blocks = blocks_of(run.of(512 << 20, 32 << 20))
    arena_bytes = (blocks + 4) * SLOT_BYTES
    prompt, source = prompt_of(blocks), EngineRows(blocks, filled=True)

    def measure(variant: str, tier: Samovar) -> Figure:
        with closing(CopyLimit(blocks * BLOCK_BYTES)) as limit:
            rounds = run.track(range(run.of(11, 2)), f"{row}, {variant}")
            pairs = paired(ours(Scene(tier, prompt, source)), limit, rounds)
        return _figure(row, variant, blocks * BLOCK_BYTES, pairs)

    with Samovar.open(arena_bytes) as tier:
        yield measure("embedded", tier)
    if run.quick:
        yield Skipped(row, "own node", "not in a quick run")
        return
    try:
        with storage_nodes(arena_bytes) as (node,), node.client() as tier:
            yield measure("own node", tier)
    except Skip as reason:
        yield Skipped(row, "own node", str(reason))


def _figure(row: str, variant: str, size_bytes: int, pairs: Pairs) -> Figure:
    ours, limit = size_bytes / pairs.ours_median_s, size_bytes / pairs.limit_median_s
    beside = (
        f"{ours / 1e9:.1f} GB/s, memcpy of {COPY_THREADS} threads {limit / 1e9:.1f} GB/s; "
        f"{size_bytes >> 20} MiB in blocks of {BLOCK_BYTES / 1e6:.2f} MB, every byte "
        f"hashed; CPU x {pairs.cpu_cost:.2f}"
    )
    return beside_limit(row, variant, pairs, BUDGET, "of limit", beside, {"bytes": size_bytes})
