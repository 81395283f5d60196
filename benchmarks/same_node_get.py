"""Row ``same_node_get``: a warm prefix out of the own node's arena into an engine's rows."""

from collections.abc import Iterator

import numpy as np

from benchmarks.figure import Figure, Skip, Skipped
from benchmarks.measure import Run, Timed, timed
from benchmarks.prefix import NAMESPACE, EngineRows
from benchmarks.same_node import Scene, measure_on_tiers


def measure(run: Run) -> Iterator[Figure | Skipped]:
    """Look up and read, into rows whose pages are there."""
    return measure_on_tiers("same_node_get", run, _prepare)


def _prepare(scene: Scene) -> Timed:
    stored = scene.tier.put(NAMESPACE, scene.prompt, scene.source)
    if not stored.complete:
        raise Skip(f"the prefix could not be stored: {dict(stored.reasons)}")
    target = EngineRows(scene.blocks, filled=False)

    def get() -> None:
        plan = scene.tier.longest_prefix(NAMESPACE, scene.prompt)
        got = scene.tier.get_into(plan, target)
        assert got.by_source["local"] == len(scene.prompt) - 1, f"not all came: {got}"

    get()
    assert np.array_equal(scene.source.data, target.data), "other bytes came than were stored"
    return lambda: timed(get)
