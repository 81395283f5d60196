"""gRPC over the simulated network: channels that the real stubs and services speak through.

    real ControlClient, Peer ─> real stub ─> channel ─> network ─> real service ─> real Node, ...

Messages are serialised and parsed, so nothing is shared by accident. A unary call that is lost
ends with its deadline; its request may still arrive later. The session is a stream: both ends
learn of the other's death, unless the network keeps it from them.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import grpc

from tests.sim.network import Endpoint, Network, Pipe, Refused
from tests.sim.scheduler import Process, close_quietly, current

PING_S = 1.0
PONG_S = 2.0
ONCE = ("Reserve", "Acquire", "Delete", "Erase", "Hold")
"""gRPC never doubles a request by itself. Doubled, these would cost a reservation or a lease until
its session ends, an epoch, or a promise that is over already; all others may come twice, from
callers that try again."""


class SimRpcError(grpc.RpcError, grpc.Call):
    """How a call failed."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(f"{code.name}: {details}")
        self._code = code
        self._details = details

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._details

    def initial_metadata(self) -> tuple[()]:
        return ()

    def trailing_metadata(self) -> tuple[()]:
        return ()

    def is_active(self) -> bool:
        return False

    def time_remaining(self) -> float:
        return 0.0

    def cancel(self) -> bool:
        return False

    def add_callback(self, callback: Callable[[], None]) -> bool:
        return False


def _late(address: str) -> SimRpcError:
    return SimRpcError(grpc.StatusCode.DEADLINE_EXCEEDED, f"{address} did not answer in time")


def _refused(address: str) -> SimRpcError:
    return SimRpcError(grpc.StatusCode.UNAVAILABLE, f"{address} refuses connections")


def _method(path: str) -> tuple[str, str]:
    """Service and method of ``/package.Service/Method``."""
    service, _, method = path.rpartition("/")
    return service.rpartition(".")[2], method


class Context:
    """What a service learns of a unary call: how long its caller waits."""

    def __init__(self, network: Network, timeout_s: float | None) -> None:
        self._network = network
        self._until_s = None if timeout_s is None else network.scheduler.now_s + timeout_s

    def time_remaining(self) -> float | None:
        """As gRPC's."""
        if self._until_s is None:
            return None
        return max(0.0, self._until_s - self._network.scheduler.now_s)


def _send(
    network: Network,
    process: Process,
    address: str,
    path: str,
    request: Any,
    timeout_s: float | None,
) -> asyncio.Future[bytes]:
    data, kind = request.SerializeToString(), type(request)
    service, method = _method(path)
    context = Context(network, timeout_s)

    async def work(endpoint: Endpoint) -> bytes:
        reply = await getattr(endpoint.services[service], method)(kind.FromString(data), context)
        network.scheduler.say(endpoint.process.name, f"{method} for {process.name}")
        return bytes(reply.SerializeToString())

    answer: asyncio.Future[bytes] = network.call(process, address, work, method not in ONCE, method)
    return answer


class BlockingChannel:
    """``grpc.Channel``, for one strand or many of one process."""

    def __init__(self, network: Network, process: Process, address: str) -> None:
        self._network = network
        self._process = process
        self._address = address
        self._closed = False

    def unary_unary(
        self, path: str, response_deserializer: Callable[[bytes], Any], **_: object
    ) -> Callable[..., Any]:
        def call(request: Any, timeout: float | None = None, metadata: object = None) -> Any:
            if self._closed:
                raise ValueError("Cannot invoke RPC on closed channel!")
            answer = _send(self._network, self._process, self._address, path, request, timeout)
            if not current(self._network.scheduler).wait(answer, timeout):
                raise _late(self._address)
            try:
                return response_deserializer(answer.result())
            except Refused:
                raise _refused(self._address) from None

        return call

    def unary_stream(self, path: str, **_: object) -> None:
        """Nobody calls one yet."""

    def stream_stream(self, path: str, **_: object) -> Callable[..., "SessionStream"]:
        def call(requests: Iterator[Any], metadata: object = None) -> SessionStream:
            if self._closed:
                raise ValueError("Cannot invoke RPC on closed channel!")
            return SessionStream(self._network, self._process, self._address, requests)

        return call

    def close(self) -> None:
        self._closed = True


def _expire(answer: asyncio.Future[bytes]) -> None:
    """Nobody waits for it any longer."""
    if not answer.done():
        answer.set_exception(TimeoutError())


class AsyncChannel:
    """``grpc.aio.Channel``."""

    def __init__(self, network: Network, process: Process, address: str) -> None:
        self._network = network
        self._process = process
        self._address = address

    def unary_unary(
        self, path: str, response_deserializer: Callable[[bytes], Any], **_: object
    ) -> Callable[..., Any]:
        async def call(request: Any, timeout: float | None = None, metadata: object = None) -> Any:
            answer = _send(self._network, self._process, self._address, path, request, timeout)
            timer = None if timeout is None else self._process.call_later(timeout, _expire, answer)
            try:
                return response_deserializer(await answer)
            except Refused:
                raise _refused(self._address) from None
            except TimeoutError:
                raise _late(self._address) from None
            finally:
                if timer is not None:
                    timer.cancel()

        return call

    unary_stream = BlockingChannel.unary_stream
    stream_stream = BlockingChannel.unary_stream

    async def close(self) -> None:
        return


class SessionStream:
    """One session, seen from the client; ``_Served`` is its other end."""

    def __init__(
        self, network: Network, process: Process, address: str, requests: Iterator[Any]
    ) -> None:
        self._network = network
        self._process = process
        self._address = address
        self._events: deque[Any] = deque()
        self._news: asyncio.Future[None] = process.create_future()
        self._fault: SimRpcError | None = None
        self._ended = False
        machine = network.machine(address)
        self._served = _Served(self, network, address)
        self._up = Pipe(network, process.machine, machine, self._served.hear, self._lost)
        process.at_death.append(self._died)
        process.start(f"{process.name}/beats", lambda: self._beat(requests))
        self._ping()

    def __iter__(self) -> Iterator[Any]:
        while True:
            if self._events:
                yield self._events.popleft()
            elif self._fault is not None:
                raise self._fault
            elif self._ended:
                return
            else:
                self._news = self._process.create_future()
                current(self._network.scheduler).wait(self._news, None)

    def cancel(self) -> bool:
        self._break(grpc.StatusCode.CANCELLED, "cancelled here", tell=True)
        return True

    def take(self, event: Any) -> None:
        """From the other end: an event, or ``None`` at the end."""
        self._process.call_soon(self._take, event)

    def reset(self) -> None:
        """From the other end: it is gone."""
        self._process.call_soon(self._break, grpc.StatusCode.UNAVAILABLE, "connection reset")

    def _take(self, event: Any) -> None:
        if event is None:
            self._ended = True
        else:
            self._events.append(event)
        self._wake()

    def _beat(self, requests: Iterator[Any]) -> None:
        for request in requests:
            if self._fault is not None or self._ended:
                return
            self._up.send(request)
        self._up.send(None)

    def _ping(self) -> None:
        if self._fault is not None or self._ended:
            return

        answer = self._network.call(self._process, self._address, None)

        def look() -> None:
            if not answer.done() or answer.exception() is not None:
                self._break(grpc.StatusCode.UNAVAILABLE, "no answer to a ping", tell=True)

        self._process.call_later(PONG_S, look)
        self._process.call_later(PING_S, self._ping)

    def _lost(self) -> None:
        self._process.call_soon(self._break, grpc.StatusCode.UNAVAILABLE, "connection lost")

    def _died(self) -> None:
        if self._fault is None and not self._ended:
            self._served.reset_from(self._process.machine)

    def _break(self, code: grpc.StatusCode, details: str, tell: bool = False) -> None:
        if self._fault is None and not self._ended:
            self._fault = SimRpcError(code, details)
            self._up.close()
            if tell:
                self._served.reset_from(self._process.machine)
            self._wake()

    def _wake(self) -> None:
        if not self._news.done():
            self._news.set_result(None)


class _Served:
    """One session, seen from the node: the service's coroutine and what it reads and writes."""

    def __init__(self, stream: SessionStream, network: Network, address: str) -> None:
        self._stream = stream
        self._network = network
        self._address = address
        self._endpoint: Endpoint | None = None
        self._task: asyncio.Task[None] | None = None
        self._heard: asyncio.Queue[Any] = asyncio.Queue()
        self._back = (network.machine(address), stream._process.machine)
        self._down = Pipe(network, *self._back, stream.take, lambda: None)

    def hear(self, request: Any) -> None:
        """A request has arrived, or ``None`` at their end; the first one begins the session."""
        if self._endpoint is None:
            self._endpoint = self._network.endpoint(self._address)
            if self._endpoint is None:
                self._tell_reset()
                return
            self._endpoint.process.at_death.append(self._tell_reset)
            self._endpoint.process.call_soon(self._begin)
        if self._endpoint.process.alive:
            self._endpoint.process.call_soon(self._heard.put_nowait, request)
        else:
            self._tell_reset()

    def reset_from(self, machine: str) -> None:
        """The client's end is gone, and its machine says so if it can."""
        for delay_s in self._network.copies(machine, self._back[0]):
            self._network.wire.call_later(delay_s, self._cancel)

    async def write(self, event: Any) -> None:
        """As the service's context."""
        self._down.send(type(event).FromString(event.SerializeToString()))

    def _begin(self) -> None:
        assert self._endpoint is not None
        self._task = self._endpoint.process.create_task(self._serve(self._endpoint))

    async def _serve(self, endpoint: Endpoint) -> None:
        session = endpoint.services["Cache"].Session(self._requests(), self)
        try:
            await session
        except Exception as error:
            self._network.scheduler.fault(f"{endpoint.process.name} ended a session: {error!r}")
        finally:
            close_quietly(session)
        self._down.send(None)

    async def _requests(self) -> AsyncIterator[Any]:
        while (request := await self._heard.get()) is not None:
            yield request

    def _cancel(self) -> None:
        if self._task is not None and self._endpoint is not None:
            self._endpoint.process.call_soon(self._task.cancel)

    def _tell_reset(self) -> None:
        self._down.close()
        for delay_s in self._network.copies(*self._back):
            self._network.wire.call_later(delay_s, self._stream.reset)
