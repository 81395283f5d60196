"""The demo's own tier: a local one of several nodes, up for as long as the demo lasts.

It can lose a node, or all its processes and its memory at once, and be started again.
"""

import os
import shutil
import threading
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from kvstore.calls import NodeStats
from kvstore.clock import Deadline, SystemClock
from kvstore.cluster.launch import LocalTier, Standing
from kvstore.cluster.processes import find, is_alive
from kvstore.config import ClusterConfig, NodeConfig, load
from kvstore.errors import UnavailableError, UsageError
from kvstore.node_folder import holder_of
from kvstore.rpc.client import ControlClient
from kvstore.state import ProcessRecord
from worker.demo.progress import POLL_S, TooSlow
from worker.demo.worker_process import TierDoor

ARENA_BYTES = 512 << 20
"""Enough for a contract's KV several times over, and for two nodes on a small machine."""
NVME_BYTES = 1 << 30
"""On disk, for each node: all that its arena may hold, twice."""
DEATH_PATIENCE_S = 20.0


class DemoTier:
    """Up on entry, down on exit, whatever happened in between."""

    def __init__(
        self, work_folder: Path, disk_folder: Path, nodes: int, tell: Callable[[str], None]
    ) -> None:
        check_room(disk_folder, nodes * NVME_BYTES)
        flags = {"name": f"demo-{os.getpid()}", "nodes": nodes, "state_folder": work_folder}
        node_flags = {
            "state_folder": work_folder,
            "arena_bytes": ARENA_BYTES,
            "nvme_bytes": NVME_BYTES,
            "nvme_folder": disk_folder,
        }
        self._clock = SystemClock()
        self._tier = LocalTier(
            load(ClusterConfig, flags), load(NodeConfig, node_flags), self._clock, os.urandom, tell
        )
        self._standing: Standing | None = None
        self._pause = threading.Event()

    @property
    def node_ids(self) -> tuple[str, ...]:
        """The storage nodes, by index."""
        return tuple(node.node_id for node in self._up().cluster_map.nodes)

    def door(self, index: int) -> TierDoor:
        """How a worker on the host of node ``index`` gets in."""
        node = self._up().cluster_map.nodes[index]
        return TierDoor(node.control, node.host_id, token_file=None)

    def cells_on_disk(self, index: int) -> int:
        """What a node holds on its disk; nothing as long as it does not answer."""
        stats = self._stats(index)
        return 0 if stats is None else stats.nvme.held_cells

    def stored_cells(self) -> list[int | None]:
        """How many cells each node has written to its disk; ``None`` if it does not answer."""
        every = map(self._stats, range(len(self._up().cluster_map.nodes)))
        return [None if stats is None else stats.nvme.stored for stats in every]

    def kill_node(self, index: int) -> None:
        """SIGKILL a whole node: its storage processes, and the Ray node that would restart them."""
        holder = holder_of(Path(self._up().cluster_map.nodes[index].arena_folder))
        assert holder is not None, "a running node has locked its folder"
        raylet = psutil.Process(holder.pid).parents()[0]
        for process in (raylet, *raylet.children(recursive=True)):
            process.kill()

    def lose_power(self) -> int:
        """SIGKILL every process of the tier and discard its shared memory; how many there were.

        That is what a machine's restart leaves: the disks, and nothing else.
        """
        remains = self._up().record.remains
        deadline = Deadline.after(self._clock, DEATH_PATIENCE_S)
        killed: set[int] = set()
        # Looked for anew: what dies last may have started something meanwhile.
        while living := find(remains.tier_id, remains.processes):
            if deadline.passed():
                raise TooSlow(f"{len(living)} processes of the tier outlive SIGKILL")
            killed.update(process.pid for process in living)
            _kill(living)
            self._pause.wait(POLL_S)
        for folder in self._up().record.arena_folders:
            shutil.rmtree(folder)
        return len(killed)

    def start_again(self) -> None:
        """Start the tier as ``samovar up`` does; returns when its nodes answer."""
        self._standing = self._tier.up()

    def __enter__(self) -> Self:
        self._standing = self._tier.up()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._tier.down(purge=True)

    def _stats(self, index: int) -> NodeStats | None:
        control = self._up().cluster_map.nodes[index].control
        with closing(ControlClient(control)) as client, suppress(UnavailableError):
            return client.stats()
        return None

    def _up(self) -> Standing:
        assert self._standing is not None, "the tier is used inside its with block"
        return self._standing


def check_room(folder: Path, size_bytes: int) -> None:
    """Raises ``UsageError`` where the nodes' NVMe tiers would not fit."""
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < size_bytes:
        raise UsageError(
            f"the demo needs {size_bytes >> 20} MiB of disk in {folder}, which has "
            f"{free_bytes >> 20}: name another folder with --cache-folder"
        )


def _kill(processes: Sequence[ProcessRecord]) -> None:
    for each in processes:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(each.pid)
            if is_alive(each):
                process.kill()
