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

Work = Callable[["Endpoint"], Awaitable[Any]]
"""What is to be done by whoever is called."""

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
        chance, weather, down = self.scheduler.random.random, self.weather, self.down
        if source == target:
            return [] if source in down else [0.0001 + 0.0004 * chance()]
        if source in down or target in down or (source, target) in self.cut:
            return []
        if not (weather.loss or weather.late or weather.doubled or self.slow_s):
            return [(0.2 + 1.8 * chance()) * weather.delay_s]
        if chance() < weather.loss:
            return []
        slow_s = self.slow_s.get(source, 0.0) + self.slow_s.get(target, 0.0)
        count = 2 if repeatable and chance() < weather.doubled else 1
        delays = []
        for _ in range(count):
            extra_s = chance() * weather.late_s if chance() < weather.late else 0.0
            delays.append((0.2 + 1.8 * chance()) * weather.delay_s + slow_s + extra_s)
        return delays

    def call(
        self,
        source: Process,
        address: str,
        work: Work | None,
        repeatable: bool = False,
        label: str = "",
    ) -> asyncio.Future[Any]:
        """Have ``work`` done by whoever listens at ``address``; the answer may never come.

        Without ``work`` it is a ping, answered as soon as the process there runs.

        By its ``label`` a scene keeps a call from arriving: ``silenced`` names calls, or with
        " answer" their answers, ``held_up_s`` delays calls.
        """
        call = _Call(self, source, address, work, repeatable, label)
        if label not in self.silenced:
            held_up_s = self.held_up_s.get(label, 0.0)
            for delay_s in self.copies(source.machine, call.target, repeatable):
                self.wire.call_later(delay_s + held_up_s, call.arrive)
        return call.answer


class _Call:
    """A call that is under way; each of its copies is served, the first answer counts."""

    __slots__ = (
        "_address", "_label", "_network", "_repeatable", "_source", "_work", "answer", "target",
    )  # fmt: skip

    def __init__(
        self,
        network: Network,
        source: Process,
        address: str,
        work: Work | None,
        repeatable: bool,
        label: str,
    ) -> None:
        self.answer: asyncio.Future[Any] = source.create_future()
        self.target = network.machine(address)
        self._network = network
        self._source = source
        self._address = address
        self._work = work
        self._repeatable = repeatable
        self._label = label

    def arrive(self) -> None:
        """A copy is there. Whatever a process that stands still was sent waits with it."""
        endpoint = self._network.endpoint(self._address)
        if endpoint is None:
            self._send_back(Refused(self._address))
        elif self._work is None:
            endpoint.process.call_soon(self._send_back, None)
        else:
            endpoint.process.at_death.append(self._reset)
            endpoint.process.create_task(self._serve(endpoint, self._work))

    async def _serve(self, endpoint: Endpoint, work: Work) -> None:
        try:
            self._send_back(await work(endpoint))
        except Exception as error:
            name = endpoint.process.name
            self._network.scheduler.fault(f"{name} failed to answer: {error!r}")
        endpoint.process.at_death.remove(self._reset)

    def _reset(self) -> None:
        """The process died that was to answer."""
        if not self.answer.done():
            self._send_back(Refused(self._address))

    def _send_back(self, value: object) -> None:
        network = self._network
        if f"{self._label} answer" in network.silenced:
            return
        for delay_s in network.copies(self.target, self._source.machine, self._repeatable):
            network.wire.call_later(delay_s, self._settle, value)

    def _settle(self, value: object) -> None:
        if not self.answer.done():
            if isinstance(value, Refused):
                self.answer.set_exception(value)
            else:
                self.answer.set_result(value)


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
