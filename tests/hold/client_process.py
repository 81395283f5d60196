"""An inference worker's client as a process of its own, for tests that stop and kill it.

python -m tests.hold.client_process ADDRESS HOST_ID [TOKEN_FILE]

Reads orders from standard input, one JSON object a line, and answers each with one. An order with
``pause`` stops at a point of the real code and says so; it goes on when it is told to, or forks
there first:

    rows   the client asks for rows, whose bytes move next
    read   between a plan (for other nodes also a lease) and the copying
    fill   a leaf is in its slot (on its way, to another host), the next one is not
    check  a leaf was delivered and is not verified yet
"""

import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from kvstore import leaves, reading
from kvstore.block import Leaf, leaf_digest
from kvstore.cell import Grid
from kvstore.client import Samovar
from kvstore.clock import Deadline
from kvstore.cluster_map import ClusterMap, NodeInfo
from kvstore.errors import UsageError
from kvstore.namespace import Namespace
from kvstore.plan import Plan
from kvstore.rpc.client import ControlClient
from kvstore.transport import tcp
from kvstore.transport.base import CellRead, ReadOutcome
from kvstore.transport.local import LocalTransport
from tests.hold import prompts

Order = dict[str, Any]


def say(answer: Order) -> None:
    print(json.dumps(answer), flush=True)


def hear() -> Order:
    line = sys.stdin.readline()
    if not line:
        os._exit(0)  # the test has ended
    order: Order = json.loads(line)
    return order


class Gate:
    """Stops an order at the n-th passage of one point."""

    def __init__(self) -> None:
        self.client: Samovar | None = None
        self._point = ""
        self._left = 0

    def arm(self, point: str, passages: int) -> None:
        self._point, self._left = point, passages

    def passing(self, point: str, leaf: Leaf | None = None) -> None:
        if point != self._point:
            return
        self._left -= 1
        if self._left:
            return
        said: Order = {"paused": point}
        while True:
            say(said)
            order = hear()
            if order["do"] == "go on":
                return
            said = {"paused": point, "forked": self._fork(order["stay"], leaf)}

    def _fork(self, stay: bool, leaf: Leaf | None) -> Order:
        """What became of a forked child that tries to use what its parent has."""
        refusals, theirs = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(theirs, json.dumps(self._refused_calls()).encode())
            os.close(theirs)
            if stay:
                signal.pause()
            assert leaf is not None
            leaf[:] = 0  # the parent's reserved slot
            os._exit(0)
        os.close(theirs)
        with os.fdopen(refusals) as pipe:
            calls = json.loads(pipe.read())
        if stay:
            return {"pid": child, "refused": calls}
        _, status = os.waitpid(child, 0)
        return {"refused": calls, "signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0}

    def _refused_calls(self) -> int:
        """How many of a few calls say that this process must open a client of its own."""
        client = self.client
        assert client is not None
        space, ids = prompts.namespace(), prompts.token_ids(99, 32)
        rows = prompts.Rows.of(99, "", slice(None))
        calls = (
            lambda: client.put(space, ids, rows),
            lambda: client.longest_prefix(space, ids),
            client.stats,
        )
        refused = 0
        for call in calls:
            try:
                call()
            except UsageError:
                refused += 1
        client.close()
        return refused


class Worker:
    """Carries orders out."""

    _plan: Plan

    def __init__(self, client: Samovar, gate: Gate, token: str | None) -> None:
        self._client = client
        self._token = token
        self._gate = gate

    def put(self, order: Order) -> Order:
        rows = self._rows(order)
        ids = prompts.token_ids(order["prompt"], order["tokens"])
        stored = self._client.put(
            self._namespace(order), ids, rows, start=order["start"],
            boundaries=order["boundaries"], mask=order["mask"],
        )  # fmt: skip
        counts = ("stored", "present", "busy", "refused", "failed")
        return {name: getattr(stored, name) for name in counts} | {"reasons": dict(stored.reasons)}

    def plan(self, order: Order) -> Order:
        ids = prompts.token_ids(order["prompt"], order["tokens"] + 1)
        self._plan = self._client.longest_prefix(
            self._namespace(order), ids, boundaries=order["boundaries"], mask=order["mask"]
        )
        return {"tokens": self._plan.tokens, "nodes": np.unique(self._plan.nodes).tolist()}

    def get(self, order: Order) -> Order:
        """Read the last plan; ``right`` says whether all that counts as read is right."""
        right = self._rows(order)
        into = right.emptied()
        into.before = right.before
        little_bytes = 0 if order["leased"] else reading.UNLEASED_BYTES_MAX
        with mock.patch.object(reading, "UNLEASED_BYTES_MAX", little_bytes):
            fetched = self._client.get_into(self._plan, into, order["deadline_s"])
        return {
            "tokens": fetched.tokens,
            "by_source": dict(fetched.by_source),
            "failures": dict(fetched.failures),
            "right": into.same(right, fetched.tokens),
        }

    def stats(self, order: Order) -> Order:
        stats = self._client.stats()
        return asdict(stats.host) | {"leases": stats.leases}

    def publish(self, order: Order) -> Order:
        """Give a map to the node that is its first, for a test that can't reach it."""
        nodes = [NodeInfo(**info) for info in order["nodes"]]
        control = ControlClient(nodes[0].control, self._token)
        wanted = ClusterMap.of(order["epoch"], nodes, prompts.BLOCK_TOKENS)
        cluster_map = control.set_map(wanted)
        control.close()
        return {"epoch": cluster_map.epoch}

    def fetch(self, order: Order) -> Order:
        planned = self.plan(order)
        return self.get(order) | {"planned": planned["tokens"]}

    def _namespace(self, order: Order) -> Namespace:
        return prompts.namespace(self._grid(order), order["tenant"])

    def _grid(self, order: Order) -> Grid:
        return prompts.SPLIT if order["split"] else prompts.WHOLE

    def _rows(self, order: Order) -> prompts.Rows:
        """All heads, or those of the one cell that a rank of two has."""
        heads = (
            slice(None) if order["mask"] in (None, 3) else slice(order["mask"] - 1, order["mask"])
        )
        rows = prompts.Rows.of(order["prompt"], order["tenant"], heads)
        rows.before = lambda: self._gate.passing("rows")
        return rows


def watched(stack: ExitStack, gate: Gate) -> None:
    """Let reads pass the gate before anything moves, and whatever copies or sends leaves, leaf by
    leaf, as only the twin can."""

    def gated(read: Callable[..., list[ReadOutcome]]) -> Callable[..., list[ReadOutcome]]:
        def stopped(
            transport: object, cells: Sequence[CellRead], deadline: Deadline
        ) -> list[ReadOutcome]:
            gate.passing("read")
            return read(transport, cells, deadline)

        return stopped

    for kind in (LocalTransport, tcp.TcpTransport):
        stack.enter_context(mock.patch.object(kind, "read", gated(kind.read)))

    def digest(leaf: Leaf, seed: int) -> int:
        gate.passing("fill", leaf)
        gate.passing("check", leaf)
        return leaf_digest(leaf, seed)

    stack.enter_context(mock.patch.object(leaves, "_mover", leaves.PythonMover()))
    stack.enter_context(mock.patch.object(leaves, "leaf_digest", digest))
    stack.enter_context(mock.patch.object(tcp, "HOT_BYTES", 1))  # each leaf on its own


def main() -> None:
    address, host_id, *token_file = sys.argv[1:]
    gate = Gate()
    with ExitStack() as stack:
        watched(stack, gate)
        token = Path(token_file[0]) if token_file else None
        client = stack.enter_context(Samovar.connect(address, host_id, token))
        gate.client = client
        worker = Worker(client, gate, token.read_text().strip() if token else None)
        say({"connected": os.getpid()})
        while True:
            order = hear()
            gate.arm(*order.get("pause", ("", 0)))
            say(getattr(worker, order["do"])(order))


if __name__ == "__main__":
    main()
