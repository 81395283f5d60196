"""Audience: which epochs of tenants a node's clients go by, as their beats say.

An erasure is done when every client that lives goes by the new epoch. Who has been silent for as
long as a session lives is dead: it learns all epochs with its next session, before anything else.
"""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass

from kvstore.rpc import cache_pb2 as pb
from kvstore.rpc import life_messages
from kvstore.sessions import SESSION_DEAD_S
from kvstore.tenants import PAGE_TENANTS_MAX, TenantEpochs

POLL_S = 0.02


@dataclass(slots=True)
class _Listener:
    """One session: the version that it goes by, and when it was last heard (the loop's time)."""

    version: int
    heard_s: float


class Audience:
    """The sessions of a node. Used on the event loop's thread only."""

    def __init__(self, epochs: TenantEpochs) -> None:
        self._epochs = epochs
        self._listeners: dict[int, _Listener] = {}

    def join(self, session: int) -> None:
        """A session has begun, and has said nothing yet."""
        self._listeners[session] = _Listener(0, _now_s())

    def heard(self, session: int, version: int) -> None:
        """A beat of that session says so."""
        self._listeners[session] = _Listener(version, _now_s())

    def leave(self, session: int) -> None:
        """The session has ended."""
        self._listeners.pop(session, None)

    def events(self) -> Iterator[pb.SessionEvent]:
        """What a client is told: all epochs. The last event says which version they are."""
        version, start = self._epochs.version, 0
        while True:
            page = self._epochs.page(start, PAGE_TENANTS_MAX)
            start = page.next
            told = life_messages.told_epochs(page, 0 if start else version)
            yield pb.SessionEvent(epochs=told)
            if not start:
                return

    async def all_know(self, patience_s: float) -> bool:
        """Wait until every living session goes by the epochs of now; whether it came to that."""
        version, until_s = self._epochs.version, _now_s() + patience_s
        while any(self._is_behind(each, version) for each in self._listeners.values()):
            if _now_s() >= until_s:
                return False
            await asyncio.sleep(POLL_S)
        return True

    def _is_behind(self, listener: _Listener, version: int) -> bool:
        return listener.version < version and _now_s() - listener.heard_s < SESSION_DEAD_S


def _now_s() -> float:
    return asyncio.get_running_loop().time()
