"""Reading from another node: what it still has of a plan comes, and only that."""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import cast
from unittest import mock

import numpy as np
import numpy.typing as npt
import pytest

from kvstore import reading
from kvstore.access import NodeAccess
from kvstore.calls import AcquireReply
from kvstore.client import Samovar
from kvstore.clock import Deadline, ManualClock
from kvstore.key import Keys
from kvstore.plan import OWN_NODE, Fetched, Plan
from kvstore.reading import read
from kvstore.routes import OneNode
from kvstore.table import Cells
from kvstore.transport.base import CellRead, ReadOutcome, Transport
from tests.one_prompt import BLOCK, NAMESPACE, PROMPT, Rows

OTHER = 1
CLOCK = ManualClock()
SOURCE = Rows(100, seed=1)


class Elsewhere(OneNode):
    """An embedded tier seen from outside; remembers which keys it had to say that it has not.

    ``calls`` are the names of those that its control side has had. The first ``torn`` cells that
    are read of it are corrupt the first time.
    """

    def __init__(self, tier: Samovar) -> None:
        own = tier._routes
        table = own.own_table()
        assert table is not None
        super().__init__(own.access(OWN_NODE), own.transport(OWN_NODE), table, BLOCK)
        self.missing: list[bytes] = []
        self.calls: list[str] = []
        self.torn = 0

    def access(self, node: int) -> NodeAccess:
        access = super().access(OWN_NODE)
        watched = mock.Mock(wraps=access, spec=access)
        for name in ("acquire", "release", "discard", "touch"):
            getattr(watched, name).side_effect = partial(self._called, name, getattr(access, name))
        watched.session = access.session
        return cast(NodeAccess, watched)

    def transport(self, node: int) -> Transport:
        transport = super().transport(node)
        watched = mock.Mock(wraps=transport)
        watched.read.side_effect = partial(self._read, transport)
        return cast(Transport, watched)

    def _called(self, name: str, call: Callable[..., object], *arguments: object) -> object:
        self.calls.append(name)
        return call(*arguments)

    def _read(
        self, transport: Transport, reads: Sequence[CellRead], deadline: Deadline
    ) -> list[ReadOutcome]:
        self.calls.append("read")
        torn, self.torn = self.torn, 0
        return [ReadOutcome.CORRUPT] * torn + transport.read(reads[torn:], deadline)

    def refuted(self, node: int, keys: Keys, cells: Cells, spans: npt.NDArray[np.uint64]) -> None:
        assert node == OTHER
        self.missing += [key.tobytes() for key in keys]


Seen = tuple[Plan, Elsewhere]


@pytest.fixture
def seen() -> Iterator[Seen]:
    """A plan of all of a prompt, as a directory tells it: keys, and which node has them."""
    with Samovar.open(4 << 20, clock=CLOCK, block_tokens=BLOCK) as tier:
        tier.put(NAMESPACE, PROMPT, SOURCE)
        plan = tier.longest_prefix(NAMESPACE, PROMPT)
        yield replace(plan, nodes=np.full_like(plan.nodes, OTHER)), Elsewhere(tier)


def fetched(plan: Plan, rows: Rows, routes: Elsewhere) -> Fetched:
    with ThreadPoolExecutor(1) as workers:
        return read(plan, rows, routes, workers, Deadline.after(CLOCK, 5.0))


def test_all_that_another_node_has_comes(seen: Seen) -> None:
    plan, routes = seen
    rows = Rows(100)
    answer = fetched(plan, rows, routes)
    assert (answer.tokens, dict(answer.failures)) == (96, {})
    assert dict(answer.by_source) == {"local": 0, "remote": 96, "nvme": 0}
    assert np.array_equal(rows.kv[:, :, :96], SOURCE.kv[:, :, :96])
    assert routes.missing == []
    assert routes.calls == ["read"], "that needs no call"


def test_what_did_not_come_whole_without_a_lease_is_read_under_one(seen: Seen) -> None:
    plan, routes = seen
    routes.torn = 3
    rows = Rows(100)
    answer = fetched(plan, rows, routes)
    assert (answer.tokens, dict(answer.failures)) == (96, {})
    assert np.array_equal(rows.kv[:, :, :96], SOURCE.kv[:, :, :96])
    assert routes.calls == ["read", "acquire", "read", "release"]


def test_what_takes_long_is_leased_first(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, routes = seen
    grid = plan.namespace.grid
    size_bytes = plan.nodes.size * grid.cell_bytes(0, BLOCK)
    for limit_bytes, first in ((size_bytes, "read"), (size_bytes - 1, "acquire")):
        monkeypatch.setattr(reading, "UNLEASED_BYTES_MAX", limit_bytes)
        routes.calls.clear()
        assert fetched(plan, Rows(100), routes).tokens == 96
        assert routes.calls[0] == first


@pytest.mark.parametrize("lost", [0, 2, 5])
def test_what_it_has_no_more_ends_the_prefix(seen: Seen, lost: int) -> None:
    plan, routes = seen
    plan.keys[lost] ^= 1
    rows, cells = Rows(100), plan.nodes.shape[1]
    answer = fetched(plan, rows, routes)
    assert (answer.tokens, dict(answer.failures)) == (lost * BLOCK, {"GONE": cells})
    there = [block for block in range(plan.blocks) if block != lost]
    for block in there:
        part = slice(block * BLOCK, (block + 1) * BLOCK)
        assert np.array_equal(rows.kv[:, :, part], SOURCE.kv[:, :, part]), f"block {block}"
    assert routes.missing == [plan.keys[lost].tobytes()] * cells


class OneLease:
    """Access to a node that grants a lease when the last one has ended; it waits for that."""

    def __init__(self, node: NodeAccess) -> None:
        self._node = node
        self._free = threading.Event()
        self._free.set()

    @property
    def session(self) -> int:
        return self._node.session

    def acquire(self, session: int, keys: Keys, cells: Cells, lease_ms: int) -> AcquireReply:
        assert self._free.wait(10.0), "the lease of an earlier call was kept"
        self._free.clear()
        return self._node.acquire(session, keys, cells, lease_ms)

    def release(self, session: int, lease: int) -> None:
        self._node.release(session, lease)
        self._free.set()


def test_a_lease_ends_before_more_is_leased_of_the_same_node(
    seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "MAX_CELLS_PER_CALL", 5)
    monkeypatch.setattr(reading, "UNLEASED_BYTES_MAX", 0)
    plan, routes = seen
    one_lease = OneLease(routes.access(OTHER))
    monkeypatch.setattr(routes, "access", lambda node: one_lease)
    rows = Rows(100)
    with ThreadPoolExecutor(2) as workers:
        answer = read(plan, rows, routes, workers, Deadline.after(CLOCK, 5.0))
    assert (answer.tokens, dict(answer.failures)) == (96, {})
    assert np.array_equal(rows.kv[:, :, :96], SOURCE.kv[:, :, :96])
