"""The rows there are: each is a claim, measured by the module of its name.

A module is imported when its row runs, so that ``--list`` and the rows of the tier alone need
neither torch nor Ray.
"""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from benchmarks.figure import Figure, Skip, Skipped
from benchmarks.measure import Run


@dataclass(frozen=True, slots=True)
class Row:
    """One claim, and about how long it takes to measure."""

    name: str
    claim: str
    takes: str

    def measure(self, run: Run) -> Iterator[Figure | Skipped]:
        """The row's figures as they come; what is missing ends it as skipped."""
        try:
            module = importlib.import_module(f"benchmarks.{self.name}")
            measure: Callable[[Run], Iterator[Figure | Skipped]] = module.measure
            yield from measure(run)
        except ModuleNotFoundError as missing:
            yield Skipped(self.name, "", f"needs {missing.name}, which is not installed")
        except Skip as reason:
            yield Skipped(self.name, "", str(reason))


ROWS = (
    Row(
        "same_node_get",
        "a warm 512 MiB prefix out of shared memory, verified: >= 0.6 of memcpy by as many threads",
        "20 s",
    ),
    Row(
        "same_node_put",
        "a new 512 MiB prefix into shared memory: >= 0.6 of memcpy by as many threads",
        "20 s",
    ),
    Row(
        "lookup_100k",
        "look-up of a 100k-token prompt: <= 1.25 of only hashing it; <= 0.3 us per key probed",
        "5 s",
    ),
    Row("arena_fill", "blocks of several sizes share the arena: >= 0.95 of it holds blocks", "2 s"),
    Row("node_metadata_bytes", "bookkeeping per block held: <= 400 bytes", "20 s"),
    Row("directory_bytes", "a directory shard per block held: <= 200 bytes", "10 s"),
    Row(
        "cross_node_get",
        "a prefix from another node: >= 0.9 of raw sockets, >= 5 times Ray's object store",
        "60 s",
    ),
    Row("nvme_put", "blocks to the NVMe tier, durable: >= 0.8 of the disk's own speed", "30 s"),
    Row(
        "nvme_get_cold",
        "blocks from the NVMe tier, verified, past every cache: >= 0.9 of the disk's own speed",
        "30 s",
    ),
    Row(
        "restart_100k_blocks_s",
        "a killed node's 100k blocks are found again within 10 s, from its disk alone",
        "2 min",
    ),
    Row("node_death_detection_s", "a killed node is passed over within 2 s", "60 s"),
    Row(
        "ttft_warm_vs_cold",
        "first token of a warm 4k-token prompt: >= 20 times faster than cold",
        "3 min",
    ),
    Row(
        "ttft_vs_own_cache",
        "first token of a warm prompt: <= 1.25 of the engine's own resident hit",
        "1 min",
    ),
    Row(
        "connector_cold_cost",
        "a cold request with an empty tier attached: <= 1.02 of one without",
        "3 min",
    ),
    Row(
        "cuda_ttft",
        "first token of a warm prompt on a GPU, for a model of 8B: beside cold and own hit",
        "1 min",
    ),
)
