"""What many of these tests begin with: a folder in shared memory, a node behind its port.

A file whose tests need another one has a fixture of the same name itself.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.served import Served
from tests.worlds import shared_folder


@pytest.fixture
def folder() -> Iterator[Path]:
    """Where holes can be punched."""
    with shared_folder() as path:
        yield path


@pytest.fixture
def served(folder: Path) -> Iterator[Served]:
    """Without a disk, a secret or neighbours."""
    node = Served(folder)
    yield node
    node.stop()
