"""The arena's default size and usable processors, over trees of `/proc` and `/sys`."""

import mmap
import os
from pathlib import Path

import pytest

from kvstore.machine import (
    arena_share_bytes,
    default_arena_bytes,
    memory_limit_bytes,
    usable_processors,
)

GIB = 1 << 30


def machine(root: Path, cgroup: str, limits: dict[str, str]) -> Path:
    for name, text in {"proc/self/cgroup": cgroup, **limits}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


@pytest.mark.parametrize(
    ("cgroup", "limits", "expected_bytes"),
    [
        ("0::/", {}, 8 * GIB),
        ("0::/", {"sys/fs/cgroup/memory.max": "max"}, 8 * GIB),
        ("0::/a/b", {"sys/fs/cgroup/a/b/memory.max": str(2 * GIB)}, 2 * GIB),
        (
            "0::/a/b",
            {
                "sys/fs/cgroup/a/b/memory.max": str(2 * GIB),
                "sys/fs/cgroup/a/memory.max": str(GIB),
            },
            GIB,
        ),
        (
            "4:cpu,memory:/a\n0::/",
            {"sys/fs/cgroup/memory/a/memory.limit_in_bytes": str(3 * GIB)},
            3 * GIB,
        ),
        # In a container the path is the host's while the mount shows the container's own folder.
        ("4:memory:/host/x", {"sys/fs/cgroup/memory/memory.limit_in_bytes": str(GIB)}, GIB),
        ("4:memory:/", {"sys/fs/cgroup/memory/memory.limit_in_bytes": str(1 << 62)}, 8 * GIB),
    ],
)
def test_memory_limit(
    tmp_path: Path, cgroup: str, limits: dict[str, str], expected_bytes: int
) -> None:
    assert memory_limit_bytes(machine(tmp_path, cgroup, limits), 8 * GIB) == expected_bytes


def test_machine_without_cgroups_has_its_memory(tmp_path: Path) -> None:
    assert memory_limit_bytes(tmp_path, GIB) == GIB


def test_arena_is_the_smaller_share_in_whole_pages() -> None:
    assert arena_share_bytes(4 * GIB, 100 * GIB) == GIB
    assert arena_share_bytes(100 * GIB, 5 * GIB) == 4 * GIB
    assert arena_share_bytes(4 * GIB + 4, 100 * GIB) % mmap.PAGESIZE == 0


def test_this_machine_has_room(tmp_path: Path) -> None:
    assert default_arena_bytes(tmp_path) > 0


V1_QUOTA, V1_PERIOD = (
    "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us",
    "sys/fs/cgroup/cpu/a/cpu.cfs_period_us",
)


@pytest.mark.parametrize(
    ("cgroup", "limits", "expected"),
    [
        ("0::/", {}, 16),
        ("0::/a", {"sys/fs/cgroup/a/cpu.max": "max 100000"}, 16),
        ("0::/a", {"sys/fs/cgroup/a/cpu.max": "450000 100000"}, 4),
        ("0::/a", {"sys/fs/cgroup/a/cpu.max": "50000 100000"}, 1),
        ("0::/a", {"sys/fs/cgroup/a/cpu.max": "9900000 100000"}, 16),
        ("0::/a", {"sys/fs/cgroup/a/cpu.max": "max", "sys/fs/cgroup/cpu.max": "300000 100000"}, 3),
        ("3:cpu,cpuacct:/a", {V1_QUOTA: "600000", V1_PERIOD: "200000"}, 3),
        ("3:cpu,cpuacct:/a", {V1_QUOTA: "-1", V1_PERIOD: "100000"}, 16),
        ("3:cpu,cpuacct:/a", {V1_QUOTA: "600000"}, 16),
    ],
)
def test_processors_that_may_be_kept_busy(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cgroup: str,
    limits: dict[str, str],
    expected: int,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    assert usable_processors(machine(tmp_path, cgroup, limits)) == expected
