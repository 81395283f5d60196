"""Audience: which epochs of tenants a node's clients go by, as their beats say.

An erasure is done when every client that lives goes by the new epoch. Who has been silent for as
long as a session lives is dead: it learns all epochs with its next session, before anything else.
Later it is told what has changed since it was told last.
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
    """One session: the version that it goes by, and when it was last heard (the loop's time).

    ``told`` is the version that it was told.
    """

    heard_s: float
    version: int = 0
    told: int = 0


class Audience:
    """The sessions of a node. Used on the event loop's thread only."""

    def __init__(self, epochs: TenantEpochs) -> None:
        self._epochs = epochs
        self._listeners: dict[int, _Listener] = {}

    def join(self, session: int) -> None:
        """A session has begun, and has said nothing yet."""
        self._listeners[session] = _Listener(_now_s())

    def heard(self, session: int, version: int) -> None:
        """A beat of that session says so."""
        listener = self._listeners[session]
        listener.version, listener.heard_s = version, _now_s()

    def leave(self, session: int) -> None:
        """The session has ended."""
        self._listeners.pop(session, None)

    def news(self, session: int) -> Iterator[pb.SessionEvent]:
        """What a client has still to be told; each event says which version it goes by then."""
        listener = self._listeners[session]
        while listener.told < self._epochs.version:
            news = self._epochs.news(listener.told, PAGE_TENANTS_MAX)
            listener.told = news.version
            yield pb.SessionEvent(epochs=life_messages.told_epochs(news.page, news.version))

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
