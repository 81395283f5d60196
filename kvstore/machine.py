"""What this machine lends to a storage node: its memory limit and its shared memory.

Covers: the memory limit of our cgroup or else the machine's memory, free shared memory, and the
arena size that follows from both when nobody names one. Does not cover: GPUs, and what a node does
with its arena (see `kvstore/arena.py`).

    memory limit  |--------- 25 % ---------|.....................................|
    free shm      |------------------- 80 % -------------------|.........|
    arena         = the smaller of the two, whole pages
"""

import mmap
import shutil
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
    for folder, name in _cgroup_folders(root):
        try:
            text = (folder / name).read_text().strip()
        except OSError:
            continue
        if text.isdigit():  # v2 writes "max" for no limit, v1 a number beyond any memory
            limits.append(int(text))
    return min(limits)


def _cgroup_folders(root: Path) -> list[tuple[Path, str]]:
    """The folders and file names in which a memory limit for this process may stand."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, name = root / "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            mount, name = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        folder = Path(path.lstrip("/"))
        found += [(mount / part, name) for part in (folder, *folder.parents)]
    return found


def host_id(root: Path = Path("/")) -> str:
    """Which host this is: its present boot. Equal for all processes that can share memory."""
    return (root / "proc/sys/kernel/random/boot_id").read_text().strip()
