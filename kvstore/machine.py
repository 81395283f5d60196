"""What this machine lends to a storage node or a client: memory, shared memory, processors.

Covers: the limits of our cgroup or else what the machine has, free shared memory, and the arena
size that follows when nobody names one. Does not cover: GPUs, and what a node does with its arena
(see `kvstore/arena.py`).

    memory limit  |--------- 25 % ---------|.....................................|
    free shm      |------------------- 80 % -------------------|.........|
    arena         = the smaller of the two, whole pages
"""

import mmap
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import psutil

SHM_FOLDER = Path("/dev/shm")
"""Shared memory, where nobody names another folder of it."""
ARENA_SHARE_OF_MEMORY = 0.25
ARENA_SHARE_OF_FREE_SHM = 0.80
#: Below this a node works, but holds little more than one long prompt.
SMALL_ARENA_BYTES = 256 << 20


def default_arena_bytes(shm_folder: Path) -> int:
    """The arena's size when none is configured; reads the limits of the running process."""
    memory = memory_limit_bytes(Path("/"), psutil.virtual_memory().total)
    return arena_share_bytes(memory, shutil.disk_usage(shm_folder).free)


def arena_share_bytes(memory_bytes: int, free_shm_bytes: int) -> int:
    """The smaller of both shares, cut to whole pages."""
    share = min(memory_bytes * ARENA_SHARE_OF_MEMORY, free_shm_bytes * ARENA_SHARE_OF_FREE_SHM)
    return int(share) // mmap.PAGESIZE * mmap.PAGESIZE


def memory_limit_bytes(root: Path, total_bytes: int) -> int:
    """The least of the machine's memory and the limits of our cgroup and all its parents.

    `root` is where `/proc` and `/sys` are found. Understands cgroup v2 and v1; a limit that is
    absent or unreadable limits nothing.
    """
    limits = [total_bytes]
    for text, _ in _limits(root, "memory", "memory.max", "memory.limit_in_bytes"):
        if text.isdigit():  # v2 writes "max" for no limit, v1 a number beyond any memory
            limits.append(int(text))
    return min(limits)


def usable_processors(root: Path = Path("/")) -> int:
    """How many processors this process may keep busy: those it may run on, less by its cgroup's
    quota, and one at least.
    """
    limits = [len(os.sched_getaffinity(0))]
    for text, folder in _limits(root, "cpu", "cpu.max", "cpu.cfs_quota_us"):
        quota_us, _, period_us = text.partition(" ")
        period_us = period_us or _text(folder / "cpu.cfs_period_us")  # v1 has a file for each
        if quota_us.isdigit() and period_us.isdigit():  # "max", or -1, is no limit
            limits.append(int(quota_us) // int(period_us))
    return max(1, min(limits))


def _limits(root: Path, controller: str, name: str, name_in_v1: str) -> Iterator[tuple[str, Path]]:
    """What a controller's limit file says in our cgroup and all its parents, and where it is."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, file = root / "sys/fs/cgroup", name
        elif controller in controllers.split(","):
            mount, file = root / "sys/fs/cgroup" / controller, name_in_v1
        else:
            continue
        folder = Path(path.lstrip("/"))
        for part in (folder, *folder.parents):
            yield _text(mount / part / file), mount / part


def _text(path: Path) -> str:
    """What a file holds; nothing, of one that can't be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def host_id(root: Path = Path("/")) -> str:
    """Which host this is: its present boot. Equal for all processes that can share memory."""
    return (root / "proc/sys/kernel/random/boot_id").read_text().strip()
