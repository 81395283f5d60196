"""What blocking code waits with, on simulated time: sleep, Thread, Event, Lock, Executor, wait.

Stands in for ``threading`` and ``concurrent.futures`` in the modules that the client is made of
(``tests.sim.edges`` puts it there). Each call that would block a thread parks its strand instead.
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from types import TracebackType
from typing import Any

from tests.sim.scheduler import Scheduler, Strand, current


class Blocking:
    """Makes the primitives of one world; instances stand in for the module ``threading``."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    def sleep(self, seconds: float) -> None:
        current(self._scheduler).wait(None, seconds)

    def wait(self, futures: Iterable["SimFuture"], timeout: float | None = None) -> None:
        """``concurrent.futures.wait`` without its answer, which nobody here uses."""
        for future in futures:
            current(self._scheduler).wait(future.settled, timeout)

    # The names of the real things.

    def Thread(
        self,
        target: Callable[..., object],
        name: str = "thread",
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        daemon: bool | None = None,
    ) -> "SimThread":
        return SimThread(self._scheduler, lambda: target(*args, **(kwargs or {})), name)

    def Event(self) -> "SimEvent":
        return SimEvent(self._scheduler)

    def Lock(self) -> "SimLock":
        return SimLock(self._scheduler)

    def RLock(self) -> "SimLock":
        return SimLock(self._scheduler)

    def ThreadPoolExecutor(
        self, max_workers: int | None = None, thread_name_prefix: str = "pool"
    ) -> "SimExecutor":
        return SimExecutor(self._scheduler, thread_name_prefix)


class SimThread:
    """A strand of the process that starts it."""

    def __init__(self, scheduler: Scheduler, work: Callable[[], object], name: str) -> None:
        self._scheduler = scheduler
        self._work = work
        self._name = name
        self._strand: Strand | None = None

    def start(self) -> None:
        process = current(self._scheduler).process
        self._strand = process.start(f"{process.name}/{self._name}", self._work)

    def join(self, timeout: float | None = None) -> None:
        if self._strand is not None:
            current(self._scheduler).wait(self._strand.done, timeout)

    def is_alive(self) -> bool:
        return self._strand is not None and not self._strand.done.done()


class SimEvent:
    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._set = False
        self._waiters: list[asyncio.Future[None]] = []

    def is_set(self) -> bool:
        return self._set

    def set(self) -> None:
        self._set = True
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            waiter.set_result(None)

    def clear(self) -> None:
        self._set = False

    def wait(self, timeout: float | None = None) -> bool:
        if not self._set:
            strand = current(self._scheduler)
            waiter: asyncio.Future[None] = strand.process.create_future()
            self._waiters.append(waiter)
            if not strand.wait(waiter, timeout):
                self._waiters.remove(waiter)
        return self._set


class SimLock:
    """Re-entrant, which the real ones need not be: who asks twice there hangs."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._owner: Strand | None = None
        self._depth = 0
        self._free = SimEvent(scheduler)

    def __enter__(self) -> bool:
        strand = current(self._scheduler)
        while self._owner not in (None, strand):
            self._free.clear()
            self._free.wait()
        self._owner = strand
        self._depth += 1
        return True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._depth -= 1
        if not self._depth:
            self._owner = None
            self._free.set()


class SimFuture(Future[Any]):
    """A future whose result is waited for on simulated time."""

    def __init__(self, scheduler: Scheduler, settled: "asyncio.Future[None]") -> None:
        super().__init__()
        self.settled = settled
        self._scheduler = scheduler

    def result(self, timeout: float | None = None) -> Any:
        if not self.done() and not current(self._scheduler).wait(self.settled, timeout):
            raise TimeoutError
        return super().result(0)


class SimExecutor:
    """Every piece of work is a strand of its own."""

    def __init__(self, scheduler: Scheduler, name: str) -> None:
        self._scheduler = scheduler
        self._name = name
        self._futures: list[SimFuture] = []
        self._closed = False

    def submit(self, work: Callable[..., Any], *args: Any, **kwargs: Any) -> SimFuture:
        if self._closed:
            raise RuntimeError("cannot schedule new futures after shutdown")
        process = current(self._scheduler).process
        future = SimFuture(self._scheduler, process.create_future())

        def run() -> None:
            try:
                future.set_result(work(*args, **kwargs))
            except Exception as error:
                future.set_exception(error)
            future.settled.set_result(None)

        process.start(f"{process.name}/{self._name}", run)
        self._futures = [*(one for one in self._futures if not one.done()), future]
        return future

    def shutdown(self, wait: bool = True, cancel_futures: bool = False) -> None:
        self._closed = True
        for future in self._futures if wait else ():
            current(self._scheduler).wait(future.settled, None)
