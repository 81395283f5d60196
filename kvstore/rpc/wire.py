"""The limits of the wire, and packed arrays in and out of ``bytes`` fields.

Covers: version, sizes, times and the token that both sides go by, and the checks on whatever comes
from outside. Does not cover: which message has which arrays (``kvstore.rpc.convert``).
"""

from enum import IntEnum
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from kvstore.errors import SamovarError
from kvstore.key import KEY_BYTES, Keys, as_keys
from kvstore.rpc import cluster_pb2 as pb

WIRE_VERSION = 3

PROBES_MAX = 16384
"""Keys times cells per look-up, touch or locate: a few milliseconds of a node's one thread."""
MESSAGE_BYTES_MAX = 4 << 20
"""Over the largest message that keeps to the limits above."""
CALL_DEADLINE_S = 2.0
CONTACT_S = 0.25
"""For a first answer where another node may do instead: a machine that is gone says nothing."""
ONWARD = 0.8
"""Of its patience a caller leaves so much to whom it asks: the rest is for the way."""
BEAT_S = 0.5
"""Between two signs of life; a node waits for four of them."""
KEEPALIVE_MS = 1000
"""Between two pings of a connection, which find out that the other *machine* is gone."""
KEEPALIVE_TIMEOUT_MS = 2000
"""For the answer to a ping: a machine under full load is slow, not gone."""

CHANNEL_OPTIONS = (
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.keepalive_time_ms", KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    # Come back quickly: a restarted node listens again within a second.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # How long one attempt to connect may take, whatever its name says: a node under full load needs
    # a while to greet. Calls have deadlines of their own.
    ("grpc.min_reconnect_backoff_ms", 1000),
    # Never through a proxy of the environment: these are our own machines.
    ("grpc.enable_http_proxy", 0),
    # Two clients of one process must not share a connection, hence neither its fate nor its token.
    ("grpc.use_local_subchannel_pool", 1),
)
SERVER_OPTIONS = (
    # Two servers on one port would each get half of the calls.
    ("grpc.so_reuseport", 0),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_metadata_size", 16 << 10),
    ("grpc.keepalive_time_ms", KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    # Without these a server takes a client's keepalive for abuse and hangs up.
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", KEEPALIVE_MS // 2),
    ("grpc.http2.max_ping_strikes", 0),
)

Metadata = tuple[tuple[str, str], ...]
AUTHORIZATION = "authorization"

Scalar = TypeVar("Scalar", np.uint8, np.uint16, np.uint32, np.uint64)
Code = TypeVar("Code", bound=IntEnum)


class WireFault(SamovarError):
    """A call that cannot be served; ``outcome`` is how a server names the reason.

    ``cluster_map`` goes with WRONG_EPOCH only.
    """

    def __init__(
        self, outcome: pb.Outcome, detail: str, cluster_map: pb.ClusterMap | None = None
    ) -> None:
        super().__init__(detail)
        self.outcome = outcome
        self.cluster_map = cluster_map

    def verdict(self) -> pb.Verdict:
        """For the head of the reply."""
        return pb.Verdict(outcome=self.outcome, detail=str(self), map=self.cluster_map)


def bearer(token: str | None) -> Metadata:
    """What a caller sends along to show that it knows the tier's secret."""
    return () if token is None else ((AUTHORIZATION, f"Bearer {token}"),)


def invalid(detail: str) -> WireFault:
    """The fault of a message that makes no sense."""
    return WireFault(pb.INVALID, detail)


def known(kind: type[Code], code: int, what: str) -> Code:
    """The member of an enum that a number stands for; raises ``WireFault`` where none does."""
    try:
        return kind(code)
    except ValueError:
        raise invalid(f"{what} {code} is unknown") from None


def pack(array: npt.ArrayLike, scalar: type[Scalar]) -> bytes:
    """An array as little-endian bytes."""
    return np.ascontiguousarray(array, np.dtype(scalar).newbyteorder("<")).tobytes()


def unpack(data: bytes, scalar: type[Scalar], count: int, what: str) -> npt.NDArray[Scalar]:
    """``count`` numbers; raises ``WireFault`` when ``data`` has more or fewer."""
    dtype = np.dtype(scalar).newbyteorder("<")
    if len(data) != count * dtype.itemsize:
        raise invalid(f"{what} has {len(data)} bytes instead of {count} x {dtype.itemsize}")
    return np.frombuffer(data, dtype)


def unpack_all(data: bytes, scalar: type[Scalar], limit: int, what: str) -> npt.NDArray[Scalar]:
    """As many numbers as there are, up to ``limit``."""
    count = len(data) // np.dtype(scalar).itemsize
    _check_limit(count, limit, what)
    return unpack(data, scalar, count, what)


def unpack_keys(data: bytes, limit: int) -> Keys:
    """Packed keys, uint8 ``[n, 32]``; raises ``WireFault`` for a broken one or too many."""
    count, rest = divmod(len(data), KEY_BYTES)
    if rest:
        raise invalid(f"keys has {len(data)} bytes, which is no multiple of {KEY_BYTES}")
    _check_limit(count, limit, "keys")
    return as_keys(data)


def _check_limit(count: int, limit: int, what: str) -> None:
    if count > limit:
        raise WireFault(
            pb.TOO_MANY_KEYS, f"{what} has {count} entries, over {limit}: split the call"
        )
