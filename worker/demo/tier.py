"""The demo's own tier: a local one of several nodes, up for as long as the demo lasts."""

import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from kvstore.clock import SystemClock
from kvstore.cluster.launch import LocalTier, Standing
from kvstore.config import ClusterConfig, NodeConfig, load
from kvstore.node_folder import LOCK_FILE, Holder
from worker.demo.worker_process import TierDoor

ARENA_BYTES = 512 << 20
"""Enough for a contract's KV several times over, and for two nodes on a small machine."""


class DemoTier:
    """Up on entry, down on exit, whatever happened in between."""

    def __init__(self, work_folder: Path, nodes: int, tell: Callable[[str], None]) -> None:
        flags = {"name": f"demo-{os.getpid()}", "nodes": nodes, "state_folder": work_folder}
        cluster = load(ClusterConfig, flags)
        node = load(NodeConfig, {"state_folder": work_folder, "arena_bytes": ARENA_BYTES})
        self._tier = LocalTier(cluster, node, SystemClock(), os.urandom, tell)
        self._standing: Standing | None = None

    @property
    def node_ids(self) -> tuple[str, ...]:
        """The storage nodes, by index."""
        return tuple(node.node_id for node in self._up().cluster_map.nodes)

    def door(self, index: int) -> TierDoor:
        """How a worker on the host of node ``index`` gets in."""
        node = self._up().cluster_map.nodes[index]
        return TierDoor(node.control, node.host_id, token_file=None)

    def kill_node(self, index: int) -> None:
        """SIGKILL a whole node: its storage processes, and the Ray node that would restart them."""
        folder = Path(self._up().cluster_map.nodes[index].arena_folder)
        holder = Holder.parse((folder / LOCK_FILE).read_bytes())
        assert holder is not None, "a running node has locked its folder"
        raylet = psutil.Process(holder.pid).parents()[0]
        for process in (raylet, *raylet.children(recursive=True)):
            process.kill()

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

    def _up(self) -> Standing:
        assert self._standing is not None, "the tier is used inside its with block"
        return self._standing
