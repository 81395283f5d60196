"""Row ``restart_100k_blocks_s``: how long a node that was killed keeps its blocks from others.

    started ──> folders, arena ──> catalog read, checked ──> announced ──> found, all of them,
                                                             by a client on another host; one read

As after a restart of the machine: the shared memory is gone, and what the page cache has of the
catalog as well, so all comes from the NVMe tier. The blocks are small, since a restart reads no
payload. The limit is reading the catalog's bytes from the disk.
"""

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import numpy.typing as npt

from benchmarks.figure import Budget, Figure, Sense, Skip
from benchmarks.folders import node_folders
from benchmarks.lookup_100k import GRID, NAMESPACE, OneRow
from benchmarks.measure import Others, Run, timed
from benchmarks.prefix import VOCABULARY
from benchmarks.storage_nodes import Place, StorageNode
from kvstore.client import Samovar
from kvstore.cluster_map import ClusterMap
from kvstore.key import Tokens
from kvstore.server import NVME_FOLDER
from kvstore.tiers.nvme.catalog import DATA_FILE
from kvstore.tiers.nvme.folder import CATALOG_FOLDER

ROW = "restart_100k_blocks_s"
BUDGET = Budget(Sense.AT_MOST, 10.0)
BLOCKS_PER_PROMPT = 1024
ARENA_BYTES = 256 << 20
"""Has slots for four prompts: two are being filled and written, none of them has to make room."""
NVME_BYTES_PER_BLOCK = 1 << 16
"""For how many cells a tier has records goes by its bytes; what is not used is not written."""
READ_BLOCKS = 64
PATIENCE_S = 120.0
POLL_S = 0.01


@dataclass(frozen=True, slots=True)
class Restart:
    """One node's places, and the prompts that it holds."""

    place: Place
    prompts: tuple[Tokens, ...]

    @property
    def blocks(self) -> int:
        """All of them."""
        return len(self.prompts) * BLOCKS_PER_PROMPT

    @property
    def catalog(self) -> Path:
        """The file with what the disk holds."""
        return self.place.folder / NVME_FOLDER / CATALOG_FOLDER / DATA_FILE


@dataclass(frozen=True, slots=True)
class Taken:
    """Seconds of one restart, from the start of the process, and of reading the catalog."""

    found_s: float
    serving_s: float
    limit_s: float


@dataclass(frozen=True, slots=True)
class Target:
    """An engine's rows for what is read."""

    data: npt.NDArray[np.uint8]

    def rows(self, layer: int, start: int, stop: int) -> npt.NDArray[np.uint8]:
        return self.data[:, start:stop]


def measure(run: Run) -> Iterator[Figure]:
    """Fill a node's disk, then kill and restart it over and over."""
    count = run.of(98, 2)
    rng = np.random.default_rng(6)
    # One token more than whole blocks: the last of a prompt is never cached.
    tokens = BLOCKS_PER_PROMPT * GRID.block_tokens + 1
    prompts = tuple(rng.integers(0, VOCABULARY, tokens, np.int32) for _ in range(count))
    blocks = count * BLOCKS_PER_PROMPT
    with node_folders() as (folder, shared):
        nvme_bytes = blocks * NVME_BYTES_PER_BLOCK
        free_bytes = shutil.disk_usage(folder).free
        if nvme_bytes > free_bytes:
            raise Skip(f"needs {nvme_bytes >> 20} MiB in {folder}, which has {free_bytes >> 20}")
        place = Place(0, folder / "node", shared / "arena", ARENA_BYTES, nvme_bytes)
        restart = Restart(place, prompts)
        _fill(restart, run)
        yield _figure(restart, run.track(range(run.of(5, 1)), "restarting"))


def _fill(restart: Restart, run: Run) -> None:
    """Have a node store every prompt and, once it was used again, write it to its disk."""
    with _killed_node(restart.place) as node, node.client() as tier:
        _wait("bytes of disk", lambda: tier.stats().nvme.capacity_bytes, wanted=1)
        for done in run.track(range(len(restart.prompts)), "filling a disk with small blocks"):
            prompt = restart.prompts[done]
            _wait("blocks stored", partial(_put, tier, prompt), BLOCKS_PER_PROMPT)
            tier.touch(tier.longest_prefix(NAMESPACE, prompt))
            # The disk may be one prompt behind.
            _wait("blocks on disk", lambda: tier.stats().nvme.held_cells, done * BLOCKS_PER_PROMPT)
        _wait("blocks on disk", lambda: tier.stats().nvme.held_cells, restart.blocks)


def _figure(restart: Restart, rounds: Iterator[int]) -> Figure:
    others = Others()
    taken = [_round(restart) for _ in rounds]
    seconds = [one.found_s for one in taken]
    serving_s, limit_s = (
        median(one.serving_s for one in taken),
        median(one.limit_s for one in taken),
    )
    size_bytes = restart.catalog.stat().st_size
    return Figure(
        row=ROW,
        variant="from the disk alone",
        value=median(seconds),
        unit="s",
        beside=f"{restart.blocks} blocks found from another host, since the start of the process, "
        f"which serves after {serving_s:.2f} s; reading the catalog's {size_bytes / 1e6:.0f} MB "
        f"takes {limit_s:.2f} s",
        budget=BUDGET,
        low=min(seconds),
        high=max(seconds),
        rounds=len(seconds),
        others_cores=others.busy_cores(),
        details={
            "blocks": restart.blocks,
            "catalog_bytes": size_bytes,
            "serving_s": serving_s,
            "limit_s": limit_s,
        },
    )


def _round(restart: Restart) -> Taken:
    """Lose the machine's memory, start again, and wait until everything is found."""
    shutil.rmtree(restart.place.arena_folder)
    _drop_cached(restart.catalog)
    limit_s = timed(restart.catalog.read_bytes)
    _drop_cached(restart.catalog)
    started_s = time.perf_counter()
    with _killed_node(restart.place) as node:
        serving_s = time.perf_counter() - started_s
        with Samovar.connect(node.info.control, host_id="another host") as tier:
            for prompt in restart.prompts:
                _wait("blocks found", partial(_found, tier, prompt), BLOCKS_PER_PROMPT)
            _read_one(tier, restart.prompts[-1])
        return Taken(time.perf_counter() - started_s, serving_s, limit_s)


def _put(tier: Samovar, prompt: Tokens) -> int:
    """Store a prompt; how many of its blocks are there then, whoever stored them."""
    stored = tier.put(NAMESPACE, prompt, OneRow())
    return stored.stored + stored.present


def _found(tier: Samovar, prompt: Tokens) -> int:
    return tier.longest_prefix(NAMESPACE, prompt).blocks


def _read_one(tier: Samovar, prompt: Tokens) -> None:
    """What is found is there, too: the first blocks of a prompt."""
    front = prompt[: READ_BLOCKS * GRID.block_tokens + 1]
    target = Target(np.zeros((1, len(front), GRID.row_bytes[0]), np.uint8))
    fetched = tier.get_into(tier.longest_prefix(NAMESPACE, front), target)
    assert fetched.by_source["nvme"] == len(front) - 1, f"not all came: {fetched}"
    assert target.data[:, :-1].all(), "other bytes came than were stored"


@contextlib.contextmanager
def _killed_node(place: Place) -> Iterator[StorageNode]:
    """A node in a map of its own, killed at the end: never asked to write anything down."""
    node = StorageNode.start(place)
    try:
        node.set_map(ClusterMap(node.info.incarnation, (node.info,)))
        yield node
    finally:
        node.kill()
        node.stop()


def _wait(what: str, measure: Callable[[], int], wanted: int) -> None:
    until_s = time.monotonic() + PATIENCE_S
    while (found := measure()) < wanted:
        if time.monotonic() > until_s:
            raise Skip(f"{what}: {found} of {wanted} within {PATIENCE_S:g} s")
        time.sleep(POLL_S)


def _drop_cached(path: Path) -> None:
    """Have the page cache forget a file, which needs no rights where all of it is on the disk."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
