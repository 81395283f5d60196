"""The Life service of one storage node, seen from a client; see ``kvstore.rpc.client``."""

from collections.abc import Callable
from functools import partial
from typing import Any

import grpc
import numpy as np

from kvstore.calls import HoldRequest, Inspection
from kvstore.key import Keys
from kvstore.life_access import Granted, Spread
from kvstore.rpc import life_messages as messages
from kvstore.rpc import life_pb2 as pb
from kvstore.rpc.life_pb2_grpc import LifeStub
from kvstore.rpc.wire import ONWARD, pack

ERASE_PATIENCE_S = 4.5
"""Nodes of nodes have time enough to find that a client has died."""

Ask = Callable[..., Any]
"""Makes a call, within a deadline that may be given, and reads the reply with what is given.

Raises ``UnavailableError`` and ``UsageError``.
"""


class LifeClient:
    """``kvstore.life_access.LifeAccess`` over gRPC, on the connection of a ``ControlClient``."""

    def __init__(
        self,
        channel: grpc.Channel,
        ask: Ask,
        epoch_of: Callable[[bytes], int],
        deadline_s: float,
    ) -> None:
        self._stub = LifeStub(channel)
        self._ask = ask
        self._epoch_of = epoch_of
        self._patience_ms = round(1000 * ONWARD * deadline_s)

    def delete(self, keys: Keys) -> Spread:
        request = pb.DeleteRequest(keys=pack(keys, np.uint8), patience_ms=self._patience_ms)
        spread: Spread = self._ask(self._stub.Delete, request, messages.spread_from_message)
        return spread

    def erase(self, tenant: bytes) -> Spread:
        request = pb.EraseRequest(tenant=tenant, patience_ms=round(1000 * ERASE_PATIENCE_S))
        read = messages.spread_from_message
        spread: Spread = self._ask(self._stub.Erase, request, read, ERASE_PATIENCE_S / ONWARD)
        return spread

    def epoch_of(self, tenant: bytes) -> int:
        return self._epoch_of(tenant)

    def hold(self, request: HoldRequest) -> Granted:
        message = messages.hold_to_message(request)
        granted: Granted = self._ask(self._stub.Hold, message, messages.held_from_message)
        return granted

    def release_hold(self, tenant: bytes, handle: str) -> bool:
        request = pb.ReleaseHoldRequest(tenant=tenant, handle=handle)
        released: bool = self._ask(self._stub.ReleaseHold, request, _released)
        return released

    def inspect(self, keys: Keys) -> list[Inspection]:
        request = pb.InspectRequest(keys=pack(keys, np.uint8))
        read = partial(messages.inspected_from_message, keys=keys)
        inspected: list[Inspection] = self._ask(self._stub.Inspect, request, read)
        return inspected


def _released(reply: pb.ReleaseHoldReply) -> bool:
    return bool(reply.released)
