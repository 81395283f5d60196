"""Row ``nvme_get_cold``: blocks from the disk into the arena, verified; nothing is in a cache."""

from collections.abc import Iterator

from benchmarks.figure import Budget, Figure, Sense, Skipped
from benchmarks.measure import Run, Timed, timed
from benchmarks.nvme import NvmeScene, measure_on_disk

BUDGET = Budget(Sense.AT_LEAST, 0.9)


def measure(run: Run) -> Iterator[Figure | Skipped]:
    """Load blocks that were stored before."""
    yield measure_on_disk("nvme_get_cold", run, "read", BUDGET, _prepare)


def _prepare(scene: NvmeScene) -> Timed:
    scene.store(scene.offers(1))
    return lambda: timed(scene.load_all)
