"""An Acquire over gRPC waits for the disk, but not for ever, and nobody else waits with it."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest

from kvstore.calls import AcquireReply, CellOutcome
from kvstore.rpc.client import ControlClient
from tests.served import Served, eventually, put, reserve_request, some_keys
from tests.worlds import shared_folder

KEYS = some_keys(4)
CELLS = np.zeros(4, np.uint8)


@pytest.fixture
def served() -> Iterator[Served]:
    with shared_folder() as folder:
        node = Served(folder, has_disk=True)
        yield node
        node.stop()


@pytest.fixture
def client(served: Served) -> Iterator[ControlClient]:
    control = ControlClient(served.address)
    yield control
    control.close()


def put_on_disk_only(served: Served, client: ControlClient) -> None:
    tier = served.node.tier
    served.call(served.node.tick)
    put(client, tier.arena, KEYS)
    assert set(client.reserve(reserve_request(client.session, KEYS)).outcomes) == {
        CellOutcome.PRESENT
    }
    served.call(served.node.tick)
    served.call(served.node.tick)
    assert client.stats().nvme.held_cells == 4
    for slot in tier.held_slots().tolist():
        served.call(partial(tier.evict, slot))


def acquire(client: ControlClient, lease_ms: int) -> AcquireReply:
    return client.acquire(client.session, KEYS, CELLS, lease_ms)


def test_what_is_on_the_disk_only_is_read_and_leased(served: Served, client: ControlClient) -> None:
    put_on_disk_only(served, client)
    assert client.has_disk
    assert client.lookup(KEYS, 1) == 4
    reply = acquire(client, 5000)
    assert set(reply.outcomes) == {CellOutcome.FOUND}
    assert reply.loaded.all()
    assert not acquire(client, 5000).loaded.any()


def test_a_disk_that_does_not_answer_is_waited_for_half_of_the_lease(
    served: Served, client: ControlClient
) -> None:
    put_on_disk_only(served, client)
    served.disk.is_eager = False
    with ThreadPoolExecutor(1) as caller:
        waiting = caller.submit(acquire, client, 1000)
        eventually(lambda: client.stats().host.reserved_cells == 4)
        assert not waiting.done(), "others are answered meanwhile"
        assert set(waiting.result().outcomes) == {CellOutcome.REFUSED}
    served.disk.is_eager = True
    assert set(acquire(client, 5000).outcomes) == {CellOutcome.FOUND}
