"""Damage anywhere in a real slab or a real catalog, and a clock that moved: misses, then repaired.

Bits flipped, sectors torn, files cut off and gone, hundreds of places from a seed. Does not cover:
every byte of a slot (``tests/unit/nvme``), files of another version or node (there, too).
"""

import ast
import faulthandler
import subprocess
import sys

import pytest

from tests.source_tree import ROOT
from tests.worlds import shared_folder

KINDS = 8
"""Four kinds of damage, to two files."""


@pytest.mark.parametrize(
    ("seed", "count"),
    [(1, 60), *(pytest.param(seed, 400, marks=pytest.mark.slow) for seed in range(2, 5))],
)
def test_hold_damage_costs_what_it_hits_and_is_repaired(seed: int, count: int) -> None:
    faulthandler.cancel_dump_traceback_later()  # the child has a deadline of its own
    with shared_folder() as folder:
        done = subprocess.run(
            [sys.executable, "-m", "tests.hold.damage_child", str(folder), str(seed), str(count)],
            cwd=ROOT, capture_output=True, text=True, timeout=900, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    damages = ast.literal_eval(done.stdout)
    assert sum(damages.values()) == count
    assert len(damages) == KINDS
