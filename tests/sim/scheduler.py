"""Simulated time: one queue of events, one seed, and processes that can stop, stall and die.

    Scheduler   what happens next, in simulated time; every choice is drawn from one seed
    Event       something to be done at its time, unless it is cancelled
    Process     an asyncio event loop on it: the real coroutines of a storage node run there
    Strand      blocking code (a client) as a coroutine: a greenlet that runs only while the
                scheduler waits for it, and hands back where it would block

Exactly one thing runs at any moment, strands included, so a run is a function of its seed. A
process that is paused keeps its events until it goes on; one that was killed never runs again, not
even its ``finally`` blocks: its tasks stay referenced until the world ends.
"""

import asyncio
import itertools
import traceback
from collections import deque
from collections.abc import Callable
from contextvars import Context
from heapq import heappop, heappush
from random import Random
from typing import Any, cast

from greenlet import getcurrent, greenlet
from xxhash import xxh3_64

TRACE_SHOWN = 60

Callback = Callable[..., object]


class SimulationFailure(AssertionError):
    """The system under test broke a promise."""


class Killed(BaseException):
    """Ends a strand whose process is gone; no code under test catches it."""


class Trace:
    """What happened: a digest of everything, and the last of it for whoever has to debug."""

    def __init__(self) -> None:
        self.last: deque[str] = deque(maxlen=TRACE_SHOWN)
        self.lines = 0
        self._digest = xxh3_64()

    def say(self, now_s: float, who: str, what: str) -> None:
        line = f"{now_s:9.4f} {who:<10} {what}"
        self.last.append(line)
        self.lines += 1
        self._digest.update(line.encode())

    def digest(self) -> str:
        """The same for two runs exactly when they did the same."""
        return self._digest.hexdigest()


class Scheduler:
    """The only clock there is, and the order of events."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.now_s = 0.0
        self.trace = Trace()
        self.strand: Strand | None = None
        self.processes: list[Process] = []
        self.faults: list[str] = []
        self.over = False
        self._queue: list[Event] = []
        self._next = itertools.count().__next__

    def put(
        self, when_s: float, process: "Process", callback: Callback, args: tuple[Any, ...]
    ) -> "Event":
        """Queue an event; equal times are taken in the order in which they came."""
        if when_s < self.now_s:
            when_s = self.now_s
        event = Event((when_s, self._next(), process, callback, args))
        heappush(self._queue, event)
        return event

    def put_again(self, event: "Event") -> None:
        """Queue for now what could not be done when it was due."""
        event[:2] = self.now_s, self._next()
        heappush(self._queue, event)

    def run_until(self, stop_s: float) -> None:
        """Let time pass; raises ``SimulationFailure`` when something went wrong on the way."""
        queue, running = self._queue, None
        try:
            while queue and queue[0][0] <= stop_s:
                event = heappop(queue)
                when_s, _, process, callback, args = event
                if not process.alive or callback is None:
                    continue
                self.now_s = when_s
                if process.paused:
                    process.keep(event)
                    continue
                if process is not running:
                    running = process
                    asyncio._set_running_loop(process.loop)
                try:
                    callback(*args)
                except Exception as error:
                    self.fault(f"{process.name} raised {error!r}")
                if self.faults:
                    raise SimulationFailure("\n".join(self.faults))
        finally:
            asyncio._set_running_loop(None)
        self.now_s = stop_s

    def say(self, who: str, what: str) -> None:
        """Note an event in the trace."""
        self.trace.say(self.now_s, who, what)

    def fault(self, what: str) -> None:
        """Note a broken promise: the run ends with it."""
        if not self.over:
            self.say("FAULT", what)
            self.faults.append(what)

    def end(self) -> None:
        """Nothing runs any more: unwind every strand and close every coroutine quietly."""
        self.over = True
        for process in self.processes:
            process.end()


class Event(list[Any]):
    """Something that a process does at its time, unless it was cancelled: when, a number, who,
    what, with which arguments.

    A list, because there are thousands in a world: asyncio's own handles cost four times as much.
    """

    __slots__ = ()

    def cancel(self) -> None:
        """It is passed over when its time has come."""
        self[3] = None


class Process:
    """One simulated process, on ``machine``. For asyncio it is an event loop."""

    def __init__(self, scheduler: Scheduler, name: str, machine: str) -> None:
        self.scheduler = scheduler
        self.name = name
        self.machine = machine
        self.alive = True
        self.paused = False
        self.paused_s = 0.0
        self.strands: list[Strand] = []
        self.at_death: list[Callable[[], None]] = []
        self.loop = cast(asyncio.AbstractEventLoop, self)
        self._tasks: list[asyncio.Task[Any]] = []
        self._kept: list[Event] = []
        self._paused_at_s = 0.0
        scheduler.processes.append(self)

    # What asyncio needs of a loop.

    def time(self) -> float:
        return self.scheduler.now_s

    def get_debug(self) -> bool:
        return False

    def is_closed(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self.loop)

    def create_task(self, coro: Any, **options: Any) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.Task(coro, loop=self.loop, **options)
        self._tasks.append(task)
        return task

    def call_soon(self, callback: Callback, *args: Any, context: Context | None = None) -> Event:
        scheduler = self.scheduler
        return scheduler.put(scheduler.now_s, self, callback, args)

    def call_later(
        self, delay: float, callback: Callback, *args: Any, context: Context | None = None
    ) -> Event:
        scheduler = self.scheduler
        return scheduler.put(scheduler.now_s + delay, self, callback, args)

    def call_at(
        self, when: float, callback: Callback, *args: Any, context: Context | None = None
    ) -> Event:
        return self.scheduler.put(when, self, callback, args)

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Futures that nobody asked for their exception are normal where processes die."""

    # Life and death.

    def keep(self, event: Event) -> None:
        """For when it goes on."""
        self._kept.append(event)

    def every(self, interval_s: float, step: Callable[[], object]) -> None:
        """Call ``step`` again and again, a little late each time as real loops are."""

        def turn() -> None:
            self.call_later(interval_s * self.scheduler.random.uniform(1.0, 1.2), turn)
            step()

        self.call_soon(turn)

    def start(self, name: str, work: Callable[[], object]) -> "Strand":
        """Run blocking code."""
        strand = Strand(self, name, work)
        self.strands.append(strand)
        self.call_soon(strand.resume)
        return strand

    def pause(self) -> None:
        """SIGSTOP."""
        if not self.paused:
            self.paused = True
            self._paused_at_s = self.scheduler.now_s

    def go_on(self) -> None:
        """SIGCONT: everything that was due meanwhile is due now."""
        if self.paused:
            self.paused = False
            self.paused_s += self.scheduler.now_s - self._paused_at_s
            kept, self._kept = self._kept, []
            for event in kept:
                self.scheduler.put_again(event)

    def kill(self) -> None:
        """SIGKILL: what was on its way to others is on its way, nothing else happens here."""
        if self.alive:
            self.alive = False
            self.scheduler.say(self.name, "killed")
            for last_word in self.at_death:
                last_word()

    def end(self) -> None:
        """Unwind what is left, after the end of the world."""
        self.alive = False
        for strand in self.strands:
            strand.unwind()
        for task in self._tasks:
            if not task.done():
                close_quietly(task.get_coro())
                task._log_destroy_pending = False  # type: ignore[attr-defined]


def close_quietly(coroutine: Any) -> None:
    """Unwind a coroutine, through all that it waits for on its way out."""
    for _ in range(8):
        try:
            coroutine.close()
        except RuntimeError:  # it waits for something in a finally block
            continue
        except Exception:
            return  # its process is long dead, and its memory somebody else's
        else:
            return


class Strand:
    """Blocking code that runs while the scheduler waits, and the other way round."""

    def __init__(self, process: Process, name: str, work: Callable[[], object]) -> None:
        self.process = process
        self.name = name
        self.done: asyncio.Future[None] = process.create_future()
        self._scheduler = process.scheduler
        self._work = work
        self._code: greenlet | None = None

    def resume(self) -> None:
        """Called by the scheduler: goes on until the strand blocks or ends."""
        if self.done.done():
            return
        before, self._scheduler.strand = self._scheduler.strand, self
        if self._code is None:
            self._code = greenlet(self._run)
        self._code.parent = getcurrent()
        self._code.switch()
        self._scheduler.strand = before

    def wait(self, future: "asyncio.Future[Any] | None", timeout_s: float | None) -> bool:
        """Called by the strand: block until ``future`` is done; whether it is."""
        waiting = [True]

        def wake(_: object = None) -> None:
            if waiting[0]:
                waiting[0] = False
                self.resume()

        if self._scheduler.over:
            raise Killed
        if future is not None and future.done():
            return True
        if future is not None:
            future.add_done_callback(wake)
        timer = None if timeout_s is None else self.process.call_later(timeout_s, wake)
        assert self._code is not None
        self._code.parent.switch()
        if timer is not None:
            timer.cancel()
        if self._scheduler.over:
            raise Killed
        return future is not None and future.done()

    def unwind(self) -> None:
        """Let the code end; the world is over."""
        while self._code is not None and not self._code.dead:
            self._code.parent = getcurrent()
            self._code.switch()

    def _run(self) -> None:
        try:
            self._work()
        except Killed:
            pass
        except BaseException as error:
            where = "".join(traceback.format_tb(error.__traceback__)[-4:])
            self._scheduler.fault(f"{self.name} raised {error!r}\n{where}")
        finally:
            if not self._scheduler.over:
                self.done.set_result(None)


def current(scheduler: Scheduler) -> Strand:
    """The strand that is running."""
    assert scheduler.strand is not None, "only blocking code may block"
    return scheduler.strand
