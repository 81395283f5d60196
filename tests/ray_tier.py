"""A real tier of two storage nodes on a real Ray, for tests: what they may ask of it."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from kvstore.client import Samovar
from kvstore.clock import SystemClock
from kvstore.cluster.launch import LocalTier
from kvstore.cluster.processes import find
from kvstore.cluster_map import ClusterMap, NodeInfo
from kvstore.config import ClusterConfig, NodeConfig, resolve
from kvstore.errors import UnavailableError
from kvstore.node_folder import holder_of
from kvstore.rpc.client import ControlClient
from kvstore.state import Remains
from tests import served

ARENA_BYTES = 32 << 20
BLOCK_TOKENS = 16


@dataclass(frozen=True, slots=True)
class RayTier:
    """Nodes by their index; both run, or come back by themselves."""

    nodes: tuple[NodeInfo, ...]
    tier: LocalTier

    @property
    def remains(self) -> Remains:
        """What is recorded of it."""
        found = self.tier.folder.remains()
        assert found is not None
        return found

    def living(self) -> dict[int, str]:
        """Its processes, that of every node and of Ray: roles by number."""
        remains = self.remains
        return {each.pid: each.role for each in find(remains.tier_id, remains.processes)}

    def kill(self, role: str) -> int:
        """SIGKILL the one process whose role that is, and wait for its end; answers its number."""
        (pid,) = (pid for pid, name in self.living().items() if name == role)
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: pid not in self.living())
        return pid

    def connect(self, index: int) -> Samovar:
        """A client on the host of node ``index``."""
        return Samovar.connect(self.nodes[index].control, host_id=self.nodes[index].host_id)

    def kill_storage(self, index: int) -> None:
        """SIGKILL a node's storage actor, and wait until its successor is in everybody's map."""
        before = self.map_of(1 - index)
        os.kill(self.storage_pid(index), signal.SIGKILL)
        eventually(lambda: self.map_of(1 - index).epoch > before.epoch)

    def storage_pid(self, index: int) -> int:
        """The process that holds a node's arena."""
        holder = holder_of(Path(self.nodes[index].arena_folder))
        assert holder is not None
        return holder.pid

    def map_of(self, index: int) -> ClusterMap:
        """The map that a node goes by."""
        with closing(ControlClient(self.nodes[index].control)) as client:
            return client.hello().map


@contextmanager
def ray_tier(folder: Path, nvme_bytes: int = 0) -> Iterator[RayTier]:
    """Bring a tier up, and take it down whatever happened."""
    environment: dict[str, str] = {}
    flags = {
        "name": f"hold-{os.getpid()}",
        "nodes": 2,
        "block_tokens": BLOCK_TOKENS,
        "state_folder": folder,
    }
    node_flags = {"state_folder": folder, "arena_bytes": ARENA_BYTES, "nvme_bytes": nvme_bytes}
    tier = LocalTier(
        resolve(ClusterConfig, flags, environment, None),
        resolve(NodeConfig, node_flags, environment, None),
        SystemClock(),
        os.urandom,
        lambda words: None,
    )
    try:
        yield RayTier(tier.up().cluster_map.nodes, tier)
    finally:
        tier.down(purge=True)


def eventually(holds: Callable[[], bool]) -> None:
    """Wait until it holds; a node that does not answer just now is not an answer."""

    def answered() -> bool:
        with suppress(UnavailableError):
            return holds()
        return False

    served.eventually(answered)
