"""What the NVMe rows share: a tier on a real disk, an arena full of blocks, and their limit.

arena (shared memory) ── store ──> disk process ──> slab      the limit moves as many bytes
                      <── load ──                             between memory and a file beside it
"""

import mmap
import select
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np

from benchmarks.figure import Budget, Figure, beside_limit
from benchmarks.folders import node_folders
from benchmarks.measure import Run, Timed, paired
from benchmarks.prefix import BLOCK_BYTES, GRID, random_bytes
from benchmarks.raw_disk import DEPTH, Direction, raw_disk
from kvstore.block import HEADER_BYTES, Header, header_digest
from kvstore.clock import SystemClock
from kvstore.fs import LinuxFileSystem
from kvstore.key import KEY_BYTES, as_keys
from kvstore.tiers.host import HostTier
from kvstore.tiers.nvme.disk_process import DiskProcess, DiskSettings
from kvstore.tiers.nvme.record import slot_bytes_of, stored_bytes_of
from kvstore.tiers.nvme.spill import Declined, Done, Phase, Result, Spill
from kvstore.tiers.nvme.tier import NvmeTier

EXTENT_BYTES = 64 << 20
ARENA_STEP_BYTES = -(-stored_bytes_of(BLOCK_BYTES) // mmap.PAGESIZE) * mmap.PAGESIZE
WAIT_S = 60.0


class NvmeScene:
    """A tier with room for ``blocks`` blocks and little more, and as many in its arena."""

    def __init__(self, blocks: int, arena_folder: Path, disk_folder: Path) -> None:
        self.blocks = blocks
        arena_bytes = ARENA_STEP_BYTES * blocks
        clock = SystemClock()
        host = HostTier.create(LinuxFileSystem(), clock, arena_folder, arena_bytes, 64, 1)
        self._arena = host.arena
        self._payload = random_bytes(BLOCK_BYTES)
        extents = -(-blocks * slot_bytes_of(BLOCK_BYTES) // (EXTENT_BYTES // 2))
        cells_max = 4 * blocks
        self._process = DiskProcess(
            DiskSettings(disk_folder, arena_folder, "bench", EXTENT_BYTES, extents, cells_max)
        )
        self.tier = NvmeTier(self._process, clock, cells_max, incarnation=1)
        while self.tier.phase is Phase.OPENING:
            self.wait()
        assert self.tier.phase is Phase.OPEN, self.tier.reason
        for block in range(blocks):
            start = block * ARENA_STEP_BYTES + HEADER_BYTES
            self._arena.view(start, BLOCK_BYTES)[:] = self._payload

    def wait(self) -> list[Done]:
        """Sleep until the disk process has something to say."""
        select.select([self._process.fileno()], [], [], WAIT_S)
        return self.tier.tick()

    def offers(self, first_name: int) -> list[Spill]:
        """Every block of the arena under a new name; the payload's digests are nobody's."""
        spills = []
        for block in range(self.blocks):
            key = np.random.default_rng(first_name + block).bytes(KEY_BYTES)
            header = Header(
                key, 0, GRID.block_tokens, BLOCK_BYTES, block, 7, (0,) * GRID.layers
            ).pack()
            offset = block * ARENA_STEP_BYTES
            self._arena.view(offset, len(header))[:] = np.frombuffer(header, np.uint8)
            spills.append(
                Spill(
                    key=key, cell=0, tokens=GRID.block_tokens, length=BLOCK_BYTES, depth=block,
                    span=7, header_digest=header_digest(header), stamp=first_name + 1, ttl_s=0,
                    expires_ms=0, arena_offset=offset,
                )
            )  # fmt: skip
        return spills

    def store(self, spills: list[Spill]) -> None:
        """Store all of them; returns when all are durable."""
        self._finish([self.tier.store(spill) for spill in spills], Result.STORED)

    def load_all(self) -> None:
        """Load as many held cells as the arena has room for, verified."""
        held = self.tier.held_records()[: self.blocks]
        keys = as_keys(held["key"].tobytes())
        found = self.tier.find(keys, held["cell"])
        places = zip(found.slots.tolist(), found.generations.tolist(), strict=True)
        tickets = [
            self.tier.load(number, sequence, at * ARENA_STEP_BYTES)
            for at, (number, sequence) in enumerate(places)
        ]
        self._finish(tickets, Result.LOADED)

    def _finish(self, tickets: Sequence[int | Declined], wanted: Result) -> None:
        left = set(tickets)
        while left:
            for done in self.wait():
                assert done.result is wanted, done
                left.discard(done.ticket)


@contextmanager
def nvme_scene(blocks: int) -> Iterator[tuple[NvmeScene, Path]]:
    """A scene in temporary folders, and the one that is on the disk."""
    with node_folders() as (disk_folder, arena_folder):
        scene = NvmeScene(blocks, arena_folder, disk_folder)
        try:
            yield scene, disk_folder
        finally:
            scene.tier.stop()


def measure_on_disk(
    row: str,
    run: Run,
    direction: Direction,
    budget: Budget,
    ours: Callable[[NvmeScene], Timed],
) -> Figure:
    """Time what ``ours`` makes of a scene beside the disk's own speed."""
    blocks = run.of(48, 4)
    block_bytes = stored_bytes_of(BLOCK_BYTES)
    with (
        nvme_scene(blocks) as (scene, folder),
        closing(raw_disk(folder, direction, block_bytes, blocks)) as limit,
    ):
        # Many short rounds: whatever else the disk has to do comes and goes.
        rounds = run.track(range(run.of(21, 2)), row)
        pairs = paired(ours(scene), limit, rounds)
    size_bytes = blocks * BLOCK_BYTES
    speed, limit_speed = size_bytes / pairs.ours_median_s, size_bytes / pairs.limit_median_s
    beside = (
        f"{speed / 1e9:.2f} GB/s, {limit.name} {limit_speed / 1e9:.2f} GB/s; {blocks} blocks of "
        f"{BLOCK_BYTES / 1e6:.2f} MB, O_DIRECT, {DEPTH} in flight"
    )
    return beside_limit(row, "", pairs, budget, "of limit", beside, {"bytes": size_bytes})
