"""The demo's handle on one inference worker, which is a process of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from kvstore.errors import SamovarError
from worker.demo.prompt import Prompt
from worker.engines.answer import Report

STOP_S = 10.0


class WorkerDied(SamovarError):
    """A worker ended in the middle of its work; its log says why."""


@dataclass(frozen=True, slots=True)
class TierDoor:
    """How a worker gets to the tier: its own node's address and host identity."""

    address: str
    host_id: str
    token_file: Path | None


@dataclass(frozen=True, slots=True)
class WorkerAnswer:
    """The tokens of an answer, and what it cost."""

    tokens: tuple[int, ...]
    report: Report


@dataclass(frozen=True, slots=True)
class Held:
    """What the tier holds of a prompt: how many of its first tokens, in how many cells."""

    tokens: int
    cells: int


class WorkerProcess:
    """Starts a worker and waits until its model is loaded and warmed up."""

    def __init__(self, name: str, model: Path, work_folder: Path, door: TierDoor | None) -> None:
        self.name = name
        self._log_path = work_folder / f"{name}.log"
        arguments = ["--model", str(model), "--threads", str(os.cpu_count() or 1)]
        arguments += ["--digests", str(work_folder / "digests.json")]
        if door is not None:
            arguments += ["--address", door.address, "--host-id", door.host_id]
            if door.token_file is not None:
                arguments += ["--token-file", str(door.token_file)]
        with self._log_path.open("ab") as log_file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "worker.demo.answerer", *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log_file,
                text=True,
            )

    @property
    def pid(self) -> int:
        """The worker's process id."""
        return self._process.pid

    def ready(self) -> Self:
        """Wait until the worker can be asked."""
        self._heard()
        return self

    def ask(self, prompt: Prompt, new_tokens: int) -> WorkerAnswer:
        """Have a prompt answered, greedily."""
        answer = self._order({"do": "ask", **_named(prompt), "new_tokens": new_tokens})
        return WorkerAnswer(tuple(answer["tokens"]), Report(**answer["report"]))

    def look_up(self, prompt: Prompt) -> Held:
        """Have the tier asked what it holds of a prompt, which touches nothing of it."""
        return Held(**self._order({"do": "look_up", **_named(prompt)}))

    def delete_question(self, prompt: Prompt) -> None:
        """Have the tier delete what it holds of a prompt behind the document."""
        order = {"do": "delete", "prompt": prompt.tokens.tolist(), "start": prompt.boundary}
        self._order(order)

    def flush(self) -> None:
        """Wait until the tier has what the worker computed."""
        self._order({"do": "flush"})

    def forget(self) -> None:
        """Empty the engine's own cache."""
        self._order({"do": "forget"})

    def close(self) -> None:
        """Let the worker end."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _order(self, order: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            print(json.dumps(order), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise self._died() from None
        return self._heard()

    def _heard(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._died()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _died(self) -> WorkerDied:
        tail = self._log_path.read_text(errors="replace").splitlines()[-5:]
        return WorkerDied(f"worker {self.name} ended early: {' | '.join(tail) or 'no log'}")


def _named(prompt: Prompt) -> dict[str, list[int]]:
    """A prompt as an order has it."""
    return {"prompt": prompt.tokens.tolist(), "boundaries": [prompt.boundary]}
