"""Tasks: work that a node's event loop does on the side, seen through or cancelled as one.

A task that fails is our own bug: it is logged, and everything else goes on.
"""

import asyncio
import logging
from collections.abc import Coroutine
from typing import TypeVar

log = logging.getLogger(__name__)

Value = TypeVar("Value")


class Tasks:
    """What is under way. Used on the event loop's thread only."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[object]] = set()

    def spawn(self, work: Coroutine[object, object, Value]) -> asyncio.Task[Value]:
        """Begin some work; it goes on whether or not anybody waits for it."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    async def close(self) -> None:
        """Cancel everything that is under way."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _finished(self, task: asyncio.Task[Value]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (fault := task.exception()) is not None:
            log.error("work on the side failed", exc_info=fault)
