"""What was deleted never comes back: not from a node that was down, stopped, or full of it on disk.

The nodes are real processes; blocks are on both, in arenas and on disks. Whoever was not reached is
said to be pending, and shows nothing of it when it is back.
"""

from functools import partial
from pathlib import Path

import pytest

from kvstore.key import Chain
from tests.hold import prompts
from tests.hold.processes import StorageNode, Tier, client_of, settles, stats_of
from tests.hold.prompts import fetched, right
from tests.hold.two_prompts import BLOCKS, GONE, KEPT, SPACE, TOKENS, finds_what_was_kept
from tests.served import eventually


def store(node: StorageNode, *stored: int) -> None:
    with client_of(node) as client:
        for prompt in stored:
            tokens = prompts.token_ids(prompt, TOKENS)
            for _ in range(2):  # used twice: worth writing to the disk
                assert client.put(SPACE, tokens, right(prompt)).complete


def delete(node: StorageNode) -> tuple[str, ...]:
    """Who is pending of a delete that this node is asked for."""
    with client_of(node) as client:
        deleted = client.delete(SPACE, prompts.token_ids(GONE, TOKENS))
        assert deleted.blocks == BLOCKS
        return deleted.pending


def filled(tier: Tier, folder: Path | None = None) -> list[StorageNode]:
    """Two nodes which both have both prompts; with a folder on their disks, too."""
    nodes = [
        tier.node(index, nvme_folder=None if folder is None else folder / str(index))
        for index in (0, 1)
    ]
    tier.publish(*(node.info for node in nodes))
    for node in nodes:
        store(node, GONE, KEPT)
        if folder is not None:
            eventually(partial(is_on_disk, node))
    return nodes


def is_on_disk(node: StorageNode) -> bool:
    return stats_of(node).nvme.held_cells == 2 * BLOCKS


def stays_away(nodes: list[StorageNode]) -> None:
    """Everybody finds what was kept; the rest is nowhere, whoever is asked."""
    for node in nodes:
        for host_id in (None, "another host"):
            with client_of(node, host_id) as reader:
                eventually(partial(finds_what_was_kept, reader))
                assert fetched(reader, GONE, TOKENS) == 0
        eventually(partial(is_buried, node))


def is_buried(node: StorageNode) -> bool:
    """What a neighbour told of is buried when the disk has let go of it."""
    keys = Chain.of(SPACE, prompts.token_ids(GONE, TOKENS)).keys
    with client_of(node) as client:
        blocks = client.inspect(keys).nodes[node.info.node_id]
        return all(
            block.arena_mask == block.disk_mask == 0 and block.buried_ms_ago is not None
            for block in blocks
        )


@pytest.mark.parametrize("on_disk", [False, True])
def test_hold_a_delete_while_a_node_is_dead(tier: Tier, tmp_path: Path, on_disk: bool) -> None:
    nodes = filled(tier, tmp_path if on_disk else None)
    nodes[1].kill()
    assert delete(nodes[0]) == ("node-1",)
    tier.restart(nodes, 1)
    stays_away(nodes)
    for order in ((0, 1), (1, 0)):
        tier.restart_all(nodes, *order)
        stays_away(nodes)
    eventually(lambda: not stats_of(nodes[1]).is_sealed)
    store(nodes[1], GONE)
    with client_of(nodes[0]) as reader:
        eventually(lambda: fetched(reader, GONE, TOKENS) == TOKENS)


def test_hold_a_delete_while_a_node_stands_still(tier: Tier) -> None:
    nodes = filled(tier)
    with client_of(nodes[1]) as reader:
        assert fetched(reader, GONE, TOKENS) == TOKENS
        nodes[1].freeze()
        assert delete(nodes[0]) == ("node-1",)
        nodes[1].thaw()
        eventually(lambda: fetched(reader, GONE, TOKENS) == 0)
    stays_away(nodes)
    settles(nodes[1])


def test_hold_the_arena_of_a_node_that_was_lost_is_not_read_for_long(tier: Tier) -> None:
    nodes = filled(tier)
    with client_of(nodes[1]) as reader:
        assert fetched(reader, GONE, TOKENS) == TOKENS
        nodes[1].kill()
        assert delete(nodes[0]) == ("node-1",)
        eventually(lambda: fetched(reader, GONE, TOKENS) == 0)
        tier.restart(nodes, 1)
        stays_away(nodes)
        assert fetched(reader, GONE, TOKENS) == 0


def test_hold_all_nodes_die_right_after_the_answer(tier: Tier, tmp_path: Path) -> None:
    nodes = filled(tier, tmp_path)
    assert delete(nodes[0]) == ()
    tier.restart_all(nodes, 0, 1)
    stays_away(nodes)
