"""What an engine holds from its last request, and what it tells of it."""

import numpy as np
import pytest
import torch

from worker.engines.resident import Resident
from worker.geometry import Attention, Layout
from worker.staging import HostStaging

pytestmark = pytest.mark.engine
LAYOUT = Layout(Attention.GQA, layers=2, kv_heads=2, k_width=4, v_width=4, dtype="float32")


class Told(HostStaging):
    """Knows from which rows on it was told that they are written anew."""

    def __init__(self, resident: Resident) -> None:
        super().__init__(resident.cache)
        self.starts: list[int] = []

    def rewritten(self, start: int) -> None:
        self.starts.append(start)


@pytest.fixture
def resident() -> Resident:
    return Resident(LAYOUT, 64, torch.float32, torch.device("cpu"))


def test_what_is_run_behind_held_tokens_is_lifted_anew(resident: Resident) -> None:
    resident.staging = told = Told(resident)
    resident.hold(np.arange(30, dtype=np.int32))
    resident.hold(np.arange(20, dtype=np.int32))
    assert told.starts == [30, 20]
    assert resident.tokens.tolist() == list(range(20))


def test_on_a_cpu_fresh_memory_is_another_cache_that_holds_nothing(resident: Resident) -> None:
    resident.hold(np.arange(30, dtype=np.int32))
    cache, staging = resident.cache, resident.staging
    resident.renew()
    assert resident.length == 0
    assert resident.staging is not staging
    assert not np.shares_memory(resident.cache.rows(0, 0, 64), cache.rows(0, 0, 64))
    assert resident.staging.host_rows is resident.cache
