"""More than the arena holds, on a real disk: found, right, and warm after the machine died."""

import os
import shutil
import signal
from pathlib import Path

from kvstore.tiers.nvme import worker
from tests.hold.processes import Client, StorageNode, Tier, settles, state_of, stats_of
from tests.served import eventually

ARENA_BYTES = 1 << 20
TOKENS = 160
BLOCKS = 10
CELL_BYTES = 8192
PROMPTS = range(1, 53)
"""Four arenas full."""


def spills(node: StorageNode, cells: int) -> None:
    """Wait until that many cells are on the disk."""
    eventually(lambda: stats_of(node).nvme.held_cells >= cells)


def opened(tier: Tier, disk: Path) -> tuple[StorageNode, Client, Client]:
    """A node whose disk has been read, a client on its host, and one on another."""
    node = tier.node(arena_bytes=ARENA_BYTES, nvme_folder=disk)
    tier.publish(node.info)
    near, far = tier.client(node), tier.client(node, "another host")
    eventually(lambda: stats_of(node).nvme.capacity_bytes)
    return node, near, far


def test_hold_what_the_arena_has_no_room_for_is_found_on_the_disk(
    tier: Tier, tmp_path: Path
) -> None:
    node, writer, far = opened(tier, tmp_path)
    for prompt in PROMPTS:
        writer.stores(prompt, TOKENS)
        spills(node, prompt * BLOCKS - ARENA_BYTES * 3 // 4 // CELL_BYTES)
    for prompt in PROMPTS[-12:]:
        writer.stores(prompt, TOKENS)
    spills(node, len(PROMPTS) * BLOCKS)
    for reader in (far, writer):
        for prompt in PROMPTS:
            reader.finds(prompt, TOKENS)
        assert reader.fetch(1, TOKENS)["by_source"]["nvme"] == TOKENS
    node.kill()
    shutil.rmtree(node.info.arena_folder)
    successor = tier.started(node.restarted())
    spills(successor, len(PROMPTS) * BLOCKS)
    tier.publish(successor.info)
    for late in (tier.client(successor, "another host"), tier.client(successor)):
        for prompt in PROMPTS:
            late.finds(prompt, TOKENS)


def test_hold_a_burst_on_a_disk_that_stands_still_is_stored_and_loses_the_oldest(
    tier: Tier, tmp_path: Path
) -> None:
    node, writer, far = opened(tier, tmp_path)
    for prompt in PROMPTS[:4]:
        writer.stores(prompt, TOKENS)
        writer.stores(prompt, TOKENS)
    spills(node, 4 * BLOCKS)
    disk = node.child(worker.__name__).pid
    os.kill(disk, signal.SIGSTOP)
    eventually(lambda: state_of(disk) == "T")
    for prompt in PROMPTS[4:]:
        writer.stores(prompt, TOKENS)
        writer.finds(prompt, TOKENS)
        stats = stats_of(node)
        assert stats.host.held_bytes <= stats.host.capacity_bytes == ARENA_BYTES
        assert stats.nvme.held_cells == 4 * BLOCKS
    assert stats_of(node).host.dropped_unspilled > 0
    os.kill(disk, signal.SIGCONT)
    eventually(lambda: stats_of(node).nvme.held_cells > 4 * BLOCKS)
    settles(node)
    found = {}
    for reader in (far, writer):
        for prompt in PROMPTS:
            found[prompt] = reader.fetch(prompt, TOKENS)["tokens"]
        assert all(found[prompt] == TOKENS for prompt in PROMPTS[:4]), "on the disk, never dropped"
        assert all(found[prompt] == TOKENS for prompt in PROMPTS[-5:]), "in the arena"
        lost = len(PROMPTS) * BLOCKS - sum(found.values()) * BLOCKS // TOKENS
        assert 0 < lost <= stats_of(node).host.dropped_unspilled, "counted"
