"""Row ``lookup_100k``: what finding a long warm prompt costs beside hashing it.

    ours    token ids ──> chain of keys ──> key table ──> plan of 1,562 blocks
    limit   token ids ──> chain of keys, the same hash and nothing else

The blocks are tiny, since a look-up never sees payload, but the prompt's keys and its table are
those of a real one. ``probe`` is the table alone, as large as a node's with 64 GiB, so that it does
not fit the processor's cache.
"""

import struct
from collections.abc import Iterator
from statistics import median

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from benchmarks.figure import Budget, Figure, Sense, beside_limit
from benchmarks.measure import Others, Run, paired, timed
from benchmarks.prefix import VOCABULARY, zeros
from benchmarks.tables import filled_table
from kvstore.cell import Grid
from kvstore.client import Samovar
from kvstore.key import Chain, Tokens
from kvstore.namespace import Namespace

GRID = Grid(row_bytes=(16,), kv_heads=1, block_tokens=64)
NAMESPACE = Namespace("benchmark", "rope=default", "float32", "gqa", GRID)
LOOKUP_BUDGET = Budget(Sense.AT_MOST, 1.25)
PROBE_BUDGET = Budget(Sense.AT_MOST, 0.3)
NODE_SLOTS = 1 << 20
LOOKUPS_PER_ROUND = 10


class OneRow:
    """Rows for a prompt of any length in which every token's KV is the same."""

    def rows(self, layer: int, start: int, stop: int) -> npt.NDArray[np.uint8]:
        return zeros((1, stop - start, GRID.row_bytes[layer]))


def measure(run: Run) -> Iterator[Figure]:
    """A 100k-token prompt that the own node holds."""
    count = run.of(100_000, 10_000)
    prompt = np.random.default_rng(1).integers(0, VOCABULARY, count, np.int32)
    yield _lookup(run, prompt)
    yield _probe(run, Chain.of(NAMESPACE, prompt))


def _lookup(run: Run, prompt: Tokens) -> Figure:
    blocks = len(prompt) // GRID.block_tokens
    with Samovar.open(run.of(256 << 20, 64 << 20)) as tier:
        stored = tier.put(NAMESPACE, prompt, OneRow())
        assert stored.stored == blocks, f"not all was stored: {stored}"

        def look_up() -> None:
            for _ in range(LOOKUPS_PER_ROUND):
                assert tier.longest_prefix(NAMESPACE, prompt).blocks == blocks

        def hash_only() -> None:
            for _ in range(LOOKUPS_PER_ROUND):
                _bare_chain(NAMESPACE.digest, prompt)

        rounds = run.track(range(run.of(31, 3)), "looking up")
        pairs = paired(lambda: timed(look_up), lambda: timed(hash_only), rounds)
    ours_ms = pairs.ours_median_s / LOOKUPS_PER_ROUND * 1e3
    limit_ms = pairs.limit_median_s / LOOKUPS_PER_ROUND * 1e3
    beside = (
        f"{ours_ms:.2f} ms, bare BLAKE3 chain {limit_ms:.2f} ms; {blocks} blocks of "
        f"{GRID.block_tokens} tokens; CPU x {pairs.cpu_cost:.2f}"
    )
    variant = f"{len(prompt)} tokens"
    return beside_limit("lookup_100k", variant, pairs, LOOKUP_BUDGET, "x limit", beside)


def _bare_chain(root: bytes, prompt: Tokens) -> bytes:
    """The least that chained keys cost: one hash per block, in the fastest loop that we found."""
    step = GRID.block_tokens * prompt.itemsize
    data = prompt.tobytes()
    parent = root
    for (block,) in struct.iter_unpack(f"{step}s", data[: len(data) // step * step]):
        parent = blake3(block, key=parent).digest()
    return parent


def _probe(run: Run, chain: Chain) -> Figure:
    slots = run.of(NODE_SLOTS, 1 << 14)
    cells = np.zeros(chain.blocks, np.uint8)
    with filled_table(slots, chain.keys) as table:
        assert table.find(chain.keys, cells).held.all(), "a key that is held was not found"
        others = Others()
        us = [
            timed(lambda: table.find(chain.keys, cells)) / chain.blocks * 1e6
            for _ in run.track(range(run.of(101, 5)), "probing")
        ]
        table_bytes = table.entries.nbytes + table.slots.nbytes
    return Figure(
        row="lookup_100k",
        variant="probe",
        value=median(us),
        unit="us/key",
        beside=f"{chain.blocks} keys at once in a table of {slots} slots, {table_bytes >> 20} MiB",
        budget=PROBE_BUDGET,
        low=min(us),
        high=max(us),
        rounds=len(us),
        others_cores=others.busy_cores(),
    )
