"""SIGKILL at every boundary of real disk work: store, evict, re-assign, delete, commit, rebuild.

A boundary is an operation on slab or catalog, or a system call that changes a file, so that kills
come in the middle of LMDB's commits as well.

Every block that the order of writes promises is there and verifies, nothing else, and nothing that
was deleted. Does not cover: power loss (``tests/unit/nvme/test_nvme_crash.py`` simulates it).
"""

import faulthandler
import subprocess
import sys
from pathlib import Path

import pytest

from tests.source_tree import ROOT


@pytest.mark.parametrize(
    ("where", "seed", "stride", "kills_min"),
    [
        pytest.param("operation", 0, 12, 12),
        pytest.param("call", 0, 9, 35),
        pytest.param("rebuild", 0, 1, 10),
        *(pytest.param("operation", n, 1, 150, marks=pytest.mark.slow) for n in range(1, 4)),
        *(pytest.param("call", n, 1, 250, marks=pytest.mark.slow) for n in range(1, 3)),
        *(pytest.param("rebuild", n, 1, 10, marks=pytest.mark.slow) for n in range(1, 6)),
    ],
)
def test_hold_a_kill_at_every_boundary(
    tmp_path: Path, where: str, seed: int, stride: int, kills_min: int
) -> None:
    faulthandler.cancel_dump_traceback_later()  # the child has a deadline of its own
    words = [str(tmp_path), str(seed), str(stride), where]
    done = subprocess.run(
        [sys.executable, "-m", "tests.hold.disk_child", *words],
        cwd=ROOT, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) >= kills_min
