"""The client's end of a session: a thread that beats, listens, and opens anew what breaks.

    hello ──> stream opened ──> session number ──> map, unreachable nodes, ... ──> broken
      ^                                                                              |
      └────────────── pause, doubling from 0.1 to 1 s ───────────────────────────────┘

A broken session is not resumed: what hung on it is gone (see ``kvstore.node``), and the next one
has another number. Does not cover: the calls that a session is needed for (``client``).
"""

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import grpc

from kvstore.clock import Clock
from kvstore.cluster_map import ClusterMap
from kvstore.errors import SamovarError, UnavailableError
from kvstore.rpc import cache_pb2 as pb
from kvstore.rpc import convert, life_messages
from kvstore.rpc.cache_pb2_grpc import CacheStub
from kvstore.rpc.wire import BEAT_S, Metadata

log = logging.getLogger(__name__)

_PAUSE_MIN_S = 0.1
_PAUSE_MAX_S = 1.0


class Stream(Protocol):
    """What gRPC gives for a stream that is under way."""

    def __iter__(self) -> Iterator[pb.SessionEvent]: ...

    def cancel(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class Link:
    """An open session, and the life of the node that it is with."""

    session: int
    incarnation: int


class SessionThread:
    """Keeps one session open; ``map``, ``unreachable``, ``epochs`` are the node's latest word."""

    def __init__(
        self,
        address: str,
        stub: CacheStub,
        metadata: Metadata,
        hello: Callable[[], convert.Hello],
        contact_s: float,
        clock: Clock,
    ) -> None:
        self.map = ClusterMap(0, ())
        self.unreachable: frozenset[int] = frozenset()
        self.epochs: Mapping[bytes, int] = {}
        """Of the tenants that were erased. Replaced, never changed."""
        self._address = address
        self._stub = stub
        self._metadata = metadata
        self._hello = hello
        self._contact_s = contact_s
        self._clock = clock
        self._lost_since_s = clock.monotonic_s()
        self._epochs_version = 0
        self._link: Link | None = None
        self._reason = "it was not tried yet"
        self._stream: Stream | None = None
        self._ended = threading.Event()
        """That there are no more beats on the stream."""
        self._closing = threading.Event()
        self._tried = threading.Event()
        self._thread = threading.Thread(target=self._run, name="samovar-session", daemon=True)
        self._thread.start()

    def link(self) -> Link:
        """The open session. Waits for the first attempt to open one, and never again."""
        self._tried.wait(self._contact_s)
        link = self._link
        if link is None:
            raise UnavailableError(f"no session with {self._address}: {self._reason}")
        return link

    def is_open(self) -> bool:
        """Whether there is a session now. Waits as ``link`` does."""
        self._tried.wait(self._contact_s)
        return self._link is not None

    def epoch_of(self, tenant: bytes) -> int:
        """A tenant's epoch, as far as any session has told. Waits as ``link`` does."""
        self._tried.wait(self._contact_s)
        return self.epochs.get(tenant, 0)

    def lost_s(self) -> float:
        """For how long there has been no session, 0 while there is one."""
        return self._clock.monotonic_s() - self._lost_since_s if self._link is None else 0.0

    def drop(self, lost: Link) -> None:
        """A call has shown that this session is over: open another one."""
        stream = self._stream
        if self._link is lost and stream is not None:
            self._lose()
            stream.cancel()

    def hang_up(self, patience_s: float) -> None:
        """End the session and open no other.

        The node is to end the stream, when it has seen the last beat, and is given some time: a
        call that breaks off costs it memory for good (github.com/grpc/grpc/issues/43360).
        """
        self._closing.set()
        self._ended.set()
        self._thread.join(patience_s)
        stream = self._stream
        if stream is not None:
            stream.cancel()

    def join(self) -> None:
        """Wait for the thread to end, after ``hang_up``."""
        self._thread.join()

    def _run(self) -> None:
        pause_s = _PAUSE_MIN_S
        while not self._closing.is_set():
            try:
                reason = self._live()
                pause_s = _PAUSE_MIN_S
            except SamovarError as fault:
                reason = str(fault)
                pause_s = min(2 * pause_s, _PAUSE_MAX_S)
            if reason != self._reason and not self._closing.is_set():
                log.warning("no session with %s: %s", self._address, reason)
            self._reason = reason
            self._tried.set()
            self._closing.wait(pause_s)

    def _live(self) -> str:
        """One session from its opening to its end; answers why it ended."""
        hello = self._hello()
        self._learn(hello.map)
        incarnation = hello.identity.incarnation
        self._ended = ended = threading.Event()
        if self._closing.is_set():
            return "closed"
        self._epochs_version = 0
        try:
            beats = self._beats(incarnation, ended)
            stream: Stream = self._stub.Session(beats, metadata=self._metadata)
        except ValueError:  # the channel has been closed since
            return "closed"
        self._stream = stream
        try:
            if self._closing.is_set():
                ended.set()
            for event in stream:
                if event.HasField("closed"):
                    if self._link is None:
                        raise UnavailableError(event.closed.detail)
                    return str(event.closed.detail)
                self._take(event, incarnation)
            return "the node ended it"
        except grpc.RpcError as fault:
            return f"{fault.code().name}: {fault.details()}"
        finally:
            self._lose()
            self._stream = None
            ended.set()
            stream.cancel()

    def _lose(self) -> None:
        if self._link is not None:
            self._lost_since_s = self._clock.monotonic_s()
            self._link = None

    def _take(self, event: pb.SessionEvent, incarnation: int) -> None:
        kind = event.WhichOneof("event")
        if kind == "opened":
            self._link = Link(event.opened, incarnation)
            self._tried.set()
            log.info("session %d with %s is open", event.opened, self._address)
        elif kind == "map":
            self._learn(convert.map_from_message(event.map))
        elif kind == "epochs":
            self._take_epochs(event.epochs)
        elif kind == "unreachable":
            self.unreachable = convert.nodes_from_bytes(event.unreachable.nodes)

    def _take_epochs(self, told: pb.TenantEpochs) -> None:
        page = life_messages.epochs_from_message(told)
        epochs = dict(self.epochs)
        for tenant, epoch in zip(page.tenants, page.epochs.tolist(), strict=True):
            epochs[tenant.tobytes()] = max(epoch, epochs.get(tenant.tobytes(), 0))
        self.epochs = epochs
        self._epochs_version = max(self._epochs_version, told.version)

    def _beats(self, incarnation: int, ended: threading.Event) -> Iterator[pb.Beat]:
        """A sign of life at once and then in even steps; gRPC runs this in a thread of its own."""
        yield pb.Beat(incarnation=incarnation)
        while not ended.wait(BEAT_S):
            yield pb.Beat(epochs_version=self._epochs_version)

    def _learn(self, told: ClusterMap) -> None:
        # A node that has just started has no map yet; ours is worth more than none.
        if told.epoch:
            self.map = told
