"""A cluster whose processes were all killed and whose memory is gone: warm from its disks.

Found by everybody, in every order of coming back, once all are there to say what was deleted. The
same with Ray is slow. Does not cover: what a kill does to the files (``test_hold_disk``).
"""

import os
import random
import shutil
import signal
import threading
from functools import partial
from pathlib import Path

import pytest

from kvstore.tiers.nvme import worker
from tests.hold.processes import Client, StorageNode, Tier, settles, stats_of
from tests.served import eventually

ARENA_BYTES = 2 << 20
TOKENS = 160
BLOCKS = 10
FIRST, SECOND = range(1, 5), range(11, 15)
"""Prompts of the first node, and of the second."""


def opens(node: StorageNode) -> None:
    """Wait until the node's disk has been read."""
    eventually(lambda: stats_of(node).nvme.capacity_bytes)


def holds_on_disk(node: StorageNode, cells: int) -> bool:
    return stats_of(node).nvme.held_cells >= cells


def written_down(node: StorageNode, client: Client, prompts: range) -> None:
    """Store prompts and use them again, until they are on the node's disk."""
    opens(node)
    for _ in range(2):
        for prompt in prompts:
            client.stores(prompt, TOKENS)
    eventually(lambda: stats_of(node).nvme.held_cells == len(prompts) * BLOCKS)


def cold(nodes: list[StorageNode]) -> None:
    """Every process is gone, and all memory."""
    for node in nodes:
        node.kill()
    for node in nodes:
        shutil.rmtree(node.info.arena_folder)


def two_nodes(tier: Tier, disk: Path) -> list[StorageNode]:
    nodes = [tier.node(n, arena_bytes=ARENA_BYTES, nvme_folder=disk) for n in range(2)]
    tier.publish(*(node.info for node in nodes))
    for node, prompts in zip(nodes, (FIRST, SECOND), strict=True):
        written_down(node, tier.client(node), prompts)
    return nodes


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_hold_a_whole_cluster_is_warm_from_its_disks(
    tier: Tier, tmp_path: Path, order: tuple[int, int]
) -> None:
    nodes = two_nodes(tier, tmp_path)
    before = [stats_of(node).nvme for node in nodes]
    cold(nodes)
    tier.restart(nodes, *order)
    for node, was in zip(nodes, before, strict=True):
        reader = tier.client(node)
        for prompt in (*FIRST, *SECOND):
            reader.finds(prompt, TOKENS)
        # What was read from the other node's disk is in that one's arena, not on this disk.
        stats = stats_of(node).nvme
        assert (stats.held_cells, stats.held_bytes) == (was.held_cells, was.held_bytes)
    for node in nodes:
        settles(node)


def test_hold_lost_memory_of_one_node_leaves_the_other_as_it_was(
    tier: Tier, tmp_path: Path
) -> None:
    """One machine boots anew, on the other only the process is killed."""
    nodes = two_nodes(tier, tmp_path)
    for node in nodes:
        node.kill()
    shutil.rmtree(nodes[0].info.arena_folder)
    nodes = [tier.started(node.restarted()) for node in nodes]
    tier.publish(*(node.info for node in nodes))
    assert [stats_of(node).host.adopted for node in nodes] == [0, len(SECOND) * BLOCKS]
    for node in nodes:
        reader = tier.client(node)
        for prompt in (*FIRST, *SECOND):
            reader.finds(prompt, TOKENS)
    for node in nodes:
        eventually(partial(holds_on_disk, node, len(FIRST) * BLOCKS))
        settles(node)


@pytest.mark.parametrize("rounds", [4, pytest.param(30, marks=pytest.mark.slow)])
def test_hold_kills_under_load_leave_right_bytes_and_exact_sums(
    tier: Tier, tmp_path: Path, rounds: int
) -> None:
    """At any moment of storing, writing down and evicting; now the node, now its disk process."""
    script, pause = random.Random(5), threading.Event()
    node = tier.node(arena_bytes=ARENA_BYTES, nvme_folder=tmp_path, nvme_bytes=16 << 20)
    tier.publish(node.info)
    for begin in range(0, rounds * 10, 10):
        writer = tier.client(node)
        opens(node)
        for prompt in range(begin, begin + 5):
            writer.put(prompt, 1600)
        victim = script.choice((node.pid, node.child(worker.__name__).pid))
        writer.order("put", begin + 5, 1600)
        pause.wait(script.uniform(0.0, 0.1))
        os.kill(victim, signal.SIGKILL)
        writer.hear()
        if victim == node.pid:
            node.kill()
            if script.random() < 0.5:
                shutil.rmtree(node.info.arena_folder)
            node = tier.started(node.restarted())
            tier.publish(node.info)
        reader = tier.client(node)
        for prompt in range(max(0, begin - 5), begin + 6):
            reader.fetch(prompt, 1600)
        settles(node)
        stats = stats_of(node).nvme
        assert stats.held_bytes <= stats.capacity_bytes
        for client in (writer, reader):
            client.close()
