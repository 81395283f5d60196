"""Row ``nvme_put``: blocks out of the arena to the disk, durable and in the catalog.

The slab is full of older blocks, as in service, so the catalog also loses one for each that comes.
"""

import itertools
from collections.abc import Iterator

from benchmarks.figure import Budget, Figure, Sense, Skipped
from benchmarks.measure import Run, Timed, timed
from benchmarks.nvme import NvmeScene, measure_on_disk

BUDGET = Budget(Sense.AT_LEAST, 0.8)


def measure(run: Run) -> Iterator[Figure | Skipped]:
    """Store blocks of which none is there."""
    yield measure_on_disk("nvme_put", run, "write", BUDGET, _prepare)


def _prepare(scene: NvmeScene) -> Timed:
    names = itertools.count(1, scene.blocks)
    # Until the slab is full, and every slot of it was written once.
    while not scene.tier.stats.evicted:
        scene.store(scene.offers(next(names)))

    def put() -> float:
        spills = scene.offers(next(names))
        return timed(lambda: scene.store(spills))

    return put
