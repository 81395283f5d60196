"""Processes that the tests start, stop, kill and freeze: storage nodes and clients.

``Tier`` stands in for the coordinator: it numbers the maps and hands them out. Whatever a test has
started is gone when it ends.
"""

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, suppress
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil

from kvstore.arena import ARENA_FILE, Arena
from kvstore.block import HEADER_BYTES
from kvstore.calls import NodeStats
from kvstore.client import Samovar
from kvstore.cluster_map import ClusterMap, NodeInfo
from kvstore.errors import UnavailableError
from kvstore.fs import LinuxFileSystem
from kvstore.key import Chain
from kvstore.replication import GRACE_S
from kvstore.rpc.client import ControlClient
from kvstore.table import KeyTable, SlotState
from tests.hold import client_process, prompts
from tests.integration import node_process
from tests.served import eventually
from tests.source_tree import ROOT

Answer = dict[str, Any]

ARENA_BYTES = 4 << 20
NVME_BYTES = 64 << 20
HUNG_S = 90.0
"""Whoever has not answered by then never will: all deadlines of the tier are far shorter."""


class Child:
    """A process of ours, in a network namespace of its own if ``prefix`` says so."""

    def __init__(self, command: Sequence[str], prefix: Sequence[str] = ()) -> None:
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-m", *command],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    @property
    def pid(self) -> int:
        return self.process.pid

    def hear(self) -> Answer:
        assert self.process.stdout is not None
        # There is never more than one answer to wait for, so nothing is in the buffer.
        ready, _, _ = select.select([self.process.stdout], [], [], HUNG_S)
        assert ready, f"process {self.pid} does not answer"
        line = self.process.stdout.readline()
        assert line, f"process {self.pid} ended with {self.process.wait()}"
        answer: Answer = json.loads(line)
        return answer

    def say(self, **order: object) -> None:
        assert self.process.stdin is not None
        print(json.dumps(order), file=self.process.stdin, flush=True)

    def freeze(self) -> None:
        """Stop it, as a debugger or a full machine does."""
        self.process.send_signal(signal.SIGSTOP)
        eventually(lambda: state_of(self.pid) == "T")

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        self.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()


class Client(Child):
    """An inference worker (``client_process`` has the orders). Starts up beside others."""

    def __init__(
        self,
        node: NodeInfo,
        host_id: str | None = None,
        token_file: Path | None = None,
        prefix: Sequence[str] = (),
    ) -> None:
        words = [client_process.__name__, node.control, host_id or node.host_id]
        super().__init__([*words, *([str(token_file)] if token_file else [])], prefix)
        self._connected = False

    def say(self, **order: object) -> None:
        if not self._connected:
            assert self.hear() == {"connected": self.pid}
            self._connected = True
        super().say(**order)

    def order(
        self,
        do: str,
        prompt: int,
        tokens: int,
        *,
        pause: tuple[str, int] = ("", 0),
        split: bool = False,
        mask: int | None = None,
        tenant: str = "",
        start: int = 0,
        boundaries: Sequence[int] = (),
        deadline_s: float = 30.0,
        leased: bool = False,
    ) -> None:
        """Send an order; its answer is to be heard. ``leased``: read little as if it were much."""
        self.say(
            do=do, prompt=prompt, tokens=tokens, pause=pause, split=split, mask=mask,
            tenant=tenant, start=start, boundaries=boundaries, deadline_s=deadline_s, leased=leased,
        )  # fmt: skip

    def __call__(self, do: str, prompt: int, tokens: int, **more: Any) -> Answer:
        """Send an order and wait for the answer."""
        self.order(do, prompt, tokens, **more)
        return self.hear()

    def put(self, prompt: int, tokens: int, **more: Any) -> Answer:
        return self("put", prompt, tokens, **more)

    def stores(self, prompt: int, tokens: int, **more: Any) -> None:
        """Put what must be taken, all of it."""
        stored = self.put(prompt, tokens, **more)
        assert stored["stored"] + stored["present"] == tokens // prompts.BLOCK_TOKENS, stored

    def fetch(self, prompt: int, tokens: int, **more: Any) -> Answer:
        """Look up and read; whatever comes must be right."""
        fetched = self("fetch", prompt, tokens, **more)
        assert fetched["right"], fetched
        return fetched

    def finds(self, prompt: int, tokens: int, **more: Any) -> None:
        """Wait until all of a prompt can be read: announcements take their time."""
        eventually(lambda: self.fetch(prompt, tokens, **more)["tokens"] == tokens)

    def paused(self, point: str) -> Answer:
        answer = self.hear()
        assert answer["paused"] == point, answer
        return answer

    def go_on(self) -> Answer:
        """From a pause to the answer of the order."""
        self.say(do="go on")
        return self.hear()


class StorageNode(Child):
    """A node process; ``restarted`` is its successor on the same folders. Starts beside others."""

    def __init__(
        self,
        folder: Path,
        index: int,
        arena_bytes: int = ARENA_BYTES,
        bind_host: str = "127.0.0.1",
        advertise_host: str | None = None,
        token_file: Path | None = None,
        prefix: Sequence[str] = (),
        nvme_folder: Path | None = None,
        nvme_bytes: int = NVME_BYTES,
        copy_grace_s: float = GRACE_S,
    ) -> None:
        self._how = (
            folder, index, arena_bytes, bind_host, advertise_host, token_file, prefix, nvme_folder,
            nvme_bytes, copy_grace_s,
        )  # fmt: skip
        words = [str(index), f"node-{index}", str(folder / f"state-{index}")]
        words += [str(folder / f"arena-{index}"), f"host-{index}"]
        words += ["--arena-bytes", str(arena_bytes), "--bind-host", bind_host]
        words += ["--copy-grace-s", str(copy_grace_s)]
        words += ["--advertise-host", advertise_host] if advertise_host else []
        words += ["--token-file", str(token_file)] if token_file else []
        if nvme_folder is not None:
            words += ["--nvme-bytes", str(nvme_bytes), "--nvme-folder", str(nvme_folder)]
        super().__init__([node_process.__name__, *words], prefix)

    @cached_property
    def info(self) -> NodeInfo:
        """Where it is; waits until it is up."""
        return NodeInfo(**self.hear())

    def restarted(self) -> "StorageNode":
        return StorageNode(*self._how)

    def child(self, module: str) -> psutil.Process:
        """The one child of its own that runs this module."""
        children = psutil.Process(self.pid).children()
        (found,) = (child for child in children if module in child.cmdline())
        return found

    @property
    def arena(self) -> Arena:
        return Arena.map(LinuxFileSystem(), Path(self.info.arena_folder))

    @property
    def table(self) -> KeyTable:
        return KeyTable.map(LinuxFileSystem(), Path(self.info.arena_folder))

    def flip(self, prompt: int, block: int, cell: int = 0, split: bool = False) -> None:
        """Turn one bit of the payload of a cell that is held."""
        space = prompts.namespace(prompts.SPLIT if split else prompts.WHOLE)
        chain = Chain.of(space, prompts.token_ids(prompt, prompts.TOKENS_MAX))
        found = self.table.find(chain.keys[block : block + 1], np.array([cell], np.uint8))
        assert found.held[0]
        at = int(found.offsets[0]) + HEADER_BYTES + int(found.lengths[0]) // 2
        self.arena.view(at, 1)[0] ^= 0x10


class Tier:
    """The nodes and clients of a test, and the map of the nodes."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self._stack = stack
        self._epoch = 0

    def node(self, index: int = 0, **how: Any) -> StorageNode:
        return self.started(StorageNode(self.folder, index, **how))

    def started(self, node: StorageNode) -> StorageNode:
        self._stack.callback(node.close)
        return node

    def restart(self, nodes: list[StorageNode], *order: int) -> None:
        """Start successors of those one after the other; each time all get a new map of all."""
        for index in order:
            nodes[index] = self.started(nodes[index].restarted())
            self.publish(*(node.info for node in nodes))

    def restart_all(self, nodes: list[StorageNode], *order: int) -> None:
        """Kill them all, then ``restart`` them."""
        for node in nodes:
            node.kill()
        self.restart(nodes, *order)

    def client(self, node: StorageNode, host_id: str | None = None, **how: Any) -> Client:
        """A worker on the node's own host, unless it is said to be on another one."""
        client = Client(node.info, host_id, **how)
        self._stack.callback(client.close)
        return client

    def control(self, node: StorageNode, token: str | None = None) -> ControlClient:
        control = ControlClient(node.info.control, token)
        self._stack.callback(control.close)
        return control

    def publish(self, *infos: NodeInfo) -> ClusterMap:
        """Give all nodes a new map with themselves in it."""
        self._epoch += 1
        cluster_map = ClusterMap.of(self._epoch, infos, prompts.BLOCK_TOKENS)
        for info in infos:
            with one_call(info) as control, suppress(UnavailableError):
                control.set_map(cluster_map)
        return cluster_map


@contextmanager
def client_of(node: "StorageNode", host_id: str | None = None) -> Iterator[Samovar]:
    """In this process; on the node's own host, unless it is said to be on another one."""
    with Samovar.connect(node.info.control, host_id=host_id or node.info.host_id) as client:
        yield client


def one_call(info: NodeInfo) -> AbstractContextManager[ControlClient]:
    return closing(ControlClient(info.control))


def stats_of(node: StorageNode) -> NodeStats:
    with one_call(node.info) as control:
        return control.stats()


def state_of(pid: int) -> str:
    """R, S, T (stopped), Z ..., as ``/proc`` has it."""
    text = Path(f"/proc/{pid}/stat").read_text()
    return text[text.rindex(")") + 2]


def settles(node: StorageNode) -> NodeStats:
    """Wait until every slot is free, held or retired, all of them accounted for."""

    def settled() -> bool:
        stats = stats_of(node)
        records = node.table.slots
        states = records["state"]
        held = states == SlotState.COMMITTED
        retired = node.table.retired_ranges()
        assert_apart(records[held], retired)
        assert int(held.sum()) == stats.host.held_cells
        assert int(records["size_bytes"][held].sum()) == stats.host.held_bytes
        return (
            stats.host.reserved_cells == stats.leases == 0
            and not ((states == SlotState.RESERVED) | (states == SlotState.QUARANTINED)).any()
            and sum(stop - start for start, stop in retired) == stats.host.retired_bytes
            # A writer that went on after its end brings memory back, until the next sweep.
            and backed_bytes(node) <= stats.host.capacity_bytes + stats.host.retired_bytes
        )

    eventually(settled)
    return stats_of(node)


def assert_apart(held: npt.NDArray[np.void], retired: list[tuple[int, int]]) -> None:
    """No two cells share memory, above all none with what was retired."""
    cells = zip(held["offset"].tolist(), held["size_bytes"].tolist(), strict=True)
    ranges = sorted([*retired, *((start, start + size) for start, size in cells)])
    assert all(stop <= start for (_, stop), (start, _) in pairwise(ranges))


def backed_bytes(node: StorageNode) -> int:
    """Memory behind the arena."""
    return os.stat(Path(node.info.arena_folder) / ARENA_FILE).st_blocks * 512
