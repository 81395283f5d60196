"""Nothing grows with requests served: memory, descriptors, threads, files, the catalog's pages.

A node with a full arena and a full disk goes on serving an endless stream of new prompts, and old
ones from both tiers, and misses, and sessions that come and go. What it takes is sampled after a
warm-up.

Looked at closely is what each process *lives on* (`living/sitecustomize.py`): what it has asked of
the allocator and not given back, which a loss of 50 bytes for each request shows at once. What the
system counts for it is more, and depends on chance: it is there for memory past the allocator.

Does not cover: many nodes, long prompts, clients that are killed (each costs its node some hundred
bytes for good: github.com/grpc/grpc/issues/43360).
"""

import faulthandler
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import psutil
import pytest

from kvstore.tiers.nvme.catalog import DATA_FILE
from kvstore.tiers.nvme.folder import CATALOG_FOLDER
from tests.hold.processes import Client, StorageNode, Tier, one_call, stats_of
from tests.served import eventually

ARENA_BYTES = 1 << 20
NVME_BYTES = 16 << 20
TOKENS = 160
LONG_TOKENS = 1600
RECENT = 3
"""So many prompts ago: in the arena."""
OLD = 20
"""So many prompts ago: on the disk only."""
NEVER = 1_000_000
SAMPLES = 12
LIVING = Path(__file__).with_name("living")
GROWTH_MAX = {
    "living": 256 << 10,
    "memory": 4 << 20,
    "metadata": 64 << 10,
    "folders": 1 << 20,
    "catalog": 1 << 20,
    "threads": 4,
}
"""What each may be larger at the end, whatever the length: noise, and no part of a slope.

All are bytes but for the threads, of which gRPC starts some more when a machine is busy.
"""
CLIENTS, ROUNDS = 200, 4
CLIENT_BYTES = 80
"""Noise, half of it what is cached of the first few hundred: gRPC loses 96 or more for a client, in
every round."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What a node and its client take, after so many requests."""

    requests: int
    figures: dict[str, int]


class Soak:
    """A stream of requests to one node."""

    def __init__(self, tier: Tier, disk: Path, answers: Path) -> None:
        self.node: StorageNode = tier.node(
            arena_bytes=ARENA_BYTES, nvme_folder=disk, nvme_bytes=NVME_BYTES
        )
        tier.publish(self.node.info)
        self.client: Client = tier.client(self.node, "another host")
        self.requests = 0
        self.from_disk = 0
        self._prompt = 0
        self._answers = answers
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
        assert session_of(self.node)
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
        living = living_bytes([each.pid for each in processes], self._answers)
        names = [f"living of {module_of(each)}" for each in processes]
        figures = dict(zip(names, living, strict=True)) | {
            "memory": sum(own_bytes(each.pid) for each in processes),
            "descriptors": sum(each.num_fds() for each in processes),
            "threads": sum(each.num_threads() for each in processes),
            "metadata": stats.metadata_bytes,
            "sessions": stats.sessions,
            "folders": sum(map(taken_bytes, self._folders)),
            "catalog": self._catalog.stat().st_size,
        }
        return Sample(self.requests, figures)


def session_of(node: StorageNode) -> int:
    """The number of a session that is over again."""
    with one_call(node.info) as control:
        return control.session


def living_bytes(pids: Sequence[int], answers: Path) -> list[int]:
    """What processes live on, as they say themselves."""
    files = [answers / str(pid) for pid in pids]
    for pid, file in zip(pids, files, strict=True):
        file.unlink(missing_ok=True)
        os.kill(pid, signal.SIGUSR1)
    for file in files:
        eventually(file.exists)
    return [int(file.read_text()) for file in files]


def module_of(process: psutil.Process) -> str:
    """What a process of Python runs."""
    words = process.cmdline()
    return words[words.index("-m") + 1]


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


def bound_of(figure: str) -> int:
    return GROWTH_MAX.get(figure.partition(" of ")[0], 0)


def sampled(soak: Soak, seconds: float, now_s: Callable[[], float]) -> list[Sample]:
    samples, start_s = [soak.sample()], now_s()
    while now_s() - start_s < seconds:
        soak.round()
        if now_s() - start_s > len(samples) * seconds / SAMPLES:
            samples.append(soak.sample())
    return samples


@pytest.fixture
def answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where processes that are started from now on say what they live on."""
    folder = tmp_path / "living"
    folder.mkdir()
    monkeypatch.setenv("LIVING_FOLDER", str(folder))
    monkeypatch.setenv("PYTHONPATH", str(LIVING), prepend=os.pathsep)
    monkeypatch.setenv("PYTHONMALLOC", "malloc")
    # Else what a thread has given back may wait for the same thread to ask for it again.
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.tcache_count=0")
    return folder


@pytest.mark.parametrize("seconds", [10, pytest.param(600, marks=pytest.mark.slow)])
def test_hold_nothing_grows_with_requests_served(
    tier: Tier,
    tmp_path: Path,
    answers: Path,
    seconds: int,
    record_property: Callable[[str, object], None],
) -> None:
    faulthandler.cancel_dump_traceback_later()  # every answer has a deadline of its own
    soak = Soak(tier, tmp_path / "disk", answers)
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
    over = {name: by for name, by in grown.items() if by > bound_of(name)}
    assert not over, f"grown within {served} requests: {over}"


@pytest.mark.parametrize("ask", [session_of, stats_of], ids=["a session", "a call"])
def test_hold_a_client_that_goes_leaves_nothing(
    tier: Tier, answers: Path, ask: Callable[[StorageNode], object]
) -> None:
    node = tier.node()
    tier.publish(node.info)
    taken = []
    for _ in range(ROUNDS):
        for _ in range(CLIENTS):
            ask(node)
        taken += living_bytes([node.pid], answers)
    grown = [after - before for before, after in pairwise(taken)]
    assert min(grown) < CLIENTS * CLIENT_BYTES, f"grew with every {CLIENTS} clients: {grown}"
