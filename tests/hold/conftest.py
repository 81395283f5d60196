"""What every test of this folder has: a tier of processes that are gone afterwards."""

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.hold.processes import Tier
from tests.worlds import shared_folder


@pytest.fixture
def tier() -> Iterator[Tier]:
    with shared_folder() as folder, ExitStack() as stack:
        yield Tier(folder, stack)
