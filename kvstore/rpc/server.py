"""A node's control port: the four services on one gRPC server.

It lives on an event loop, and everything behind it is called on that loop's thread. Covers: the
port, the token. Does not cover: what the services do (``*_service``), the node's own loops
(``kvstore.server``).
"""

import hmac
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import grpc

from kvstore.errors import StateError
from kvstore.rpc.cache_pb2_grpc import add_CacheServicer_to_server
from kvstore.rpc.cache_service import CacheService
from kvstore.rpc.cluster_pb2_grpc import add_ClusterServicer_to_server
from kvstore.rpc.cluster_service import ClusterService
from kvstore.rpc.directory_pb2_grpc import add_DirectoryServicer_to_server
from kvstore.rpc.directory_service import DirectoryService
from kvstore.rpc.life_pb2_grpc import add_LifeServicer_to_server
from kvstore.rpc.life_service import LifeService
from kvstore.rpc.wire import AUTHORIZATION, SERVER_OPTIONS, bearer

CALLS_AT_ONCE_MAX = 8192
"""Sessions count: a node has at most half as many of them."""
GRACE_S = 0.2

Details = grpc.HandlerCallDetails
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any] | None"


class ControlServer:
    """The port. ``start`` gives its address, ``stop`` ends the calls that are under way."""

    def __init__(
        self,
        cache: CacheService,
        directory: DirectoryService,
        cluster: ClusterService,
        life: LifeService,
        token: str | None,
    ) -> None:
        guards = [] if token is None else [TokenGuard(token)]
        self._server = grpc.aio.server(
            options=SERVER_OPTIONS,
            interceptors=guards,
            maximum_concurrent_rpcs=CALLS_AT_ONCE_MAX,
        )
        add_CacheServicer_to_server(cache, self._server)
        add_DirectoryServicer_to_server(directory, self._server)
        add_ClusterServicer_to_server(cluster, self._server)
        add_LifeServicer_to_server(life, self._server)

    async def start(self, host: str, port: int) -> str:
        """Listen; port 0 takes any free one. Raises ``StateError`` if the port is taken."""
        host = f"[{host.strip('[]')}]" if ":" in host else host
        try:
            bound = self._server.add_insecure_port(f"{host}:{port}")
        except RuntimeError:
            bound = 0
        if not bound:
            raise StateError(f"cannot listen on {host}:{port}: choose another control_port")
        await self._server.start()
        return f"{host}:{bound}"

    async def stop(self) -> None:
        """Refuse new calls, give those under way a moment, then end them."""
        await self._server.stop(GRACE_S)


class TokenGuard(grpc.aio.ServerInterceptor):
    """Lets in whoever shows the tier's token, before a byte of the request is read."""

    def __init__(self, token: str) -> None:
        self._expected = bearer(token)[0][1].encode()

    async def intercept_service(
        self,
        continuation: Callable[[Details], Awaitable[Handler]],
        handler_call_details: Details,
    ) -> Handler:
        for name, value in handler_call_details.invocation_metadata:
            # Compared in constant time: how long it takes must not say how much was right.
            if name == AUTHORIZATION and hmac.compare_digest(_as_bytes(value), self._expected):
                return await continuation(handler_call_details)
        return grpc.stream_stream_rpc_method_handler(_deny)


async def _deny(requests: object, context: grpc.aio.ServicerContext[Any, Any]) -> None:
    await context.abort(grpc.StatusCode.UNAUTHENTICATED, "the token is missing or wrong")


def _as_bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else value
