"""SIGKILL at every boundary of real disk work: store, evict, re-assign, delete and commit.

Every block that the order of writes promises is there and verifies, nothing else, and nothing that
was deleted. Does not cover: power loss (``tests/unit/nvme/test_nvme_crash.py`` simulates it).
"""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("seed", "stride", "kills_min"),
    [
        pytest.param(0, 12, 12),
        *(pytest.param(seed, 1, 150, marks=pytest.mark.slow) for seed in range(1, 4)),
    ],
)
def test_hold_a_kill_at_every_boundary(
    tmp_path: Path, seed: int, stride: int, kills_min: int
) -> None:
    command = [sys.executable, "-m", "tests.hold.disk_child", str(tmp_path), str(seed), str(stride)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) >= kills_min
