"""The peer of ``cross_node_get``: Ray's object store, from one Ray node's store to another's.

Two Ray nodes on this machine, each with a store of its own. An actor on the far one puts blocks of
our size; the driver, on the near one, gets them all at once, which pulls them over, and copies them
into memory of its own, as an engine would have to. Each round has fresh objects: what was pulled
once would be near already. Ray verifies nothing.
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from benchmarks.figure import Skip
from benchmarks.measure import timed
from benchmarks.prefix import zeros

Peer = Callable[[], float]


@contextmanager
def ray_peer(blocks: int, block_bytes: int) -> Iterator[Peer]:
    """Seconds to get ``blocks`` blocks from the other Ray node."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        from ray.cluster_utils import Cluster
    except ModuleNotFoundError as missing:
        raise Skip(f"needs {missing.name}") from None
    store_bytes = 2 * blocks * block_bytes + (256 << 20)
    cluster = Cluster()
    try:
        with starting():
            cluster.add_node(num_cpus=1, object_store_memory=store_bytes)
            cluster.add_node(num_cpus=1, object_store_memory=store_bytes, resources={"far": 1})
            ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        actor: Any = ray.remote(num_cpus=0, resources={"far": 1})(Holder)
        holder = actor.remote(block_bytes)
        target = zeros((blocks, block_bytes))

        def fetch(refs: list[Any]) -> None:
            for row, block in zip(target, ray.get(refs), strict=True):
                np.copyto(row, block)

        def peer() -> float:
            refs = ray.get(holder.put.remote(blocks))
            seconds = timed(lambda: fetch(refs))
            ray.get(holder.forget.remote())
            return seconds

        yield peer
    finally:
        ray.shutdown()
        cluster.shutdown()  # type: ignore[no-untyped-call]


@contextmanager
def starting() -> Iterator[None]:
    """Raises ``Skip`` for whatever keeps Ray from starting here: it has no narrower exception."""
    try:
        yield
    except Exception as fault:
        reason = (str(fault).splitlines() or [type(fault).__name__])[0]
        raise Skip(f"Ray could not start two nodes: {reason}") from fault


class Holder:
    """Lives on the far node and keeps what it has put."""

    def __init__(self, block_bytes: int) -> None:
        self._block = np.random.default_rng(3).integers(0, 256, block_bytes, np.uint8)
        self._refs: list[object] = []

    def put(self, blocks: int) -> list[object]:
        """Put so many objects of a block's size into the far node's store."""
        import ray

        self._refs = [ray.put(self._block) for _ in range(blocks)]
        return self._refs

    def forget(self) -> None:
        """Let them go."""
        self._refs = []
