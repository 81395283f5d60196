"""Thousands of small clusters in trouble, each from a seed. See ``tests.sim.world`` for the story.

A failure prints the seed's command line and the last events before it.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.sim.many import run_many
from tests.sim.scheduler import SimulationFailure
from tests.sim.world import World

SEEDS_EACH = 250
FAST_SEEDS = 2_000
SLOW_SEEDS = 6_000
ROOT = Path(__file__).parents[2]

Test = Callable[[range], None]


def over(first: int, stop: int) -> Callable[[Test], Test]:
    """The seeds of a test, some at a time."""

    def mark(test: Test) -> Test:
        ranges = [
            range(seed, min(stop, seed + SEEDS_EACH)) for seed in range(first, stop, SEEDS_EACH)
        ]
        test.seed_ranges = ranges  # type: ignore[attr-defined]
        return test

    return mark


def run(seed: int) -> str:
    """Run a world; the digest of its trace."""
    try:
        return World(seed).run().digest
    except SimulationFailure as failure:
        fail(seed, str(failure))
        raise


def run_all(seeds: range) -> None:
    """Run worlds side by side, a single one right here."""
    if len(seeds) == 1:
        run(seeds[0])
        return
    for failed in run_many(seeds):
        fail(failed.seed, failed.report)


def fail(seed: int, report: str) -> None:
    """Say what happened, and how to see it again."""
    again = f".venv/bin/python -m pytest tests/sim/test_worlds.py --sim-seed={seed}"
    pytest.fail(f"{report}\n\nseed {seed}; again with: {again}", pytrace=False)


@over(0, FAST_SEEDS)
def test_worlds_keep_their_promises(seeds: range) -> None:
    run_all(seeds)


@pytest.mark.slow
@over(FAST_SEEDS, SLOW_SEEDS)
def test_many_worlds_keep_their_promises(seeds: range) -> None:
    run_all(seeds)


DIGESTS = """
import sys
from tests.sim.world import World
for seed in sys.argv[1:]:
    print(World(int(seed)).run().digest)
"""


def test_a_world_follows_from_its_seed() -> None:
    seeds = [3, 5, 8]
    here = [run(seed) for seed in seeds]
    assert len(set(here)) == len(here), "other seeds, other worlds"
    assert here == [run(seed) for seed in seeds]
    for hash_seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", DIGESTS, *map(str, seeds)],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.split() == here
