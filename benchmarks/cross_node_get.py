"""Row ``cross_node_get``: a prefix out of another node's arena, over loopback TCP.

    node 0's process, with its bulk process    holds the prefix; its host identity is not ours
    node 1's process                           our own node; the directory says that node 0 has it
    this process                               a client: look-up, lease, bytes, digests, release

The limit moves as many bytes through as many plain sockets from a process with memory of its own,
and hashes nothing. The peer is Ray's object store between two Ray nodes.
"""

import time
from collections.abc import Iterator

import numpy as np

from benchmarks.figure import Budget, Figure, Sense, Skip, Skipped, beside_limit
from benchmarks.measure import Pairs, Run, Timed, paired, timed
from benchmarks.prefix import (
    BLOCK_BYTES,
    NAMESPACE,
    SLOT_BYTES,
    EngineRows,
    blocks_of,
    prompt_of,
)
from benchmarks.raw_socket import CONNECTIONS, raw_link
from benchmarks.ray_store import ray_peer
from benchmarks.storage_nodes import StorageNode, storage_nodes
from kvstore.client import Samovar
from kvstore.key import Tokens

ROW = "cross_node_get"
SOCKET_BUDGET = Budget(Sense.AT_LEAST, 0.9)
RAY_BUDGET = Budget(Sense.AT_LEAST, 5)
SMALL_ARENA_BYTES = 32 << 20
KNOWN_S = 20.0


def measure(run: Run) -> Iterator[Figure | Skipped]:
    """A prefix that only the other node holds, into warmed rows."""
    blocks = blocks_of(run.of(512 << 20, 32 << 20))
    prompt = prompt_of(blocks)
    with storage_nodes(2 * (blocks + 4) * SLOT_BYTES, SMALL_ARENA_BYTES) as (far, near):
        source = EngineRows(blocks, True)
        _store(far, prompt, source)
        with near.client() as tier:
            _wait_until_known(tier, prompt)
            target = EngineRows(blocks, False)

            def get() -> float:
                return timed(lambda: _get(tier, prompt, target))

            yield _beside_sockets(run, get, blocks)
            assert np.array_equal(source.data, target.data), "other bytes came than were stored"
            if run.quick:
                yield Skipped(ROW, "Ray", "not in a quick run")
                return
            try:
                with ray_peer(blocks, BLOCK_BYTES) as peer:
                    pairs = paired(get, peer, run.track(range(5), "beside Ray's object store"))
            except Skip as reason:
                yield Skipped(ROW, "Ray", str(reason))
                return
    yield _figure("Ray", blocks * BLOCK_BYTES, pairs, "Ray object store, other node", RAY_BUDGET)


def _beside_sockets(run: Run, get: Timed, blocks: int) -> Figure:
    with raw_link(blocks * BLOCK_BYTES) as link:
        pairs = paired(get, link, run.track(range(run.of(11, 2)), "beside raw sockets"))
        peer = f"{CONNECTIONS} raw sockets ({link.pattern})"
    return _figure("raw sockets", blocks * BLOCK_BYTES, pairs, peer, SOCKET_BUDGET)


def _store(node: StorageNode, prompt: Tokens, source: EngineRows) -> None:
    with node.client() as writer:
        stored = writer.put(NAMESPACE, prompt, source)
    if not stored.complete:
        raise Skip(f"the prefix could not be stored: {dict(stored.reasons)}")


def _wait_until_known(tier: Samovar, prompt: Tokens) -> None:
    """The directory hears of new blocks a moment after they were stored."""
    until_s = time.monotonic() + KNOWN_S
    while (found := tier.longest_prefix(NAMESPACE, prompt).tokens) != len(prompt) - 1:
        if time.monotonic() > until_s:
            raise Skip(f"the directory knows {found} of {len(prompt) - 1} tokens")
        time.sleep(0.05)


def _get(tier: Samovar, prompt: Tokens, target: EngineRows) -> None:
    got = tier.get_into(tier.longest_prefix(NAMESPACE, prompt), target)
    assert got.by_source["remote"] == len(prompt) - 1, f"{got} of {len(prompt) - 1} tokens"


def _figure(variant: str, size_bytes: int, pairs: Pairs, peer: str, budget: Budget) -> Figure:
    ours, limit = size_bytes / pairs.ours_median_s, size_bytes / pairs.limit_median_s
    beside = (
        f"{ours / 1e9:.2f} GB/s, {peer} {limit / 1e9:.2f} GB/s; {size_bytes >> 20} MiB in blocks "
        f"of {BLOCK_BYTES / 1e6:.2f} MB, every byte hashed"
    )
    return beside_limit(ROW, variant, pairs, budget, "x", beside, {"bytes": size_bytes})
