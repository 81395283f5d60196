"""One storage node's control port, seen from an inference worker.

``ControlClient`` answers like ``kvstore.node.Node``: numpy in, numpy out, the same dataclasses.
It is synchronous and may be used from many threads. A node that does not answer, has restarted,
or has ended the session raises ``UnavailableError``; only a caller's bug raises anything else.
Does not cover: payload (``kvstore.transport``), which node to ask (``kvstore.search``).
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
import numpy as np
import numpy.typing as npt

from kvstore.calls import (
    AcquireReply,
    Damage,
    NodeIdentity,
    NodeStats,
    Outcomes,
    ReserveReply,
    ReserveRequest,
)
from kvstore.clock import Clock, SystemClock
from kvstore.cluster_map import ClusterMap
from kvstore.errors import ConfigError, SamovarError, UnavailableError, UsageError
from kvstore.holders import Located
from kvstore.key import Keys
from kvstore.rpc import cache_pb2, cluster_pb2, convert, directory_pb2
from kvstore.rpc.cache_pb2_grpc import CacheStub
from kvstore.rpc.cluster_pb2_grpc import ClusterStub
from kvstore.rpc.directory_pb2_grpc import DirectoryStub
from kvstore.rpc.life_client import LifeClient
from kvstore.rpc.session import Link, SessionThread
from kvstore.rpc.wire import (
    CALL_DEADLINE_S,
    CHANNEL_OPTIONS,
    PROBES_MAX,
    WIRE_VERSION,
    WireFault,
    bearer,
    pack,
    unpack,
)
from kvstore.table import Cells, Generations, Slots

FAREWELL_S = 0.5
"""How long a node may take to end what its client ends."""

Value = TypeVar("Value")
Digests = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class StaleMap:
    """The node goes by another map than the caller: ask again with this one, if it is newer."""

    map: ClusterMap


class ControlClient:
    """A connection, a session on it, and the node's calls.

    A fork inherits nothing of it that works: in a child every call raises ``UsageError`` at once.
    """

    def __init__(
        self,
        address: str,
        token: str | None = None,
        deadline_s: float = CALL_DEADLINE_S,
        contact_s: float = CALL_DEADLINE_S,
        clock: Clock | None = None,
    ) -> None:
        """Connects in the background: this returns at once, whether or not the node is there.

        Calls wait ``deadline_s`` for an answer, but ``contact_s`` until the node has said hello.
        """
        self.address = address
        self._deadline_s = deadline_s
        self._contact_s = min(contact_s, deadline_s)
        self._process = os.getpid()
        self._closed = False
        self._has_answered = False
        self._metadata = bearer(token)
        self._channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._cache = CacheStub(self._channel)
        self._directory = DirectoryStub(self._channel)
        self._cluster = ClusterStub(self._channel)
        self._hello: convert.Hello | None = None
        self._session = SessionThread(
            address,
            self._cache,
            self._metadata,
            self.hello,
            self._contact_s,
            clock or SystemClock(),
        )
        self.life = LifeClient(self._channel, self._asked, self._session.epoch_of, deadline_s)

    @property
    def identity(self) -> NodeIdentity:
        """Who answered last; asks if nobody has yet."""
        return (self._hello or self.hello()).identity

    @property
    def session(self) -> int:
        """The open session; raises ``UnavailableError`` while there is none."""
        return self._link().session

    @property
    def map(self) -> ClusterMap:
        """The newest map that the node has told; asks if it has not told any."""
        return self._session.map if self._hello else self.hello().map

    @property
    def unreachable(self) -> frozenset[int]:
        """Indexes of nodes that do not answer, as far as this node knows."""
        return self._session.unreachable

    @property
    def told_epochs(self) -> Mapping[bytes, int]:
        """The epochs of the tenants that were erased, as far as this node has told."""
        return self._session.epochs

    def has_session(self) -> bool:
        """Whether there is a session now. Waits for the first attempt to open one, never again."""
        return self._session.is_open()

    def lost_s(self) -> float:
        """For how many seconds there has been no session, 0 while there is one."""
        return self._session.lost_s()

    @property
    def has_disk(self) -> bool:
        """Whether the node, when it answered last, had a disk behind its arena."""
        return (self._hello or self.hello()).has_disk

    def hello(self) -> convert.Hello:
        """Ask the node who it is and where its bytes are."""
        request = cache_pb2.HelloRequest(wire_version=WIRE_VERSION)
        reply = self._call(self._cache.Hello, request)
        self._hello = convert.hello_from_message(reply)
        return self._hello

    def lookup(self, keys: Keys, mask: int) -> int:
        """How many leading blocks have all cells of ``mask`` there."""
        found = 0
        for part in _parts(keys, mask):
            request = cache_pb2.LookupRequest(keys=pack(part, np.uint8), mask=mask)
            blocks = self._call(self._cache.Lookup, request).blocks
            found += blocks
            if blocks < len(part):
                break
        return found

    def reserve(self, request: ReserveRequest) -> ReserveReply:
        """See ``Node.reserve``."""
        link = self._link()
        message = convert.reserve_to_message(request, link.incarnation)
        with self._settling(link):
            reply = self._call(self._cache.Reserve, message, link)
            return self._read(convert.reserved_from_message, reply, len(request.keys))

    def commit(
        self, session: int, slots: Slots, generations: Generations, header_digests: Digests
    ) -> Outcomes:
        """See ``Node.commit``; may be repeated when its answer was lost."""
        link = self._link()
        message = cache_pb2.CommitRequest(
            incarnation=link.incarnation,
            session=session,
            slots=pack(slots, np.uint32),
            generations=pack(generations, np.uint64),
            header_digests=pack(header_digests, np.uint64),
        )
        with self._settling(link):
            reply = self._call(self._cache.Commit, message, link)
            return self._read(_outcomes, reply, len(slots))

    def abort(self, session: int, slots: Slots, generations: Generations) -> None:
        """See ``Node.abort``."""
        self._give_up(self._cache.Abort, session, slots, generations)

    def abandon(self, session: int, slots: Slots, generations: Generations) -> None:
        """See ``Node.abandon``."""
        self._give_up(self._cache.Abandon, session, slots, generations)

    def acquire(self, session: int, keys: Keys, cells: Cells, lease_ms: int) -> AcquireReply:
        """See ``Node.acquire``. The lease is shorter than ``lease_ms`` by this call's duration."""
        link = self._link()
        message = cache_pb2.AcquireRequest(
            incarnation=link.incarnation,
            session=session,
            keys=pack(keys, np.uint8),
            cells=pack(cells, np.uint8),
            lease_ms=lease_ms,
        )
        # An answer that comes after the lease is worth nothing.
        reply = self._call(self._cache.Acquire, message, link, lease_ms / 1000)
        return self._read(convert.acquired_from_message, reply, len(keys))

    def release(self, session: int, lease: int) -> None:
        """See ``Node.release``."""
        link = self._link()
        message = cache_pb2.ReleaseRequest(
            incarnation=link.incarnation, session=session, lease=lease
        )
        self._call(self._cache.Release, message, link)

    def discard(self, damaged: Sequence[Damage]) -> int:
        """See ``Node.discard``."""
        cells = [convert.damage_to_message(one) for one in damaged]
        request = cache_pb2.DiscardRequest(cells=cells)
        return int(self._call(self._cache.Discard, request).cells)

    def touch(self, keys: Keys, mask: int, session: int = 0, operation: int = 0) -> int:
        """See ``Node.touch``; a prompt of several calls has one stamp if it names an operation."""
        held = 0
        # The deepest part first: no block may seem older than those that follow it.
        for part in reversed(_parts(keys, mask)):
            request = cache_pb2.TouchRequest(
                keys=pack(part, np.uint8), mask=mask, session=session, operation=operation
            )
            held += self._call(self._cache.Touch, request).cells
        return held

    def stats(self) -> NodeStats:
        """The node's counters."""
        reply = self._call(self._cache.Stats, cache_pb2.StatsRequest())
        return convert.stats_from_message(reply)

    def locate(self, map_epoch: int, keys: Keys) -> Located | StaleMap:
        """Who holds these keys, as far as this home knows."""
        request = directory_pb2.LocateRequest(map_epoch=map_epoch, keys=pack(keys, np.uint8))
        reply = self._call(self._directory.Locate, request)
        if reply.verdict.outcome == cluster_pb2.WRONG_EPOCH:
            return StaleMap(convert.map_from_message(reply.verdict.map))
        return self._read(convert.located_from_message, reply, len(keys))

    def refute(self, map_epoch: int, node: int, incarnation: int, keys: Keys, cells: Cells) -> None:
        """Tell this home that the node does not hold these cells, whatever it announced.

        A hint: where the maps differ, or the node has restarted since, nothing is done.
        """
        request = directory_pb2.RefuteRequest(
            map_epoch=map_epoch,
            node=node,
            incarnation=incarnation,
            keys=pack(keys, np.uint8),
            cells=pack(cells, np.uint8),
        )
        self._call(self._directory.Refute, request)

    def set_map(self, cluster_map: ClusterMap) -> ClusterMap:
        """The coordinator's call: give the node a newer map; answers the one it has then."""
        request = cluster_pb2.SetMapRequest(map=convert.map_to_message(cluster_map))
        reply = self._call(self._cluster.SetMap, request)
        return convert.map_from_message(reply.map)

    def close(self) -> None:
        """End the session and the connection. In a forked child: nothing to do."""
        if self._closed or self._process != os.getpid():
            return
        self._closed = True
        self._session.hang_up(FAREWELL_S if self._has_answered else 0.0)
        self._channel.close()
        self._session.join()

    def _give_up(
        self, method: Callable[..., Any], session: int, slots: Slots, generations: Generations
    ) -> None:
        link = self._link()
        message = cache_pb2.AbortRequest(
            incarnation=link.incarnation,
            session=session,
            slots=pack(slots, np.uint32),
            generations=pack(generations, np.uint64),
        )
        with self._settling(link):
            self._call(method, message, link)

    @contextmanager
    def _settling(self, link: Link) -> Iterator[None]:
        """Around a call that begins or ends reservations. Without an answer nobody knows which
        there are: the session is given up, and what hangs on it ends with it."""
        try:
            yield
        except UnavailableError:
            self._session.drop(link)
            raise

    def _link(self) -> Link:
        self._check_usable()
        return self._session.link()

    def _check_usable(self) -> None:
        if self._process != os.getpid():
            raise UsageError(
                f"the connection to {self.address} was opened by process {self._process} before "
                "it forked this one: open another one here"
            )
        if self._closed:  # by another thread, when the node moved: no fault of the caller
            raise UnavailableError(f"the connection to {self.address} was closed")

    def _call(
        self,
        method: Callable[..., Any],
        request: Any,
        link: Link | None = None,
        wait_s: float = float("inf"),
        deadline_s: float | None = None,
    ) -> Any:
        self._check_usable()
        met = self._hello is not None or method is self._cache.Hello
        wait_s = min(wait_s, (deadline_s or self._deadline_s) if met else self._contact_s)
        try:
            reply = method(request, timeout=wait_s, metadata=self._metadata)
            self._has_answered = True
        except grpc.RpcError as fault:
            raise _unavailable(self.address, fault) from None
        except ValueError:  # another thread has closed the channel meanwhile
            raise UnavailableError(f"the connection to {self.address} was closed") from None
        outcome = reply.verdict.outcome
        if outcome in (cluster_pb2.DONE, cluster_pb2.WRONG_EPOCH):
            return reply
        if outcome in (cluster_pb2.INVALID, cluster_pb2.TOO_MANY_KEYS):
            raise UsageError(f"{self.address}: {reply.verdict.detail}")
        if link is not None and request.session == link.session:
            self._session.drop(link)
        raise UnavailableError(f"{self.address}: {reply.verdict.detail or f'outcome {outcome}'}")

    def _asked(
        self,
        method: Callable[..., Any],
        request: object,
        reader: Callable[[Any], Value],
        deadline_s: float | None = None,
    ) -> Value:
        reply = self._call(method, request, deadline_s=deadline_s)
        return self._read(lambda found, _: reader(found), reply, 0)

    def _read(self, reader: Callable[[Any, int], Value], reply: object, count: int) -> Value:
        try:
            return reader(reply, count)
        except WireFault as fault:
            raise UnavailableError(f"{self.address} gave a broken answer: {fault}") from None


def _outcomes(reply: cache_pb2.CommitReply, count: int) -> Outcomes:
    return unpack(reply.outcomes, np.uint8, count, "outcomes")


def _unavailable(address: str, fault: grpc.RpcError) -> SamovarError:
    assert isinstance(fault, grpc.Call)
    if fault.code() is grpc.StatusCode.UNAUTHENTICATED:
        return ConfigError(f"{address} refused the token: use the tier's own token file")
    return UnavailableError(f"{address} did not answer: {fault.code().name}, {fault.details()}")


def _parts(keys: Keys, mask: int) -> list[Keys]:
    """The keys of one prompt in as few calls as the limit allows."""
    step = PROBES_MAX // max(1, mask.bit_count())
    return [keys[start : start + step] for start in range(0, len(keys), step)]
