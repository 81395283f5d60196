"""Deleting and promising, over real ports: who is told, who is pending, what is undone."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from kvstore.answers import Deleted, Held, Released
from kvstore.calls import DELETE_KEYS_MAX, HoldOutcome, NodeStats
from kvstore.client import Samovar
from kvstore.clock import ManualClock
from kvstore.cluster_map import ClusterMap, NodeInfo
from kvstore.errors import UnavailableError, UsageError
from kvstore.key import Chain, Keys
from tests.one_prompt import BLOCK, NAMESPACE, PROMPT, Rows
from tests.served import PAYLOAD_BYTES, Served, client_of, put_on, some_keys, two_served
from tests.worlds import shared_folder

BOUNDARIES = (70,)


@pytest.fixture
def embedded() -> Iterator[Samovar]:
    with Samovar.open(4 << 20, clock=ManualClock(), block_tokens=BLOCK) as tier:
        assert tier.put(NAMESPACE, PROMPT, Rows(100, seed=1), boundaries=BOUNDARIES).complete
        yield tier


def warm(tier: Samovar, boundaries: tuple[int, ...] = ()) -> int:
    return tier.longest_prefix(NAMESPACE, PROMPT, boundaries).tokens


def test_what_was_deleted_is_found_no_more_and_may_be_put_again(embedded: Samovar) -> None:
    assert warm(embedded) == 96
    assert embedded.delete(NAMESPACE, PROMPT, boundaries=BOUNDARIES) == Deleted(7)
    assert warm(embedded, BOUNDARIES) == 0
    assert embedded.put(NAMESPACE, PROMPT, Rows(100, seed=1)).stored == 6
    assert warm(embedded) == 96


@pytest.mark.parametrize(("start", "left"), [(15, 0), (16, 16), (40, 32), (96, 96)])
def test_blocks_before_the_start_stay(embedded: Samovar, start: int, left: int) -> None:
    deleted = embedded.delete(NAMESPACE, PROMPT, start)
    assert (deleted.blocks, deleted.complete) == (6 - start // BLOCK, True)
    assert warm(embedded) == left


def test_a_tail_is_deleted_where_it_is_named(embedded: Samovar) -> None:
    embedded.delete(NAMESPACE, PROMPT, start=80)
    assert embedded.delete(NAMESPACE, PROMPT[:70], start=64, boundaries=BOUNDARIES).blocks == 1
    assert warm(embedded, BOUNDARIES) == 80
    assert embedded.longest_prefix(NAMESPACE, PROMPT[:75], BOUNDARIES).tokens == 64


def test_a_start_outside_the_prompt_deletes_nothing(embedded: Samovar) -> None:
    with pytest.raises(UsageError, match="outside the 100 tokens"):
        embedded.delete(NAMESPACE, PROMPT, start=101)
    assert warm(embedded) == 96


def test_keys_without_end_are_deleted_in_parts(embedded: Samovar) -> None:
    chain = Chain.of(NAMESPACE, PROMPT)
    many = np.concatenate([some_keys(DELETE_KEYS_MAX), chain.keys])
    assert embedded.delete_keys(many).blocks == DELETE_KEYS_MAX + 6
    assert warm(embedded) == 0


@pytest.fixture
def two() -> Iterator[tuple[Served, Served]]:
    with shared_folder() as folder, two_served(folder) as nodes:
        yield nodes


def held(served: Served, keys: Keys) -> int:
    """How many of these blocks the node shows."""
    rows = [keys[row : row + 1] for row in range(len(keys))]
    return served.call(lambda: sum(served.node.lookup(row, 1) for row in rows))


def _map(epoch: int, *infos: NodeInfo) -> ClusterMap:
    return ClusterMap.of(epoch, infos)


def test_a_delete_reaches_every_node_of_the_map(two: tuple[Served, Served]) -> None:
    keys = some_keys(5)
    for served in two:
        put_on(served, keys)
    with client_of(two[0]) as client:
        assert client.delete_keys(keys[:4]) == Deleted(4)
    for served in two:
        assert held(served, keys) == 1
    first, second = (served.neighbourhood.books for served in two)
    assert first == second
    assert first.burials.burials == 4


def test_a_node_that_is_down_is_pending_and_hears_of_it_later(two: tuple[Served, Served]) -> None:
    first, second = two
    keys = some_keys(3)
    put_on(second, keys)
    far = replace(second.info, control="127.0.0.1:1")
    first.call(lambda: first.neighbourhood.follow(_map(2, first.info, far)))
    with client_of(first) as client:
        deleted = client.delete_keys(keys)
        assert (deleted.pending, deleted.complete) == (("node-2",), False)
    assert held(second, keys) == 3
    first.call(lambda: first.neighbourhood.follow(_map(3, first.info, second.info)))
    first.beats_until(lambda: held(second, keys) == 0)


def test_without_the_own_node_a_delete_is_unavailable(two: tuple[Served, Served]) -> None:
    with client_of(two[0]) as client:
        address = two[0].address
        two[0].stop()
        with pytest.raises(UnavailableError, match=address):
            client.delete_keys(some_keys(1))


def hold(tier: Samovar, handle: str, tokens: list[int] = PROMPT, ttl_s: float = 60.0) -> Held:
    return tier.hold(NAMESPACE, tokens, handle, ttl_s, BOUNDARIES)


def test_a_promise_keeps_a_prefix_under_any_pressure_until_it_is_released(
    embedded: Samovar,
) -> None:
    held = hold(embedded, "mine")
    assert (held.granted, held.tokens) == (True, 96)
    assert held.bytes == 96 * 3 * 4 * 8
    for seed in range(60):
        embedded.put(NAMESPACE, [seed, *PROMPT], Rows(101, seed=seed))
    assert warm(embedded) == 96
    assert embedded.release("mine") == Released(True)
    assert embedded.release("mine") == Released(False)
    for seed in range(60):
        embedded.put(NAMESPACE, [seed, *PROMPT], Rows(101, seed=seed))
    assert warm(embedded) == 0


def test_what_is_not_there_is_not_promised(embedded: Samovar) -> None:
    assert hold(embedded, "mine", [1, *PROMPT]) == Held(HoldOutcome.NOT_HELD)
    key = some_keys(1)
    assert embedded.hold_keys(key, "mine", 60.0) == Held(HoldOutcome.NOT_HELD)
    assert embedded.release("mine").found is False


@pytest.mark.parametrize("replicas", [0, 3])
def test_copies_that_cannot_be_are_a_callers_bug(embedded: Samovar, replicas: int) -> None:
    with pytest.raises(UsageError, match="replicas must be 1 to 2"):
        embedded.hold(NAMESPACE, PROMPT, "mine", 60.0, replicas=replicas)
    with pytest.raises(UsageError, match="replicas must be 1 to 2"):
        embedded.hold_keys(some_keys(1), "mine", 60.0, replicas=replicas)


def test_a_lone_node_promises_one_of_two_copies(embedded: Samovar) -> None:
    assert embedded.hold(NAMESPACE, PROMPT, "mine", 60.0, replicas=2).granted
    (block,) = embedded.inspect(Chain.of(NAMESPACE, PROMPT).keys[:1]).nodes["embedded"]
    (mark,) = block.holds
    assert (mark.copies, mark.replicas) == (1, 2)
    assert embedded.stats().short_holds == 1


def test_a_promise_by_keys_is_the_same(embedded: Samovar) -> None:
    keys = Chain.of(NAMESPACE, PROMPT).keys
    held = embedded.hold_keys(keys, "mine", 60.0)
    assert held == replace(hold(embedded, "mine"), tokens=0)
    (marks,) = {block.holds for block in embedded.inspect(keys).nodes["embedded"]}
    assert [mark.handle for mark in marks] == ["mine"]


def test_over_its_budget_a_tenant_is_declined_and_keeps_what_it_had(embedded: Samovar) -> None:
    assert hold(embedded, "mine").granted
    outcomes = []
    for seed in range(40):
        prompt = [seed, *PROMPT]
        embedded.put(NAMESPACE, prompt, Rows(101, seed=seed))
        outcomes.append(hold(embedded, f"more {seed}", prompt).outcome)
    assert HoldOutcome.OVER_BUDGET in outcomes
    assert hold(embedded, "mine", [39, *PROMPT]).outcome is HoldOutcome.OVER_BUDGET
    assert embedded.release("mine").found, "its extension was declined, not itself"


@pytest.mark.parametrize("ttl_s", [0, -1, 366 * 24 * 3600, 0.0001])
def test_impossible_promises_are_refused(embedded: Samovar, ttl_s: float) -> None:
    with pytest.raises(UsageError, match="ttl_s must be"):
        hold(embedded, "mine", ttl_s=ttl_s)
    with pytest.raises(UsageError, match="handle"):
        hold(embedded, "")


def test_all_nodes_promise_or_none(two: tuple[Served, Served]) -> None:
    first, second = two
    keys = some_keys(4)
    put_on(first, keys[:2])
    put_on(second, keys[2:])
    with client_of(first) as client:
        held = client.hold_keys(keys, "mine", 60.0, tenant="somebody")
        assert (held.granted, held.bytes) == (True, 4 * PAYLOAD_BYTES)
        for served in two:
            assert client_stats(served).holds == 1
        assert client.release("mine", "somebody") == Released(True)
        second.call(lambda: setattr(second.node.life.holds, "tenant_bytes_max", 0))
        held = client.hold_keys(keys, "mine", 60.0, tenant="somebody")
        assert (held.outcome, held.node) == (HoldOutcome.OVER_BUDGET, "node-2")
        assert [client_stats(served).holds for served in two] == [0, 0]


def client_stats(served: Served) -> NodeStats:
    return served.call(served.node.stats)


def test_inspection_says_where_a_block_is_and_who_is_silent(two: tuple[Served, Served]) -> None:
    first, second = two
    keys = some_keys(300)
    put_on(second, keys[:1])
    with client_of(first) as client:
        client.delete_keys(keys[1:2])
        found = client.inspect(keys)
        assert found.silent == ()
        block, gone = found.nodes["node-2"][:2]
        assert (block.key, block.arena_mask, block.disk_mask) == (keys[0].tobytes(), 1, 0)
        assert (block.ttl_s, block.buried_ms_ago, block.holds) == (0, None, ())
        assert (gone.arena_mask, gone.buried_ms_ago) == (0, 0)
        assert found.nodes["node-1"][0].arena_mask == 0
        assert len(found.nodes["node-1"]) == 300
        second.stop()
        assert client.inspect(keys[:1]).silent == ("node-2",)
