"""Announcing: what a node tells the homes of the directory, one stream of messages per home.

        OPENING ── hello (number 0) answered ──> OPEN ── all answered, digests equal ──> settled
           ^         then: a snapshot's share     │
           └── the home lost something, the digests differ, or too much is waiting ──┘

A home hears of the keys whose spans it is a home of. A stream has one message under way: it is
sent again until the home's answer shows that it has arrived, so that messages and answers may be
lost, repeated and late. A hello carries nothing and the snapshot is taken when it is answered,
so a home that does not answer costs no memory.

A newer map moves spans: a home that gains one is told of its keys from a snapshot, a home that
loses one is told that they are gone, a new or restarted home gets a new stream.

Does not cover: sending, waiting and backing off between attempts (``kvstore.rpc``).
"""

from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kvstore.changes import Changes, Digest, Spans, as_words
from kvstore.cluster_map import ClusterMap, NodeInfo
from kvstore.directory import ANNOUNCEMENT_CHANGES_MAX, Announcement, Answer
from kvstore.errors import UsageError
from kvstore.placement import homes_of

WAITING_CHANGES_MAX = 1 << 16
"""More waiting changes than this, and than twice a snapshot's share, are worth a new stream."""


class ChangeSource(Protocol):
    """The node whose holdings are announced."""

    def drain_changes(self) -> Changes:
        """What has changed since the last call, in order, each cell strictly in turns."""
        ...

    def snapshot(self) -> Changes:
        """All that is held just now, as additions."""
        ...


@dataclass(slots=True)
class _Stream:
    """One home's stream: what waits for it, what is under way and what it has answered."""

    home: NodeInfo
    number: int = 1
    sequence: int = 0
    digest: Digest = field(default_factory=Digest)
    under_way: Changes | None = None
    check_wanted: bool = False
    waiting: deque[Changes] = field(default_factory=deque)
    waiting_count: int = 0
    waiting_max: int = WAITING_CHANGES_MAX

    @property
    def is_open(self) -> bool:
        """Whether the hello, which is number 0, has been answered."""
        return self.sequence > 0

    def reopen(self, number: int) -> None:
        """Start over as stream ``number``."""
        self.number = number
        self.sequence = 0
        self.digest = Digest()
        self.under_way = None
        self.check_wanted = False
        self.waiting.clear()
        self.waiting_count = 0

    def push(self, changes: Changes) -> None:
        """Queue what has just happened; an opening stream's snapshot will include it."""
        if not self.is_open or not len(changes):
            return
        self.waiting.append(changes)
        self.waiting_count += len(changes)
        if self.waiting_count > self.waiting_max:
            self.reopen(self.number + 1)

    def load(self, changes: Changes) -> None:
        """Queue a snapshot's share, however large."""
        self.waiting_max = max(WAITING_CHANGES_MAX, 2 * (self.waiting_count + len(changes)))
        self.push(changes)

    def next_changes(self) -> Changes | None:
        """The changes of the message under way, now and until it is answered."""
        if self.under_way is None:
            if not self.is_open:
                self.under_way = Changes.empty()
            elif self.waiting or self.check_wanted:
                self.under_way = self._pop()
        return self.under_way

    def advance(self) -> None:
        """The message under way has arrived."""
        assert self.under_way is not None
        changes = self.under_way
        self.digest = self.digest.after(as_words(changes.keys), changes.cells, changes.added)
        self.sequence += 1
        self.under_way = None

    def _pop(self) -> Changes:
        self.check_wanted = False
        parts = []
        room = ANNOUNCEMENT_CHANGES_MAX
        while self.waiting and room:
            part = self.waiting.popleft()
            if len(part) > room:
                self.waiting.appendleft(part.select(slice(room, None)))
                part = part.select(slice(room))
            parts.append(part)
            room -= len(part)
        changes = Changes.concat(parts)
        self.waiting_count -= len(changes)
        return changes


class Announcer:
    """Keeps every home told of what ``source`` holds. Called by the source's thread."""

    def __init__(self, index: int, incarnation: int, source: ChangeSource) -> None:
        self._index = index
        self._incarnation = incarnation
        self._source = source
        self._map = ClusterMap(0, ())
        self._streams: dict[int, _Stream] = {}
        self._superseded = False

    @property
    def homes(self) -> tuple[NodeInfo, ...]:
        """All homes there are, this node among them."""
        return tuple(stream.home for stream in self._streams.values())

    def follow(self, cluster_map: ClusterMap) -> None:
        """Take a newer map; an older or equal one changes nothing."""
        if cluster_map.epoch <= self._map.epoch:
            return
        self._drain()
        old, self._map = self._map, cluster_map
        streams = self._streams
        self._streams = {}
        kept = []
        for home in cluster_map.nodes:
            stream = streams.get(home.index, _Stream(home))
            if stream.home.incarnation != home.incarnation:
                stream.reopen(stream.number + 1)
            if stream.is_open:
                kept.append(stream)
            stream.home = home
            self._streams[home.index] = stream
        if kept:
            self._move(kept, old, cluster_map)

    def message_for(self, home: int) -> Announcement | None:
        """What to send to ``home`` now: the same until answered, None when all is said."""
        self._drain()
        stream = self._stream(home)
        changes = stream.next_changes()
        if changes is None or self._superseded:
            return None
        return Announcement(self._index, self._incarnation, stream.number, stream.sequence, changes)

    def answered(self, home: int, answer: Answer) -> None:
        """Take a home's answer. Late and repeated ones do no harm; a gone home's is ignored."""
        stream = self._streams.get(home)
        if answer.incarnation != self._incarnation:
            self._superseded |= answer.incarnation > self._incarnation
            return
        if stream is None:
            return
        self._drain()
        if answer.stream > stream.number:
            stream.reopen(answer.stream + 1)
        elif answer.stream < stream.number:
            if stream.is_open:
                stream.reopen(stream.number + 1)
        elif answer.expected < stream.sequence:
            stream.reopen(stream.number + 1)
        elif answer.expected > stream.sequence and stream.under_way is not None:
            self._arrived(stream, answer)

    def start_over(self) -> None:
        """Tell every home everything anew: what is held was replaced as a whole."""
        self._drain()
        for stream in self._streams.values():
            stream.reopen(stream.number + 1)

    def check(self) -> None:
        """Have every idle home asked for its digest; call it every few seconds."""
        for stream in self._streams.values():
            stream.check_wanted = stream.is_open

    @property
    def settled(self) -> bool:
        """Whether every home has answered all there was to say."""
        self._drain()
        return all(
            stream.is_open and not stream.waiting and stream.under_way is None
            for stream in self._streams.values()
        )

    def _arrived(self, stream: _Stream, answer: Answer) -> None:
        was_open = stream.is_open
        stream.advance()
        if not was_open:
            snapshot = self._source.snapshot()
            targets, names = self._placed(snapshot.spans, self._map)
            stream.load(snapshot.select((targets == stream.home.index).any(axis=1)[names]))
        elif not stream.waiting and answer.digest != stream.digest:
            # While a change is waiting, the home may rightly have lost a cell already: a reader
            # was refused it. With nothing waiting the two must agree.
            stream.reopen(stream.number + 1)

    def _drain(self) -> None:
        """Queue what has changed; before every snapshot, so that no change is told twice."""
        changes = self._source.drain_changes()
        if not len(changes):
            return
        targets, names = self._placed(changes.spans, self._map)
        for home in np.unique(targets).tolist():
            self._streams[home].push(changes.select((targets == home).any(axis=1)[names]))

    def _move(self, streams: list[_Stream], old: ClusterMap, new: ClusterMap) -> None:
        """Tell homes with an open stream which spans a newer map gave them or took from them."""
        snapshot = self._source.snapshot()
        before, names = self._placed(snapshot.spans, old)
        after, _ = self._placed(snapshot.spans, new)
        for stream in streams:
            had = (before == stream.home.index).any(axis=1)[names]
            has = (after == stream.home.index).any(axis=1)[names]
            lost = snapshot.select(had & ~has).as_removed()
            stream.load(Changes.concat([snapshot.select(has & ~had), lost]))

    def _placed(
        self, spans: Spans, cluster_map: ClusterMap
    ) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.intp]]:
        """The homes of the distinct spans, and which distinct span each change is in."""
        distinct, names = np.unique(spans, return_inverse=True)
        return homes_of(distinct, cluster_map), names

    def _stream(self, home: int) -> _Stream:
        stream = self._streams.get(home)
        if stream is None:
            raise UsageError(f"node {home} is no home in the map of epoch {self._map.epoch}")
        return stream
