"""Row ``directory_bytes``: what a shard of the directory remembers for each block held.

In a process of its own a shard is told of blocks as nodes tell it, in messages of their usual size.
Counted is by how much the process's own memory grew. ``one holder`` is every block on one node,
``two holders`` the same blocks on two, as replicas are: then an entry counts for each of them. The
tables grow in steps, so several numbers of blocks are measured, and the worst counts.
"""

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

from benchmarks.figure import Budget, Figure, Sense
from benchmarks.measure import Others, Run
from benchmarks.process_memory import own_bytes, trimmed_bytes
from benchmarks.tables import announce
from kvstore.directory import ANNOUNCEMENT_CHANGES_MAX, Directory

BUDGET = Budget(Sense.AT_MOST, 200)
BLOCKS = (100_000, 120_000, 140_000, 170_000)
QUICK_BLOCKS = (20_000,)
WARM_UP_BLOCKS = 2048
"""What is imported and allocated once is no block's."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Of a shard that holds so many entries."""

    entries: int
    process: int
    arrays: int
    freed: int

    @property
    def per_entry(self) -> float:
        return self.process / self.entries


def measure(run: Run) -> Iterator[Figure]:
    """Shards at several fillings of their tables."""
    sizes = QUICK_BLOCKS if run.quick else BLOCKS
    for variant, holders in (("one holder", 1), ("two holders", 2)):
        others = Others()
        told = run.track(range(len(sizes)), f"filling shards, {variant}")
        yield _figure(variant, [_measured(sizes[at], holders) for at in told], others)


def _figure(variant: str, shards: list[Memory], others: Others) -> Figure:
    worst = max(shards, key=lambda memory: memory.per_entry)
    return Figure(
        row="directory_bytes",
        variant=variant,
        value=worst.per_entry,
        unit="bytes/block",
        beside=f"the worst of {len(shards)} fillings, {worst.entries} entries; its arrays "
        f"{worst.arrays / worst.entries:.0f}; freed and kept by malloc "
        f"{worst.freed / worst.entries:.0f} more",
        budget=BUDGET,
        low=min(memory.per_entry for memory in shards),
        high=worst.per_entry,
        rounds=len(shards),
        others_cores=others.busy_cores(),
        details={"entries": worst.entries, "arrays": worst.arrays, "freed": worst.freed},
    )


def _measured(blocks: int, holders: int) -> Memory:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(_fresh_process, blocks, holders).result()


def _fresh_process(blocks: int, holders: int) -> Memory:
    _fill(WARM_UP_BLOCKS, holders)
    return _fill(blocks, holders)


def _fill(blocks: int, holders: int) -> Memory:
    before = own_bytes()
    directory = Directory()
    for node in range(holders):
        announce(directory, node, "block", blocks, ANNOUNCEMENT_CHANGES_MAX)
    entries = len(directory)
    assert entries == blocks * holders, f"only {entries} entries are there"
    grown = own_bytes()
    kept = trimmed_bytes()
    return Memory(entries, kept - before, directory.nbytes, grown - kept)
