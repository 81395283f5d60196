"""The demo's story, with workers and a tier that only note what is asked of them."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from kvstore.clock import SystemClock
from tests.unit.worker.worker_answers import answered
from worker.demo import story
from worker.demo.progress import Show
from worker.demo.prompt import Prompt
from worker.demo.worker_process import Held, WorkerAnswer

FIRST = Prompt(np.arange(10, dtype=np.int32), boundary=8)
SECOND = Prompt(np.arange(11, dtype=np.int32), boundary=8)
CELLS = 3


class Scene:
    """Everything that happened, in order; a disk that takes a cell with each look at it.

    The contract is announced by the third time that somebody looks for it.
    """

    def __init__(self) -> None:
        self.events: list[str] = []
        self.on_disk = 0
        self.looks = 0
        self.node_ids = ("node-0", "node-1")

    def note(self, event: str) -> None:
        self.events.append(event)

    def door(self, index: int) -> int:
        return index

    def cells_on_disk(self, index: int) -> int:
        self.on_disk = min(CELLS, self.on_disk + 1)
        return self.on_disk

    def stored_cells(self) -> list[int]:
        if self.events[-1] != "rest":
            self.note("rest")
        return [self.on_disk]

    def kill_node(self, index: int) -> None:
        self.note(f"kill {index}")

    def lose_power(self) -> int:
        self.note("power")
        return 9

    def start_again(self) -> None:
        self.note("up")


class Worker:
    """Stands in for a worker's process."""

    scene: Scene

    def __init__(self, name: str, model: Path, work_folder: Path, door: int | None) -> None:
        self.name, self.pid = name, ord(name)
        self.scene.note(f"{name} starts at {door}")

    def ready(self) -> None:
        return

    def ask(self, prompt: Prompt, new_tokens: int) -> WorkerAnswer:
        which = "first" if prompt is FIRST else "second"
        self.scene.note(f"{self.name} {which} {new_tokens}")
        return answered(0.1 * len(self.scene.events))

    def look_up(self, prompt: Prompt) -> Held:
        # The contract's: of a question's blocks, node 1's disk need not have any.
        if len(prompt.tokens) != prompt.boundary + 1:
            return Held(prompt.boundary, cells=0)
        self.scene.looks += 1
        if self.scene.looks < 3:
            return Held(tokens=0, cells=0)
        if self.scene.looks == 3:
            self.scene.note(f"{self.name} finds")
        return Held(prompt.boundary, CELLS)

    def flush(self) -> None:
        return

    def forget(self) -> None:
        self.scene.note(f"{self.name} forgets")

    def delete_question(self, prompt: Prompt) -> None:
        assert prompt is SECOND
        self.scene.note(f"{self.name} deletes")

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *exit: object) -> None:
        self.scene.note(f"{self.name} ends")


def test_the_story_in_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    scene: Any = Scene()
    Worker.scene = scene
    monkeypatch.setattr(story, "WorkerProcess", Worker)
    monkeypatch.setattr(story, "QUIET_S", 0.0)
    monkeypatch.setattr(Show, "pause", lambda _, pause_s: scene.note(f"pause {pause_s}"))
    pause = f"pause {story.BETWEEN_S}"
    with Show(Console(file=io.StringIO()), SystemClock()) as show:
        told = story.tell(scene, tmp_path, (FIRST, SECOND), 32, tmp_path, show)
    turn = [
        "rest", "A first 1", pause, "A second 1",
        "B deletes", "rest", "B forgets", "B first 1", "B forgets", pause, "B second 1",
    ]  # fmt: skip
    assert scene.events == [
        "A starts at 0", "B starts at 1", "C starts at None",
        "A first 32", "B finds", "B second 32",
        *turn * story.ROUNDS,
        "C second 32",
        "B forgets", "kill 0", "B second 32",
        "C ends", "B ends", "A ends", "power", "up",
        "D starts at 1", "D second 32", "D ends",
    ]  # fmt: skip
    assert scene.on_disk == CELLS
    assert len(told.own_hits) == len(told.warms) == story.ROUNDS
    assert told.worker_pids == {"A": 65, "B": 66, "C": 67, "D": 68}
