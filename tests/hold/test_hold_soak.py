"""Nothing grows with requests served: memory, descriptors, threads, files, the catalog's pages.

A node with a full arena and a full disk goes on serving an endless stream of new prompts, and old
ones from both tiers, and misses, and sessions that come and go. What it takes is sampled after a
warm-up. Does not cover: many nodes, long prompts.
"""

import faulthandler
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest

from kvstore.tiers.nvme.catalog import DATA_FILE
from kvstore.tiers.nvme.folder import CATALOG_FOLDER
from tests.hold.processes import Client, StorageNode, Tier, one_call, stats_of

ARENA_BYTES = 1 << 20
NVME_BYTES = 16 << 20
TOKENS = 160
LONG_TOKENS = 1600
RECENT = 3
"""So many prompts ago: in the arena."""
OLD = 20
"""So many prompts ago: on the disk only."""
NEVER = 1_000_000
SAMPLES = 20
GROWTH_BYTES = {"memory": 2 << 20, "metadata": 64 << 10, "folders": 1 << 20, "catalog": 1 << 20}
"""What each may be larger at the end, whatever the length: noise, and no part of a slope."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What a node and its client take, after so many requests."""

    requests: int
    figures: dict[str, int]


class Soak:
    """A stream of requests to one node."""

    def __init__(self, tier: Tier, disk: Path) -> None:
        self.node: StorageNode = tier.node(
            arena_bytes=ARENA_BYTES, nvme_folder=disk, nvme_bytes=NVME_BYTES
        )
        tier.publish(self.node.info)
        self.client: Client = tier.client(self.node, "another host")
        self.requests = 0
        self.from_disk = 0
        self._prompt = 0
        self._folders = (tier.folder, disk)
        self._catalog = disk / "node-0" / CATALOG_FOLDER / DATA_FILE

    def round(self) -> None:
        """A new prompt, a recent one, an old one, an unknown one; and a session."""
        self._prompt += 1
        self.client.put(self._prompt, TOKENS)
        self.client.fetch(max(1, self._prompt - RECENT), TOKENS)
        old = self.client.fetch(max(1, self._prompt - OLD), TOKENS)
        self.from_disk += old["by_source"].get("nvme", 0)
        assert not self.client.fetch(NEVER + self._prompt, TOKENS)["tokens"]
        with one_call(self.node.info) as control:
            assert control.session
        self.requests += 5

    def warm_up(self) -> None:
        """Until the disk is full, with long prompts; then until old ones are like all later."""
        while not stats_of(self.node).nvme.evicted:
            self._prompt += 1
            self.client.put(self._prompt, LONG_TOKENS)
        for _ in range(OLD):
            self.round()
        self.from_disk = self.requests = 0

    def sample(self) -> Sample:
        node = psutil.Process(self.node.pid)
        processes = [node, *node.children(recursive=True), psutil.Process(self.client.pid)]
        stats = stats_of(self.node)
        figures = {
            "memory": sum(own_bytes(each.pid) for each in processes),
            "descriptors": sum(each.num_fds() for each in processes),
            "threads": sum(each.num_threads() for each in processes),
            "metadata": stats.metadata_bytes,
            "sessions": stats.sessions,
            "folders": sum(map(taken_bytes, self._folders)),
            "catalog": self._catalog.stat().st_size,
        }
        return Sample(self.requests, figures)


def own_bytes(pid: int) -> int:
    """Memory of a process that is nobody else's: no mapped file, no arena."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"/proc does not say what process {pid} takes")


def taken_bytes(folder: Path) -> int:
    """What a folder takes of its disk."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*"))


def median_of(samples: list[Sample], figure: str) -> float:
    return float(np.median([sample.figures[figure] for sample in samples]))


def sampled(soak: Soak, seconds: float, now_s: Callable[[], float]) -> list[Sample]:
    samples, start_s = [soak.sample()], now_s()
    while now_s() - start_s < seconds:
        soak.round()
        if now_s() - start_s > len(samples) * seconds / SAMPLES:
            samples.append(soak.sample())
    return samples


@pytest.mark.parametrize("seconds", [10, pytest.param(600, marks=pytest.mark.slow)])
def test_hold_nothing_grows_with_requests_served(
    tier: Tier, tmp_path: Path, seconds: int, record_property: Callable[[str, object], None]
) -> None:
    faulthandler.cancel_dump_traceback_later()  # every answer has a deadline of its own
    soak = Soak(tier, tmp_path)
    soak.warm_up()
    samples = sampled(soak, seconds, time.monotonic)
    assert soak.from_disk, "nothing came from the disk"
    served, quarter = soak.requests, len(samples) // 4
    first, last = samples[:quarter], samples[-quarter:]
    grown = {name: median_of(last, name) - median_of(first, name) for name in samples[0].figures}
    per_request = {name: round(growth / served, 2) for name, growth in grown.items()}
    for name, value in per_request.items():
        record_property(name, value)
    print(f"{served} requests; grown: {grown}; for each request: {per_request}")
    over = {name: by for name, by in grown.items() if by > GROWTH_BYTES.get(name, 0)}
    assert not over, f"grown within {served} requests: {over}"
