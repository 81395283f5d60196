"""Bytes that change in memory or on the wire are never believed, and do not stay."""

from dataclasses import replace

import pytest

from tests.hold.flipping_proxy import flipping
from tests.hold.processes import Tier, settles, stats_of
from tests.served import eventually

TOKENS = 160


def test_hold_a_byte_flipped_in_the_own_arena_is_a_miss_and_dropped(tier: Tier) -> None:
    node = tier.node()
    worker = tier.client(node)
    worker.stores(1, TOKENS)
    worker.stores(2, TOKENS)
    node.flip(1, block=6)
    fetched = worker.fetch(1, TOKENS)
    assert (fetched["planned"], fetched["tokens"]) == (TOKENS, 96)
    assert fetched["failures"] == {"CORRUPT": 1}
    eventually(lambda: stats_of(node).host.damaged == 1)
    assert worker.fetch(1, TOKENS)["planned"] == 96, "it is gone, not found again and again"
    assert worker.fetch(2, TOKENS)["tokens"] == TOKENS
    assert worker.put(1, TOKENS)["stored"] == 1
    assert worker.fetch(1, TOKENS)["tokens"] == TOKENS
    assert settles(node).host.held_cells == 2 * TOKENS // 16


def test_hold_a_byte_flipped_in_another_nodes_arena_is_a_miss_and_dropped(tier: Tier) -> None:
    near, far = tier.node(0), tier.node(1)
    tier.publish(near.info, far.info)
    writer, reader = tier.client(far), tier.client(near)
    writer.stores(1, TOKENS)
    writer.stores(2, TOKENS)
    reader.finds(1, TOKENS)
    reader.finds(2, TOKENS)
    far.flip(1, block=6)
    fetched = reader.fetch(1, TOKENS)
    assert (fetched["planned"], fetched["tokens"]) == (TOKENS, 96)
    assert fetched["failures"]["CORRUPT"] == 1
    eventually(lambda: stats_of(far).host.damaged == 1)
    eventually(lambda: reader.fetch(1, TOKENS)["planned"] == 96)
    assert writer.put(1, TOKENS)["stored"] == 1
    reader.finds(1, TOKENS)
    assert reader.fetch(2, TOKENS)["tokens"] == TOKENS
    assert settles(far).host.held_cells == 2 * TOKENS // 16


@pytest.mark.parametrize(
    ("part", "at"), [("status", 42), ("digest", 44), ("header", 500), ("payload", 20_000)]
)
def test_hold_a_byte_flipped_on_the_wire_is_read_again(tier: Tier, part: str, at: int) -> None:
    near, far = tier.node(0), tier.node(1)
    with flipping(far.info.bulk, at) as (address, proxy):
        tier.publish(near.info, replace(far.info, bulk=address))
        writer, reader = tier.client(far), tier.client(near)
        writer.stores(1, TOKENS)
        eventually(lambda: reader("plan", 1, TOKENS)["tokens"] == TOKENS)
        fetched = reader.fetch(1, TOKENS)
        assert proxy.flipped
        if part == "status":  # what makes no sense ends its connection
            assert fetched["tokens"] < TOKENS
            assert set(fetched["failures"]) == {"FAILED"}
        else:  # under a lease it is read at once again
            assert (fetched["tokens"], fetched["failures"]) == (TOKENS, {})
        reader.finds(1, TOKENS)
        stats = settles(far).host
        assert (stats.held_cells, stats.damaged) == (TOKENS // 16, 0), "the node's copy is whole"
