"""Row ``same_node_put``: a new prefix out of an engine's rows into the own node's arena.

The arena is full of an older prefix, as in service, so a put evicts block by block.
"""

import itertools
from collections.abc import Iterator

from benchmarks.figure import Figure, Skipped
from benchmarks.measure import Run, Timed, timed
from benchmarks.prefix import fresh_namespace
from benchmarks.same_node import Scene, measure_on_tiers


def measure(run: Run) -> Iterator[Figure | Skipped]:
    """Store a prefix of which nothing is there."""
    return measure_on_tiers("same_node_put", run, _prepare)


def _prepare(scene: Scene) -> Timed:
    numbers = itertools.count()

    def put() -> float:
        namespace = fresh_namespace(next(numbers))

        def work() -> None:
            stored = scene.tier.put(namespace, scene.prompt, scene.source)
            assert stored.stored == scene.blocks, f"not all was stored: {stored}"

        return timed(work)

    return put
