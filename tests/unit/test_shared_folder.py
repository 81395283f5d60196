"""The tests' own folders in shared memory: those of killed runs go, those in use stay."""

import os
import subprocess
import sys
from pathlib import Path

from tests.source_tree import ROOT
from tests.worlds import LOCKED_WITHIN_S, shared_folder, sweep_shared_folders

HELD = """
import sys
from tests.worlds import shared_folder
with shared_folder() as folder:
    (folder / "arena").write_bytes(bytes(100))
    print(folder, flush=True)
    sys.stdin.read()
"""


def aged(folder: Path) -> None:
    """As if it had been made some time ago."""
    made_s = folder.stat().st_mtime - 2 * LOCKED_WITHIN_S
    os.utime(folder, (made_s, made_s))


def test_what_a_killed_run_left_goes_and_what_is_in_use_stays() -> None:
    command = [sys.executable, "-c", HELD]
    with (
        shared_folder() as ours,
        subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as other,
    ):
        assert other.stdout is not None
        theirs = Path(other.stdout.readline().strip())
        for folder in (ours, theirs):
            aged(folder)
        sweep_shared_folders.__wrapped__()
        assert ours.exists()
        assert (theirs / "arena").exists(), "in use by another run"
        other.kill()
        other.wait()
        assert theirs.exists()
        sweep_shared_folders.__wrapped__()
        assert not theirs.exists()
        assert ours.exists()
