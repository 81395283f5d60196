"""More than the arena holds, on a real disk: found, right, and warm after the machine died."""

import shutil
from pathlib import Path

from tests.hold.processes import StorageNode, Tier, stats_of
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


def test_hold_what_the_arena_has_no_room_for_is_found_on_the_disk(
    tier: Tier, tmp_path: Path
) -> None:
    node = tier.node(arena_bytes=ARENA_BYTES, nvme_folder=tmp_path)
    tier.publish(node.info)
    writer, far = tier.client(node), tier.client(node, "another host")
    eventually(lambda: stats_of(node).nvme.capacity_bytes)
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
