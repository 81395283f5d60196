"""A tenant that is erased: nothing of it is found, by clients that are told and those to come."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest

from kvstore import sessions
from kvstore.answers import Erased
from kvstore.calls import HoldOutcome
from kvstore.client import ERASED, UNTOLD, Samovar
from kvstore.clock import Deadline
from kvstore.cluster_map import ClusterMap
from kvstore.errors import UnavailableError
from kvstore.key import Chain
from kvstore.rpc.cache_pb2 import TenantEpochs
from kvstore.rpc.client import ControlClient
from kvstore.tenants import PAGE_TENANTS_MAX, EpochPage, tenant_digest
from kvstore.transport.base import CellRead, ReadOutcome
from kvstore.transport.local import LocalTransport
from tests.one_prompt import BLOCK, NAMESPACE, PROMPT, Rows
from tests.served import Served, client_of, eventually, two_served
from tests.worlds import shared_folder

OURS = replace(NAMESPACE, tenant="somebody")
OTHER = replace(NAMESPACE, tenant="somebody else")


@pytest.fixture
def embedded() -> Iterator[Samovar]:
    with Samovar.open(4 << 20, block_tokens=BLOCK) as tier:
        for space in (OURS, OTHER):
            assert tier.put(space, PROMPT, Rows(100, seed=1)).complete
        yield tier


def test_nothing_of_an_erased_tenant_is_found_or_stored(embedded: Samovar) -> None:
    plan = embedded.longest_prefix(OURS, PROMPT)
    assert plan.tokens == 96
    assert embedded.erase("somebody") == Erased(1)
    assert embedded.longest_prefix(OURS, PROMPT).blocks == 0
    fetched = embedded.get_into(plan, Rows(100))
    assert (fetched.tokens, fetched.stop) == (0, 0)
    assert embedded.get_into(plan, Rows(100), start=100).start == 100
    stored = embedded.put(OURS, PROMPT, Rows(100, seed=1), boundaries=[70])
    assert (stored.refused, stored.blocks, stored.reasons) == (7, 7, {ERASED: 7})
    assert embedded.hold(OURS, PROMPT, "mine", 60.0).outcome is HoldOutcome.NOT_HELD
    assert embedded.longest_prefix(OTHER, PROMPT).tokens == 96


def test_what_is_erased_while_it_is_read_is_not_delivered(
    embedded: Samovar, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = embedded.longest_prefix(OURS, PROMPT)
    read = LocalTransport.read

    def read_late(
        transport: LocalTransport, reads: Sequence[CellRead], deadline: Deadline
    ) -> list[ReadOutcome]:
        outcomes = read(transport, reads, deadline)
        embedded.erase("somebody")
        return outcomes

    monkeypatch.setattr(LocalTransport, "read", read_late)
    fetched = embedded.get_into(plan, Rows(100))
    assert (fetched.tokens, fetched.start) == (0, 0)
    assert fetched.failures == {"GONE": plan.nodes.size}


def test_a_renewed_namespace_begins_anew(embedded: Samovar) -> None:
    assert embedded.renewed(OURS) is OURS
    assert embedded.erase("somebody").complete
    renewed = embedded.renewed(OURS)
    assert renewed == replace(OURS, tenant_epoch=1)
    assert embedded.renewed(renewed) is renewed
    assert embedded.renewed(OTHER) is OTHER
    assert embedded.longest_prefix(renewed, PROMPT).tokens == 0
    assert embedded.put(renewed, PROMPT, Rows(100, seed=1)).stored == 6
    assert embedded.longest_prefix(renewed, PROMPT).tokens == 96
    assert embedded.erase("somebody").epoch == 2
    assert embedded.longest_prefix(renewed, PROMPT).tokens == 0


@pytest.fixture
def two() -> Iterator[tuple[Served, Served]]:
    with shared_folder() as folder, two_served(folder) as nodes:
        yield nodes


def test_clients_of_every_node_go_by_it_when_it_is_answered(two: tuple[Served, Served]) -> None:
    first, second = two
    with client_of(first) as near, client_of(second) as far:
        for client in (near, far):
            assert client.renewed(OURS) is OURS
        assert near.erase("somebody") == Erased(1)
        for client in (near, far):
            assert client.renewed(OURS).tenant_epoch == 1
    with client_of(second) as late:
        assert late.renewed(OURS).tenant_epoch == 1, "told before its session was open"


def test_many_erased_tenants_come_in_pages(two: tuple[Served, Served]) -> None:
    first, _ = two
    names = [f"tenant {number}" for number in range(PAGE_TENANTS_MAX + 3)]
    tenants = np.array([list(tenant_digest(name)) for name in names], np.uint8)
    page = EpochPage(tenants, np.ones(len(names), np.uint64))
    assert first.call(lambda: first.node.life.raise_epochs(page))
    with client_of(first) as client:
        for name in (names[0], names[-1]):
            assert client.renewed(replace(OURS, tenant=name)).tenant_epoch == 1


def test_an_erasure_tells_only_what_has_changed(two: tuple[Served, Served]) -> None:
    first, _ = two
    names = [f"tenant {number}" for number in range(5)]
    tenants = np.array([list(tenant_digest(name)) for name in names], np.uint8)
    page = EpochPage(tenants, np.ones(len(names), np.uint64))
    assert first.call(lambda: first.node.life.raise_epochs(page))
    with closing(ControlClient(first.address)) as control:
        assert control.session
        told: list[int] = []
        take = control._session._take_epochs

        def note(news: TenantEpochs) -> None:
            told.append(len(news.epochs) // 8)
            take(news)

        control._session._take_epochs = note  # type: ignore[method-assign, assignment]
        for name, epoch in (("somebody", 1), (names[0], 2), ("somebody", 2)):
            spread = control.life.erase(tenant_digest(name))
            assert (spread.number, spread.durable) == (epoch, True)
            assert control.life.epoch_of(tenant_digest(name)) == epoch
        assert told == [1, 1, 1]
    with closing(ControlClient(first.address)) as late:
        assert late.session
        expected = {"somebody": 2, names[0]: 2, names[4]: 1}
        assert {name: late.life.epoch_of(tenant_digest(name)) for name in expected} == expected


def test_a_node_that_is_away_is_pending_and_learns_it_from_its_neighbour(
    two: tuple[Served, Served],
) -> None:
    first, second = two
    away = replace(second.info, control="127.0.0.1:1")
    first.join_map(ClusterMap.of(2, [first.info, away]))
    with client_of(first) as near, client_of(second) as far:
        assert near.erase("somebody") == Erased(1, ("node-2",))
        tenant = tenant_digest("somebody")
        assert second.node.life.tenants.epoch_of(tenant) == 0
        first.join_map(ClusterMap.of(3, [first.info, second.info]))
        first.beats_until(lambda: second.node.life.tenants.epoch_of(tenant) == 1)
        second.beats_until(lambda: far.renewed(OURS).tenant_epoch == 1)


@pytest.fixture
def small(two: tuple[Served, Served]) -> tuple[Served, Served]:
    """Both go by the blocks of ``OURS``."""
    for node in two:
        node.join_map(ClusterMap.of(2, [one.info for one in two], BLOCK))
    return two


def test_what_is_held_after_an_erasure_is_of_the_new_epoch(small: tuple[Served, Served]) -> None:
    with client_of(small[0]) as client:
        assert client.erase("somebody") == Erased(1)
        renewed = client.renewed(OURS)
        assert client.put(renewed, PROMPT, Rows(100, seed=1)).complete
        assert client.hold(renewed, PROMPT, "by tokens", 60.0).granted
        keys = Chain.of(renewed, PROMPT).keys
        assert client.hold_keys(keys, "by keys", 60.0, "somebody").granted


def test_a_node_that_may_not_know_of_an_erasure_opens_no_session(
    small: tuple[Served, Served],
) -> None:
    first, second = small
    with client_of(first) as client:
        assert client.put(OURS, PROMPT, Rows(100, seed=1)).complete
        first.call(first.node.seal)
        assert first.node.stats().sessions == 0
        with closing(ControlClient(first.address)) as control:
            with pytest.raises(UnavailableError, match="does not know yet which tenants"):
                assert control.session
            assert not control.has_session()
        stored = client.put(OURS, PROMPT, Rows(100, seed=1), start=64)
        assert (stored.failed, stored.blocks) == (2, 2), "it may not know yet that it has none"
        with pytest.raises(UnavailableError, match="not heard from all others"):
            client.erase("somebody")
        with client_of(second) as other:
            assert other.erase("somebody") == Erased(1)
        with client_of(first) as late:
            assert late.longest_prefix(OURS, PROMPT).tokens == 0
            assert late.put(OURS, PROMPT, Rows(100, seed=1)).stored == 0
            assert late.renewed(OURS).tenant_epoch == 1, "the other node has told it"
        first.call(first.node.life.unseal)
        renewed = client.renewed(OURS)
        eventually(lambda: client.put(renewed, PROMPT, Rows(100, seed=1)).complete)


def test_a_client_that_no_node_tells_of_erasures_stores_nothing_and_finds_nothing(
    small: tuple[Served, Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = small
    with client_of(first) as client:
        assert client.put(OURS, PROMPT, Rows(100, seed=1)).complete
        assert client.longest_prefix(OURS, PROMPT).tokens == 96
        second.stop()
        monkeypatch.setattr(sessions, "SESSIONS_MAX", 1)
        with client_of(first) as late:
            assert late.longest_prefix(OURS, PROMPT).tokens == 0
            assert late.put(OURS, PROMPT, Rows(100, seed=1)).reasons == {UNTOLD: 6}
            assert late.renewed(OURS) is OURS


def test_an_erasure_by_a_node_that_knows_less_than_others_is_not_done(
    two: tuple[Served, Served],
) -> None:
    """One with a new disk begins to count anew."""
    first, second = two
    tenant = tenant_digest("somebody")
    for _ in range(3):
        second.call(lambda: second.node.life.erase(tenant))
    with client_of(first) as client:
        assert client.erase("somebody") == Erased(1, ("node-2",))
        first.beats_until(lambda: first.node.life.tenants.epoch_of(tenant) == 3)
        assert client.erase("somebody") == Erased(4)


def test_a_client_that_does_not_confirm_is_waited_for_only_while_it_may_live(
    two: tuple[Served, Served],
) -> None:
    first, _ = two
    with closing(ControlClient(first.address)) as control:
        assert control.session
        # As a client that has stopped: it has been told, and says nothing.
        control._session._take_epochs = lambda told: None  # type: ignore[method-assign]
        tenant = tenant_digest("somebody")
        spread = control.life.erase(tenant)
        assert (spread.number, spread.durable) == (1, False), "it beats, and goes by the old epoch"
        assert control.life.epoch_of(tenant) == 0


def test_without_the_own_node_nothing_is_erased(two: tuple[Served, Served]) -> None:
    first, _ = two
    with client_of(first) as client:
        first.stop()
        with pytest.raises(UnavailableError, match=first.address):
            client.erase("somebody")
