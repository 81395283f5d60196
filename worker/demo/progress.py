"""What the demo shows while it runs: a line for every step, and a bar below it while that lasts.

    step     something long begins of which nobody knows how far it is
    rounds   something is done a number of times
    watch    something grows by itself until there is enough of it
    settle   something changes by itself until it rests; patience is bounded, as with ``watch``
    pause    nothing is done for a moment

Does not cover: what comes of it all (``worker.demo.report``).
"""

import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from kvstore.clock import Clock, Deadline
from kvstore.errors import SamovarError

POLL_S = 0.1


class TooSlow(SamovarError):
    """What the demo waits for did not come about in time."""


class _Count(MofNCompleteColumn):
    """How many of how many, where that is known."""

    def render(self, task: Task) -> Text:
        return Text() if task.total is None else super().render(task)


class Show:
    """Steps on a console. The bar is there inside the with block, and only at a terminal."""

    def __init__(self, console: Console, clock: Clock) -> None:
        self._console = console
        self._clock = clock
        self._pause = threading.Event()
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            _Count(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self._task = self._progress.add_task("starting", total=None)

    def step(self, words: str) -> None:
        """Say that something begins."""
        self._begin(words, None)

    def rounds(self, words: str, count: int) -> Iterator[int]:
        """Say that something begins, and the numbers of its rounds; each next one is progress."""
        self._begin(words, count)
        for number in range(count):
            yield number
            self._progress.update(self._task, completed=number + 1)

    def watch(self, words: str, measure: Callable[[], int], wanted: int, patience_s: float) -> None:
        """Wait until ``measure`` gives ``wanted``; raises ``TooSlow`` when patience is over."""
        self._begin(words, wanted)
        deadline = Deadline.after(self._clock, patience_s)
        while (found := measure()) < wanted:
            if deadline.passed():
                raise TooSlow(
                    f"{words}: {found} of {wanted} after {patience_s:g} s; try again when the "
                    "machine has less to do"
                )
            self._progress.update(self._task, completed=found)
            self._pause.wait(POLL_S)

    def settle(
        self, what: str, measure: Callable[[], object], rest_s: float, patience_s: float
    ) -> None:
        """Wait until ``measure`` has given the same for ``rest_s``."""
        patience = Deadline.after(self._clock, patience_s)
        found, rested = measure(), Deadline.after(self._clock, rest_s)
        while not rested.passed():
            if patience.passed():
                raise TooSlow(f"{what} did not rest for {rest_s:g} s within {patience_s:g} s")
            self._pause.wait(POLL_S)
            before, found = found, measure()
            if found != before:
                rested = Deadline.after(self._clock, rest_s)

    def pause(self, pause_s: float) -> None:
        """Do nothing for so long, between two things that are not to touch."""
        self._pause.wait(pause_s)

    def _begin(self, words: str, total: int | None) -> None:
        self._console.log(words)
        self._progress.reset(self._task, description=words, total=total)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()
