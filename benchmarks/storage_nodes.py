"""Storage nodes for a benchmark: real node processes without Ray, on this machine.

Each has a host identity of its own, so a client of one reads the others' blocks over sockets. A
node ends when it is told to, and when this process does; on the folders of one that was killed a
successor can be started.
"""

import contextlib
import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, Self

from benchmarks.figure import Skip
from benchmarks.folders import node_folders
from kvstore.client import Samovar
from kvstore.cluster_map import ClusterMap, NodeInfo

START_S = 30.0
WATCH_S = 0.005
"""How often a watching node is asked what it believes."""


@dataclass(frozen=True, slots=True)
class Place:
    """Which node it is, its folders, on a disk and in shared memory, and its sizes."""

    index: int
    folder: Path
    arena_folder: Path
    arena_bytes: int
    nvme_bytes: int = 0


class StorageNode:
    """One node's process, and the pipe on which it is told things."""

    def __init__(self, process: SpawnProcess, pipe: Connection) -> None:
        self._process = process
        self._pipe = pipe
        self.info: NodeInfo = self._heard(START_S)

    @classmethod
    def start(cls, place: Place) -> Self:
        """Start one; returns when it serves."""
        context = multiprocessing.get_context("spawn")
        pipe, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, place), daemon=False)
        process.start()
        theirs.close()
        return cls(process, pipe)

    def set_map(self, cluster_map: ClusterMap) -> None:
        """Give the node the map; returns when it goes by it."""
        self._pipe.send(cluster_map)
        self._heard(START_S)

    def watch(self, index: int) -> None:
        """Have it look for the moment at which it believes node ``index`` unreachable."""
        self._pipe.send(index)
        self._heard(START_S)

    def noticed_s(self, timeout_s: float) -> float:
        """That moment, in this machine's monotonic seconds; raises ``Skip`` if none came."""
        moment: float = self._heard(timeout_s)
        return moment

    def kill(self) -> float:
        """SIGKILL; the moment of it."""
        assert self._process.pid is not None
        moment = time.monotonic()
        os.kill(self._process.pid, signal.SIGKILL)
        self._process.join()
        return moment

    def client(self) -> Samovar:
        """A client on this node's host."""
        return Samovar.connect(self.info.control, host_id=self.info.host_id)

    def stop(self) -> None:
        """End it in order; a dead one stays dead."""
        self._pipe.close()
        self._process.join(START_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._process.close()

    def _heard(self, timeout_s: float) -> Any:
        try:
            if self._pipe.poll(timeout_s):
                return self._pipe.recv()
        except EOFError:
            raise Skip("a storage node ended before it answered") from None
        raise Skip(f"a storage node did not answer within {timeout_s:g} s")


@contextmanager
def storage_nodes(*arena_bytes: int) -> Iterator[list[StorageNode]]:
    """A node for every size given, all in one map."""
    with contextlib.ExitStack() as stack:
        folder, shared = stack.enter_context(node_folders())
        nodes = []
        for index, size_bytes in enumerate(arena_bytes):
            place = Place(index, folder / str(index), shared / str(index), size_bytes)
            node = StorageNode.start(place)
            stack.callback(node.stop)
            nodes.append(node)
        cluster_map = ClusterMap(1, tuple(node.info for node in nodes))
        for node in nodes:
            node.set_map(cluster_map)
        yield nodes


def _serve(pipe: Connection, place: Place) -> None:
    """A node's process: maps and things to watch for come in, answers go out."""
    from pydantic import ByteSize

    from kvstore.config import NodeConfig
    from kvstore.server import NodePlace, NodeServer

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(level=logging.ERROR)
    config = NodeConfig(
        state_folder=place.folder,
        arena_bytes=ByteSize(place.arena_bytes),
        nvme_bytes=ByteSize(place.nvme_bytes),
        host_id=f"benchmark-{place.index}",
    )
    name = f"benchmark-{place.index}"
    server = NodeServer(config, NodePlace(place.index, name, place.folder, place.arena_folder))
    pipe.send(server.start())
    try:
        while True:
            order = pipe.recv()
            if isinstance(order, ClusterMap):
                server.set_map(order)
                pipe.send(None)
                continue
            pipe.send(None)
            while order not in server.unreachable and not pipe.poll(WATCH_S):
                pass
            pipe.send(time.monotonic())
    except (EOFError, OSError):
        server.stop()
