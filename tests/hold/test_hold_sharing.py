"""Who shares blocks and who must not: namespaces, and ranks of one model."""

import pytest

from tests.hold.processes import Tier, settles, stats_of
from tests.served import eventually

TOKENS = 160
BLOCKS = 10


@pytest.mark.parametrize("reader_at", [0, 1])
def test_hold_two_namespaces_with_equal_tokens_share_nothing(tier: Tier, reader_at: int) -> None:
    nodes = [tier.node(0), tier.node(1)]
    tier.publish(*(node.info for node in nodes))
    writer, reader = tier.client(nodes[0]), tier.client(nodes[reader_at])
    writer.stores(1, TOKENS, tenant="one")
    reader.finds(1, TOKENS, tenant="one")
    assert reader("plan", 1, TOKENS, tenant="two")["tokens"] == 0
    assert writer.put(1, TOKENS, tenant="two")["present"] == 0
    reader.finds(1, TOKENS, tenant="two")
    assert reader.fetch(1, TOKENS, tenant="one")["tokens"] == TOKENS
    assert settles(nodes[0]).host.held_cells == 2 * BLOCKS


@pytest.mark.parametrize("readers_at", [0, 1])
def test_hold_ranks_read_their_halves_and_mind_no_damage_in_the_other(
    tier: Tier, readers_at: int
) -> None:
    nodes = [tier.node(0), tier.node(1)]
    tier.publish(*(node.info for node in nodes))
    writer = tier.client(nodes[0])
    ranks = [tier.client(nodes[readers_at]) for _ in (0, 1)]
    masks = (1, 2)
    writer.stores(1, TOKENS, split=True)
    for rank, mask in zip(ranks, masks, strict=True):
        rank.finds(1, TOKENS, split=True, mask=mask)
    nodes[0].flip(1, block=6, cell=1, split=True)
    assert ranks[0].fetch(1, TOKENS, split=True, mask=1)["tokens"] == TOKENS
    assert ranks[1].fetch(1, TOKENS, split=True, mask=2)["tokens"] == 96
    eventually(lambda: stats_of(nodes[0]).host.damaged == 1)
    eventually(lambda: ranks[1]("plan", 1, TOKENS, split=True, mask=2)["tokens"] == 96)
    assert ranks[0].fetch(1, TOKENS, split=True, mask=1)["tokens"] == TOKENS
    assert writer.put(1, TOKENS, split=True)["stored"] == 1, "only the damaged half"
    ranks[1].finds(1, TOKENS, split=True, mask=2)
    writer.finds(1, TOKENS, split=True)
    assert settles(nodes[0]).host.held_cells == 2 * BLOCKS


def test_hold_a_prompt_that_fills_the_arena_is_read_whole_from_another_node(tier: Tier) -> None:
    """A session leases no more than half of an arena at a time."""
    blocks = 109
    nodes = [tier.node(0, arena_bytes=1 << 20), tier.node(1)]
    tier.publish(*(node.info for node in nodes))
    tier.client(nodes[0]).stores(1, blocks * 16)
    tier.client(nodes[1]).finds(1, blocks * 16)
    assert settles(nodes[0]).host.held_cells == blocks
