"""Which tests of a run go to one process in a row, when several processes share it (`-n 2`).

    a file                  one share: what a module's fixtures build is built once
    all files with Ray      one share: two Rays side by side wait for each other's processors
    a test of tests/sim     a share of its own: some of them run hundreds of worlds

Shares are handed out in the order of collection. So what is long (engines, killed nodes) comes
first, and at the end, when one process has to wait for the other, files are short.
"""

from functools import cache
from pathlib import Path

import pytest
from xdist.scheduler import LoadScopeScheduling

RAY_MARK = "pytest.mark.cluster"
WORLDS = "tests/sim/"


class Shares(LoadScopeScheduling):  # type: ignore[misc]
    """Hands a share to whichever process is about to run out of tests."""

    def __init__(self, config: pytest.Config, log: object) -> None:
        super().__init__(config, log)
        config.option.loadscopereorder = False  # else the files with the fewest tests come last
        self._root = config.rootpath

    def _split_scope(self, nodeid: str) -> str:
        return share_of(nodeid, self._root)


def share_of(test: str, root: Path) -> str:
    """The share's name: that of a test or a file, or "ray"."""
    if test.startswith(WORLDS):
        return test
    file = test.split("::")[0]
    return "ray" if starts_ray(root / file) else file


@cache
def starts_ray(file: Path) -> bool:
    """Whether its tests are marked so: the process that hands out tests knows their names only."""
    return RAY_MARK in file.read_text()
