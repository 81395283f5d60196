"""The limit of the NVMe rows: a disk's own speed, with O_DIRECT, same block size and depth.

fio if it is installed, with its own clock; otherwise a loop in Python, as many threads as requests
in flight, whose calls let go of the interpreter. Neither knows keys, digests, catalogs or syncs.
"""

import json
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, Protocol

from benchmarks.figure import Skip
from benchmarks.measure import timed
from benchmarks.prefix import random_bytes
from kvstore.tiers.nvme.disk import LinuxDisk, aligned_bytes
from kvstore.tiers.nvme.slab import read_whole, write_whole

DEPTH = 4
"""Requests in flight: as many as the disk process has threads for either direction."""
FIO_S = 300.0
Direction = Literal["read", "write"]


class RawDisk(Protocol):
    """Reads or writes a whole file once per call."""

    name: str

    def __call__(self) -> float:
        """The seconds that it took."""
        ...

    def close(self) -> None:
        """Remove the file."""
        ...


def raw_disk(folder: Path, direction: Direction, block_bytes: int, blocks: int) -> RawDisk:
    """The best limit that there is here, on a file that is written once before."""
    path = folder / "limit"
    _fill(path, block_bytes, blocks)
    fio = shutil.which("fio")
    if fio is None:
        return DiskLoop(path, direction, block_bytes, blocks)
    return Fio(fio, path, direction, block_bytes, blocks)


class Fio:
    """fio's asynchronous engine."""

    name = "fio"

    def __init__(
        self, fio: str, path: Path, direction: Direction, block_bytes: int, blocks: int
    ) -> None:
        self._path = path
        self._direction = direction
        self._command = [
            fio, "--name=limit", f"--filename={path}", f"--rw={direction}", "--direct=1",
            f"--bs={block_bytes}", f"--size={block_bytes * blocks}", f"--iodepth={DEPTH}",
            "--ioengine=libaio", "--overwrite=1", "--output-format=json",
        ]  # fmt: skip

    def __call__(self) -> float:
        done = subprocess.run(
            self._command, capture_output=True, text=True, timeout=FIO_S, check=False
        )
        if done.returncode:
            raise Skip(f"fio does not run here: {done.stderr.strip()[:200]}")
        report = json.loads(done.stdout)["jobs"][0][self._direction]
        return float(report["io_bytes"]) / float(report["bw_bytes"])

    def close(self) -> None:
        self._path.unlink()


class DiskLoop:
    """Threads that read or write one block after the other."""

    name = "a Python loop (fio is not installed)"

    def __init__(self, path: Path, direction: Direction, block_bytes: int, blocks: int) -> None:
        self._path = path
        self._block_bytes = block_bytes
        self._blocks = blocks
        self._transfer = read_whole if direction == "read" else write_whole
        self._disk = LinuxDisk.open(path)
        self._buffers = [aligned_bytes(block_bytes) for _ in range(DEPTH)]
        self._threads = ThreadPoolExecutor(DEPTH)

    def __call__(self) -> float:
        return timed(lambda: list(self._threads.map(self._share, range(DEPTH))))

    def close(self) -> None:
        self._threads.shutdown()
        self._disk.close()
        self._path.unlink()

    def _share(self, share: int) -> None:
        for block in range(share, self._blocks, DEPTH):
            self._transfer(self._disk, [self._buffers[share]], block * self._block_bytes)


def _fill(path: Path, block_bytes: int, blocks: int) -> None:
    """Write the file, so that its blocks are there."""
    disk = LinuxDisk.open(path)
    if not disk.is_direct:
        disk.close()
        raise Skip(f"{path.parent} is on a file system without O_DIRECT: set TMPDIR to another")
    buffer = aligned_bytes(block_bytes)
    buffer[:] = random_bytes(block_bytes)
    disk.allocate(block_bytes * blocks)
    for block in range(blocks):
        write_whole(disk, [buffer], block * block_bytes)
    disk.sync()
    disk.close()
    os.sync()
