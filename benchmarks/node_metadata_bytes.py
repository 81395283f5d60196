"""Row ``node_metadata_bytes``: what a node remembers for each block that it holds.

In a process of its own a node's tier is filled with tiny blocks through the node's own calls, and
announced to a directory shard; a second node announces as many others, because with two homes for
every span a shard remembers two blocks for each one that its node holds.

Counted: the table's file (slot records and entries), and by how much the process's own memory
grew, whatever for. Not counted: payload, the header page in front of each payload, and what malloc
keeps of memory that was freed, which is said beside.
"""

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass

from benchmarks.figure import Budget, Figure, Sense
from benchmarks.folders import shared_folder
from benchmarks.measure import Others, Run
from benchmarks.process_memory import own_bytes, trimmed_bytes
from benchmarks.tables import announce, store_tiny
from kvstore.announce import Announcer
from kvstore.block import HEADER_BYTES
from kvstore.calls import MAX_CELLS_PER_CALL, NodeIdentity
from kvstore.clock import SystemClock
from kvstore.cluster_map import ClusterMap, NodeInfo
from kvstore.directory import Directory
from kvstore.fs import LinuxFileSystem
from kvstore.node import Node
from kvstore.table import TABLE_FILE
from kvstore.tiers.host import HostTier

BUDGET = Budget(Sense.AT_MOST, 400)
WARM_UP_BLOCKS = 1024
OTHER_NODE = 1
"""Holds as many other blocks."""
CLUSTER = ClusterMap(
    1,
    tuple(
        NodeInfo(index, f"node-{index}", f"host-{index}", 1, "127.0.0.1:1", "127.0.0.1:2", "")
        for index in range(2)
    ),
)


@dataclass(frozen=True, slots=True)
class Memory:
    """What a full node holds, in bytes."""

    table: int
    process: int
    freed: int
    directory: int


def measure(run: Run) -> Iterator[Figure]:
    """A table that is as full as it gets."""
    blocks = run.of(100_000, 2_048)
    others = Others()
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        memory = process.submit(_fresh_process, blocks).result()
    yield Figure(
        row="node_metadata_bytes",
        variant=f"{blocks} blocks",
        value=(memory.table + memory.process) / blocks,
        unit="bytes/block",
        beside=f"table {memory.table / blocks:.0f}, rest of the process "
        f"{memory.process / blocks:.0f}, of it directory {memory.directory / blocks:.0f} for two "
        f"homes; freed and kept by malloc {memory.freed / blocks:.0f} more",
        budget=BUDGET,
        others_cores=others.busy_cores(),
        details={**asdict(memory), "blocks": blocks},
    )


def _fresh_process(blocks: int) -> Memory:
    """Fill a small node first: what is imported and allocated once is no block's."""
    _fill(WARM_UP_BLOCKS)
    return _fill(blocks)


def _fill(blocks: int) -> Memory:
    with shared_folder() as folder:
        before = own_bytes()
        tier = HostTier.create(
            LinuxFileSystem(), SystemClock(), folder, blocks * 2 * HEADER_BYTES, blocks, 1
        )
        node = Node(NodeIdentity("node-0", 1, "host-0", str(folder)), tier, SystemClock())
        directory = Directory()
        directory.follow(CLUSTER)
        announcer = Announcer(0, 1, node)
        announcer.follow(CLUSTER)
        for part in range(0, blocks, MAX_CELLS_PER_CALL):
            store_tiny(node, part, min(MAX_CELLS_PER_CALL, blocks - part))
            _tell(announcer, directory)
        announce(directory, OTHER_NODE, "other", blocks, MAX_CELLS_PER_CALL)
        held, table_bytes = node.stats().host.held_cells, (folder / TABLE_FILE).stat().st_size
        assert held == blocks, f"only {held} of {blocks} blocks are held"
        resident = own_bytes()
        kept = trimmed_bytes()
        return Memory(table_bytes, kept - before, resident - kept, directory.nbytes)


def _tell(announcer: Announcer, directory: Directory) -> None:
    while (message := announcer.message_for(0)) is not None:
        announcer.answered(0, directory.apply(message))
