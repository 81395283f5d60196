"""The process that sends copies of a node's cells, on simulated time.

    real Replicator ─> SimCopier ─errand─> a process: real Copier ─> real copying ─> network

Does what ``kvstore.copier_process`` does: the process is there from the first errand on, ends with
its node, and is started again when it has died or stood still. Everything that it does is the code
that ships. Does not cover: which cells go where (``kvstore.replication``).
"""

import asyncio
from collections.abc import Callable
from pathlib import Path

from kvstore.clock import Clock
from kvstore.copier import Copier
from kvstore.copier_process import ERRAND_S, PATIENCE_S
from kvstore.errand import Done, Errand
from tests.sim.scheduler import Process


class SimCopier:
    """Implements ``kvstore.rpc.replicator.Copier`` for one node."""

    def __init__(
        self, node: Process, control: str, folder: Path, clock: Clock, spawn: Callable[[], Process]
    ) -> None:
        self._node = node
        self._control = control
        self._folder = folder
        self._clock = clock
        self._spawn = spawn
        self._process: Process | None = None
        self._copier: Copier | None = None
        self._answer: asyncio.Future[bytes] | None = None
        node.at_death.append(self._stop)

    @property
    def process(self) -> Process | None:
        """The process, if it lives."""
        return self._process

    async def run(self, errand: Errand) -> Done:
        """Have it done; a process that dies meanwhile has done nothing."""
        process = self._process or self._start()
        answer = self._answer = self._node.create_future()
        line = errand.pack()

        def work() -> None:
            if self._copier is None:
                self._copier = Copier(self._control, self._folder, None, self._clock)
            done = self._copier.run(Errand.unpack(line))
            self._node.call_soon(_settle, answer, done.pack())

        process.start(f"{process.name}/errand", work)
        late = self._node.call_later(ERRAND_S + PATIENCE_S, _settle, answer, b"")
        said = await answer
        late.cancel()
        if not said:
            self._stop()
            return Done(0, "the copying process has died or stood still, it is started again")
        return Done.unpack(said)

    def _start(self) -> Process:
        process = self._process = self._spawn()
        process.at_death.append(lambda: self._died(process))
        return process

    def _died(self, process: Process) -> None:
        if self._process is process:
            self._process = self._copier = None
            if self._answer is not None:
                self._node.call_soon(_settle, self._answer, b"")

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()


def _settle(answer: "asyncio.Future[bytes]", line: bytes) -> None:
    if not answer.done():
        answer.set_result(line)
