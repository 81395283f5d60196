"""A file system that is really full, or really read-only: a refusal in one sentence, then repaired.

Each scene has a mount namespace to itself (``tests/hold/mount_child.py``). Does not cover: writes
that break off in the middle (``tests/unit/nvme``).
"""

import subprocess
import sys

import pytest

from tests.hold.mount_child import SCENES
from tests.source_tree import ROOT
from tests.worlds import shared_folder

NAMESPACE = ("unshare", "--user", "--map-root-user", "--mount")


@pytest.fixture(scope="module")
def namespace() -> tuple[str, ...]:
    """What a command is run by to have mounts of its own; skips where that is not permitted."""
    trial = [*NAMESPACE, "mount", "-t", "tmpfs", "none", "/mnt"]
    try:
        done = subprocess.run(trial, capture_output=True, text=True, check=False)
    except OSError as fault:
        pytest.skip(f"no mount namespaces here: {fault}")
    if done.returncode:
        pytest.skip(f"no mount namespaces here: {done.stderr.strip()}")
    return NAMESPACE


@pytest.mark.parametrize("scene", SCENES)
def test_hold_a_file_system_that_takes_nothing(namespace: tuple[str, ...], scene: str) -> None:
    with shared_folder() as folder:
        done = subprocess.run(
            [*namespace, sys.executable, "-m", "tests.hold.mount_child", str(folder), scene],
            cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
