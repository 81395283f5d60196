"""Membership: which nodes answer just now, by heartbeats between neighbours on the ring.

    silence 0 ..... 0.5 ..... 1.0 ..... 1.5 s ........................... next heartbeat
    node x  ALIVE                       SUSPECT ── enough agree ── UNREACHABLE ── BACK

A node beats its ring neighbours and measures how long each has been silent; a beat is answered
with a beat, so both ends measure one link. Silence of 1.5 s makes it suspect a neighbour, which
it tells everybody in its beats. A node is unreachable for me when enough nodes that answer
suspect it, two where there are two, and I have not heard from it myself: what I hear beats what
I am told. Nobody is removed: an unreachable node is only passed over until its next heartbeat.

A node that was itself asleep has heard nobody, which says nothing about the others: time by which
its own tick is late does not count as anybody's silence.

Does not cover: sending beats (``kvstore.rpc``), who belongs to the cluster
(``kvstore.cluster_map``) and what the directory remembers of a silent node (everything).
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import IntEnum

from kvstore.cluster_map import ClusterMap

BEAT_INTERVAL_S = 0.5
TICK_INTERVAL_S = 0.1
SUSPECT_AFTER_S = 1.5
LATE_TICK_S = 0.25
"""A longer time between two ticks is this node's own lateness."""
VOTE_LIFE_S = 2.0
"""A suspicion that is not repeated for so long has lapsed: its author may be gone itself."""
VOTES_NEEDED = 2


class Liveness(IntEnum):
    """What has become of a node, as an event."""

    SUSPECT = 1
    UNREACHABLE = 2
    BACK = 3


@dataclass(frozen=True, slots=True)
class LivenessEvent:
    """``node`` has become that."""

    node: int
    liveness: Liveness


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """What a node says of itself and of whom it suspects, each as (index, incarnation)."""

    sender: int
    incarnation: int
    map_epoch: int
    suspects: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Tick:
    """What a tick came to: events, and the nodes to send ``Membership.heartbeat()`` to now."""

    events: tuple[LivenessEvent, ...]
    targets: tuple[int, ...]


@dataclass(slots=True)
class _Peer:
    """What this node knows of another one. Times are monotonic seconds.

    ``heard_s`` is when it was last heard, ``watched_s`` since when it should have been: a node
    that becomes a neighbour has not yet had reason to beat us.
    """

    incarnation: int
    heard_s: float
    watched_s: float
    votes: dict[int, float] = field(default_factory=dict)
    suspected: bool = False
    unreachable: bool = False


class Membership:
    """One node's view of the others. Called by one thread, which passes the monotonic time."""

    def __init__(self, index: int, incarnation: int, now_s: float) -> None:
        self._index = index
        self._incarnation = incarnation
        self._map = ClusterMap(0, ())
        self._peers: dict[int, _Peer] = {}
        self._neighbours: frozenset[int] = frozenset()
        self._ticked_s = now_s
        self._beat_s = float("-inf")
        self._news = False

    @property
    def unreachable(self) -> frozenset[int]:
        """The nodes of the map that are passed over just now."""
        return frozenset(index for index, peer in self._peers.items() if peer.unreachable)

    @property
    def suspected(self) -> frozenset[int]:
        """The neighbours that have been silent for too long, by this node's own ears."""
        return frozenset(index for index, peer in self._peers.items() if peer.suspected)

    def follow(self, cluster_map: ClusterMap, now_s: float) -> tuple[LivenessEvent, ...]:
        """Take a newer map; new and restarted nodes begin as alive. Outside it, watch nobody."""
        if cluster_map.epoch <= self._map.epoch:
            return ()
        member = cluster_map.by_index(self._index) is not None
        others = [node for node in cluster_map.nodes if member and node.index != self._index]
        events: list[LivenessEvent] = []
        peers: dict[int, _Peer] = {}
        for node in others:
            peer = self._peers.get(node.index) or _Peer(node.incarnation, now_s, now_s)
            if peer.incarnation < node.incarnation:
                peer.incarnation, peer.heard_s, peer.watched_s = node.incarnation, now_s, now_s
                events += self._cleared(node.index, peer)
            peers[node.index] = peer
        self._map = cluster_map
        self._peers = peers
        self._watch(now_s)
        return tuple(events)

    def heartbeat(self) -> Heartbeat:
        """What to send to a target, and to answer to a beat."""
        suspects = sorted(self.suspected)
        named = tuple((index, self._peers[index].incarnation) for index in suspects)
        return Heartbeat(self._index, self._incarnation, self._map.epoch, named)

    def received(self, beat: Heartbeat, now_s: float) -> tuple[LivenessEvent, ...]:
        """Take a beat or the answer to one. Beats of strangers and predecessors are ignored."""
        sender = self._peers.get(beat.sender)
        if sender is None or beat.incarnation < sender.incarnation:
            return ()
        sender.incarnation = beat.incarnation
        sender.heard_s = now_s
        events = self._cleared(beat.sender, sender)
        if events:
            self._watch(now_s)
        self._count_votes(beat, now_s)
        return (*events, *self._judge(now_s))

    def tick(self, now_s: float) -> Tick:
        """Measure silence and say whom to beat; call it every ``TICK_INTERVAL_S``."""
        self._forgive_lateness(now_s)
        events = [*self._suspect(now_s), *self._judge(now_s)]
        due = now_s - self._beat_s >= BEAT_INTERVAL_S
        if not due and not self._news:
            return Tick(tuple(events), ())
        tell_all = self._news or bool(self.suspected)
        self._news = False
        self._beat_s = now_s
        targets = self._neighbours
        if tell_all:
            targets = targets | (self._peers.keys() - self.unreachable)
        return Tick(tuple(events), tuple(sorted(targets)))

    def _forgive_lateness(self, now_s: float) -> None:
        late_s = now_s - self._ticked_s - LATE_TICK_S
        self._ticked_s = now_s
        if late_s <= 0:
            return
        for peer in self._peers.values():
            peer.heard_s = min(now_s, peer.heard_s + late_s)
            peer.watched_s = min(now_s, peer.watched_s + late_s)
            for voter, at_s in peer.votes.items():
                peer.votes[voter] = min(now_s, at_s + late_s)

    def _suspect(self, now_s: float) -> Iterable[LivenessEvent]:
        for index in sorted(self._neighbours):
            peer = self._peers[index]
            silent_s = now_s - max(peer.heard_s, peer.watched_s)
            if not peer.suspected and silent_s >= SUSPECT_AFTER_S:
                peer.suspected = True
                self._news = True
                yield LivenessEvent(index, Liveness.SUSPECT)

    def _cleared(self, index: int, peer: _Peer) -> tuple[LivenessEvent, ...]:
        """A node that has just been heard is neither suspected nor unreachable."""
        peer.votes.clear()
        if not (peer.suspected or peer.unreachable):
            return ()
        # Others took my word that it was silent: they hear at once that it is not.
        self._news = self._news or peer.suspected
        peer.suspected = peer.unreachable = False
        return (LivenessEvent(index, Liveness.BACK),)

    def _count_votes(self, beat: Heartbeat, now_s: float) -> None:
        """A beat says all that its sender suspects: what it does not name any more lapses."""
        named = dict(beat.suspects)
        for index, peer in self._peers.items():
            if named.get(index) == peer.incarnation:
                peer.votes[beat.sender] = now_s
            else:
                peer.votes.pop(beat.sender, None)

    def _judge(self, now_s: float) -> list[LivenessEvent]:
        """Hold everybody's suspicions against what this node hears itself."""
        events = []
        for index, peer in sorted(self._peers.items()):
            votes = sum(now_s - at_s < VOTE_LIFE_S for at_s in peer.votes.values())
            agreed = bool(votes or peer.suspected)
            agreed = agreed and votes + peer.suspected >= self._needed(index)
            silent = now_s - peer.heard_s >= SUSPECT_AFTER_S
            if agreed and silent and not peer.unreachable:
                peer.unreachable = True
                events.append(LivenessEvent(index, Liveness.UNREACHABLE))
            elif peer.unreachable and not agreed:
                peer.unreachable = False
                if not peer.suspected:
                    events.append(LivenessEvent(index, Liveness.BACK))
        if events:
            self._watch(now_s)
        return events

    def _needed(self, index: int) -> int:
        """Two must agree, or all who can: those that I neither suspect nor pass over, and I."""
        able = sum(
            not (peer.suspected or peer.unreachable)
            for other, peer in self._peers.items()
            if other != index
        )
        return min(VOTES_NEEDED, 1 + able)

    def _watch(self, now_s: float) -> None:
        """Choose the neighbours, reaching over unreachable ones to the next that answer."""
        neighbours: frozenset[int] = frozenset()
        if self._peers:
            ring = self._map.ring_neighbours(self._index, self.unreachable)
            neighbours = frozenset(ring)
        for index in neighbours - self._neighbours:
            self._peers[index].watched_s = now_s
        for index in self._peers.keys() - neighbours:
            self._peers[index].suspected = False
        self._neighbours = neighbours
