"""The simulated network: who reaches whom, how late, how often.

    source process ──copies──> wire ──> endpoint's process ──> handler ──copies──> source process

Messages are lost, late, doubled and overtake each other; links are cut in one direction or both.
An address that nobody listens on refuses at once while its machine is up, and is silent otherwise.
What arrives at a paused process waits there. ``Pipe`` keeps an order, as a TCP connection does.

Does not cover: gRPC's way of speaking (``tests.sim.channels``), payload (``tests.sim.bulk``).
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from tests.sim.scheduler import Process, Scheduler

RETRY_S = 0.2
GIVEN_UP_S = 2.0


class Refused(Exception):
    """Nobody listens there."""


@dataclass
class Weather:
    """What the network does to messages between machines."""

    delay_s: float = 0.001
    late: float = 0.0
    late_s: float = 0.3
    loss: float = 0.0
    doubled: float = 0.0
    flips: float = 0.0


@dataclass
class Endpoint:
    """What listens at an address."""

    process: Process
    services: dict[str, Any] = field(default_factory=dict)
    sessions: list[Callable[[], None]] = field(default_factory=list)


class Network:
    """All links of one world."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.weather = Weather()
        self.cut: set[tuple[str, str]] = set()
        self.slow_s: dict[str, float] = {}
        self.down: set[str] = set()
        self.silenced: set[str] = set()
        self.held_up_s: dict[str, float] = {}
        self.wire = Process(scheduler, "wire", "")
        self._endpoints: dict[str, Endpoint] = {}
        self._machines: dict[str, str] = {}

    def listen(self, address: str, endpoint: Endpoint) -> None:
        """From now on calls to ``address`` go there."""
        self._endpoints[address] = endpoint
        self._machines[address] = endpoint.process.machine

    def machine(self, address: str) -> str:
        """Where an address is."""
        return self._machines.get(address, "nowhere")

    def endpoint(self, address: str) -> Endpoint | None:
        """Who listens, if it lives."""
        found = self._endpoints.get(address)
        return found if found is not None and found.process.alive else None

    def copies(self, source: str, target: str, repeatable: bool = False) -> list[float]:
        """The delays after which copies of a message arrive; none when it is lost."""
        random, weather = self.scheduler.random, self.weather
        if source == target:
            return [] if source in self.down else [random.uniform(0.0001, 0.0005)]
        if source in self.down or target in self.down or (source, target) in self.cut:
            return []
        if random.random() < weather.loss:
            return []
        slow_s = self.slow_s.get(source, 0.0) + self.slow_s.get(target, 0.0)
        count = 2 if repeatable and random.random() < weather.doubled else 1
        delays = []
        for _ in range(count):
            late = random.random() < weather.late
            extra_s = random.uniform(0, weather.late_s) if late else 0.0
            delays.append(random.uniform(0.2, 2.0) * weather.delay_s + slow_s + extra_s)
        return delays

    def call(
        self,
        source: Process,
        address: str,
        work: Callable[[Endpoint], Awaitable[Any]] | None,
        repeatable: bool = False,
        label: str = "",
    ) -> asyncio.Future[Any]:
        """Have ``work`` done by whoever listens at ``address``; the answer may never come.

        Without ``work`` it is a ping, answered as soon as the process there runs.

        By its ``label`` a scene keeps a call from arriving: ``silenced`` names calls, or with
        " answer" their answers, ``held_up_s`` delays calls.
        """
        answer = source.create_future()
        target = self.machine(address)

        def settle(value: object) -> None:
            if not answer.done():
                if isinstance(value, Refused):
                    answer.set_exception(value)
                else:
                    answer.set_result(value)

        def send_back(value: object) -> None:
            if f"{label} answer" in self.silenced:
                return
            for delay_s in self.copies(target, source.machine, repeatable):
                self.wire.call_later(delay_s, settle, value)

        def arrive() -> None:
            endpoint = self.endpoint(address)
            if endpoint is None:
                send_back(Refused(address))
            else:
                endpoint.process.call_soon(begin, endpoint)

        def begin(endpoint: Endpoint) -> None:
            if work is None:
                send_back(None)
                return
            endpoint.process.at_death.append(reset)
            endpoint.process.create_task(serve(endpoint, work))

        def reset() -> None:
            if not answer.done():
                send_back(Refused(address))

        async def serve(endpoint: Endpoint, work: Callable[[Endpoint], Awaitable[Any]]) -> None:
            try:
                send_back(await work(endpoint))
            except Exception as error:
                self.scheduler.fault(f"{endpoint.process.name} failed to answer: {error!r}")
            endpoint.process.at_death.remove(reset)

        delays = self.copies(source.machine, target, repeatable)
        for delay_s in delays if label not in self.silenced else ():
            self.wire.call_later(delay_s + self.held_up_s.get(label, 0.0), arrive)
        return answer


class Pipe:
    """One direction of a connection: nothing is lost or overtaken, or it breaks."""

    def __init__(
        self,
        network: Network,
        source: str,
        target: str,
        deliver: Callable[[Any], None],
        broken: Callable[[], None],
    ) -> None:
        self._network = network
        self._link = (source, target)
        self._deliver = deliver
        self._broken = broken
        self._queue: deque[Any] = deque()
        self._since_s = 0.0
        self._over = False

    def send(self, message: object) -> None:
        self._queue.append(message)
        if len(self._queue) == 1 and not self._over:
            self._since_s = self._network.scheduler.now_s
            self._attempt()

    def close(self) -> None:
        self._over = True

    def _attempt(self) -> None:
        if self._over:
            return
        delays = self._network.copies(*self._link)
        if delays:
            self._network.wire.call_later(delays[0], self._arrived)
        elif self._network.scheduler.now_s - self._since_s > GIVEN_UP_S:
            self._over = True
            self._broken()
        else:
            self._network.wire.call_later(RETRY_S, self._attempt)

    def _arrived(self) -> None:
        if self._over:
            return
        self._deliver(self._queue.popleft())
        if self._queue:
            self._since_s = self._network.scheduler.now_s
            self._attempt()
