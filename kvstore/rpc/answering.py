"""How every unary call is answered: with a verdict, whatever happens.

A handler is a plain function from request to reply (``answering``), or a coroutine that waits for
something first and is given the call's context (``answering_later``). Breaches of the contract, and
a caller's bugs that the tier finds, become verdicts; anything else is our own bug, which gRPC logs
and turns into a failed call.
"""

from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

import grpc

from kvstore.errors import UsageError
from kvstore.rpc import cluster_pb2 as pb
from kvstore.rpc.wire import WireFault, invalid


class Reply(Protocol):
    """Any reply message: they all have a verdict."""

    @property
    def verdict(self) -> pb.Verdict: ...


Service = TypeVar("Service")
Request = TypeVar("Request")
ReplyType = TypeVar("ReplyType", bound=Reply)
Handler = Callable[[Service, Request], ReplyType]
Context = grpc.aio.ServicerContext[Request, ReplyType]
Method = Callable[[Service, Request, Context[Request, ReplyType]], Awaitable[ReplyType]]


def answering(
    reply_type: type[ReplyType],
) -> Callable[[Handler[Service, Request, ReplyType]], Method[Service, Request, ReplyType]]:
    """Make a gRPC method of a handler that replies with ``reply_type``."""

    def decorate(
        handler: Handler[Service, Request, ReplyType],
    ) -> Method[Service, Request, ReplyType]:
        async def at_once(
            service: Service, request: Request, context: Context[Request, ReplyType]
        ) -> ReplyType:
            return handler(service, request)

        return answering_later(reply_type)(at_once)

    return decorate


def answering_later(
    reply_type: type[ReplyType],
) -> Callable[[Method[Service, Request, ReplyType]], Method[Service, Request, ReplyType]]:
    """``answering`` for a handler that waits for something before it replies."""

    def decorate(
        handler: Method[Service, Request, ReplyType],
    ) -> Method[Service, Request, ReplyType]:
        async def method(
            service: Service, request: Request, context: Context[Request, ReplyType]
        ) -> ReplyType:
            try:
                reply = await handler(service, request, context)
            except WireFault as fault:
                return _refusal(reply_type, fault)
            except UsageError as fault:
                return _refusal(reply_type, invalid(str(fault)))
            reply.verdict.outcome = pb.DONE
            return reply

        return method

    return decorate


def _refusal(reply_type: type[ReplyType], fault: WireFault) -> ReplyType:
    reply = reply_type()
    reply.verdict.CopyFrom(fault.verdict())
    return reply
