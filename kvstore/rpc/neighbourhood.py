"""A storage node among the others: the map, announcements to the directory's homes, heartbeats.

    map E+1 ──> follow ──> told to clients (bulletin), own shard, announcer, membership, gossip
    every 100 ms: whom to beat? who does not answer? ──> told to clients
    every 50 ms:  anything to announce? one message under way per home, this node's own included

The rules are in ``kvstore.announce`` and ``kvstore.membership``; here they are carried out, on the
node's event loop. A node that no map names yet serves its cells and keeps quiet. One that a map
leaves out hears of no deletes: it is sealed, until it is in the map again and has read all others'
books (``kvstore.rpc.gossip``).
"""

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from kvstore.announce import Announcer
from kvstore.clock import Clock
from kvstore.cluster_map import ClusterMap
from kvstore.directory import Answer, Directory
from kvstore.membership import (
    BEAT_INTERVAL_S,
    Heartbeat,
    Liveness,
    LivenessEvent,
    Membership,
)
from kvstore.node import Node
from kvstore.rpc.bulletin import Bulletin
from kvstore.rpc.gossip import Gossip
from kvstore.rpc.leavers import Leavers
from kvstore.rpc.life_messages import Books
from kvstore.rpc.peer import Peer
from kvstore.rpc.tasks import Tasks

log = logging.getLogger(__name__)

BEAT_DEADLINE_S = 2 * BEAT_INTERVAL_S
CHECK_INTERVAL_S = 5.0
"""Between two comparisons of what we hold with what idle homes remember of it."""
_PAUSE_MIN_S = 0.05
_PAUSE_MAX_S = 1.0

_WORDS = {
    Liveness.SUSPECT: "is silent",
    Liveness.UNREACHABLE: "does not answer: it is passed over",
    Liveness.BACK: "answers again",
}


@dataclass(slots=True)
class _Standing:
    """What being in a map gives a node: a number, and a part in the protocols."""

    index: int
    announcer: Announcer
    membership: Membership


class Neighbourhood:
    """One node's dealings with the others. Called on the event loop's thread only."""

    def __init__(
        self,
        node: Node,
        directory: Directory,
        bulletin: Bulletin,
        clock: Clock,
        connect: Callable[[str], Peer],
    ) -> None:
        self._node = node
        self._directory = directory
        self._bulletin = bulletin
        self._clock = clock
        self._connect = connect
        self._standing: _Standing | None = None
        self._peers: dict[int, Peer] = {}
        self._gossip = Gossip(node, lambda: self._peers)
        self._announcing: dict[int, asyncio.Task[None]] = {}
        self._tasks = Tasks()
        self._leavers = Leavers(self._tasks)
        self._checked_s = clock.monotonic_s()
        self._epoch = node.life.epoch

    @property
    def peers(self) -> Mapping[int, Peer]:
        """The other nodes of the map; nobody while none names this one."""
        return self._peers

    @property
    def leavers(self) -> frozenset[int]:
        """Nodes that the map leaves out, and that may not know it."""
        return self._leavers.indexes

    @property
    def books(self) -> Books:
        """Digests of what this node was told for good."""
        return self._gossip.books

    def follow(self, cluster_map: ClusterMap) -> None:
        """Take a newer map; an older one, or the same, changes nothing."""
        me = cluster_map.by_id(self._node.identity.node_id)
        if me is not None and len(cluster_map.nodes) > 1:
            self._keep_company()
        if not self._bulletin.post_map(cluster_map):
            return
        self._directory.follow(cluster_map)
        if me is None:
            log.warning(
                "map %d does not name this node: it shows nothing of what it holds",
                cluster_map.epoch,
            )
            self._keep_company()
            self._node.seal()
            self._standing = None
            self._bulletin.post_unreachable(frozenset())
        else:
            standing = self._stand(me.index)
            standing.announcer.follow(cluster_map)
            standing.membership.follow(cluster_map, self._clock.monotonic_s())
            self._bulletin.post_unreachable(standing.membership.unreachable)
        self._meet(cluster_map)
        if me is None:
            self._gossip.away()
        else:
            self._gossip.follow(cluster_map, me.index)
        log.info("map %d has %d nodes", cluster_map.epoch, len(cluster_map.nodes))

    def received(self, beat: Heartbeat, books: Books) -> Heartbeat | None:
        """Take a heartbeat and answer with one; ``None`` while no map names this node."""
        if self._standing is None:
            return None
        self._gossip.heard(beat.sender, books)
        membership = self._standing.membership
        self._tell(membership.received(beat, self._clock.monotonic_s()))
        return membership.heartbeat()

    def beat(self) -> None:
        """Measure silence, and send the heartbeats that are due. Call it every 100 ms."""
        self._bulletin.post_epochs(self._node.life.tenants.version)  # gossip may have brought some
        if self._standing is None:
            return
        membership = self._standing.membership
        tick = membership.tick(self._clock.monotonic_s())
        self._tell(tick.events)
        if not tick.targets:
            return
        beat = membership.heartbeat()
        for target in tick.targets:
            self._tasks.spawn(self._beat(target, self._peers[target], beat))

    def announce(self) -> None:
        """See to it that every home is being told what it has not been told. Every 50 ms."""
        if self._standing is None:
            self._node.drain_changes()  # a first announcement begins with all that is held
            return
        announcer = self._standing.announcer
        if self._epoch != self._node.life.epoch:
            self._epoch = self._node.life.epoch
            announcer.start_over()
        if self._clock.monotonic_s() - self._checked_s >= CHECK_INTERVAL_S:
            self._checked_s = self._clock.monotonic_s()
            announcer.check()
        for home in announcer.homes:
            task = self._announcing.get(home.index)
            idle = task is None or task.done()
            if idle and announcer.message_for(home.index) is not None:
                self._announcing[home.index] = self._tasks.spawn(self._announce(home.index))

    async def close(self) -> None:
        """Stop talking to the others."""
        await self._gossip.close()
        await self._tasks.close()
        await asyncio.gather(*(peer.close() for peer in self._peers.values()))
        self._peers.clear()

    def _keep_company(self) -> None:
        try:
            self._node.life.keep_company()
        except OSError as fault:
            log.error("after a restart, what is deleted meanwhile may show for a moment: %s", fault)

    def _stand(self, index: int) -> _Standing:
        if self._standing is None or self._standing.index != index:
            incarnation = self._node.identity.incarnation
            self._standing = _Standing(
                index,
                Announcer(index, incarnation, self._node),
                Membership(index, incarnation, self._clock.monotonic_s()),
            )
        return self._standing

    def _meet(self, cluster_map: ClusterMap) -> None:
        """Connect to the nodes of the map; those that are in it no more are to know that."""
        index = None if self._standing is None else self._standing.index
        gone = [other for other in self._peers if cluster_map.by_index(other) is None]
        self._leavers.follow(cluster_map, {other: self._peers.pop(other) for other in gone})
        wanted = {} if index is None else {n.index: n.control for n in cluster_map.nodes}
        for other, peer in list(self._peers.items()):
            if wanted.get(other) != peer.address:
                self._tasks.spawn(self._peers.pop(other).close())
        for other, address in wanted.items():
            if other != index and other not in self._peers:
                self._peers[other] = self._connect(address)

    def _tell(self, events: tuple[LivenessEvent, ...]) -> None:
        for event in events:
            log.warning("node %d %s", event.node, _WORDS[event.liveness])
        if events and self._standing is not None:
            self._bulletin.post_unreachable(self._standing.membership.unreachable)

    async def _beat(self, target: int, peer: Peer, beat: Heartbeat) -> None:
        echo = await peer.beat(beat, self.books, BEAT_DEADLINE_S)
        if echo is None:
            return
        self._gossip.heard(target, echo.books)
        if echo.beat is not None and self._standing is not None:
            now_s = self._clock.monotonic_s()
            self._tell(self._standing.membership.received(echo.beat, now_s))
        if echo.map is not None:
            self.follow(echo.map)
        elif echo.map_epoch < self._bulletin.now.map.epoch:
            await peer.hand_on(self._bulletin.now.map, BEAT_DEADLINE_S)

    async def _announce(self, home: int) -> None:
        """Send a home message after message until it has been told everything."""
        pause_s = _PAUSE_MIN_S
        while (standing := self._standing) is not None:
            if home not in {info.index for info in standing.announcer.homes}:
                return
            announcement = standing.announcer.message_for(home)
            if announcement is None:
                return
            answer: Answer | ClusterMap | None
            if home == standing.index:
                answer = self._directory.apply(announcement)
                await asyncio.sleep(0)
            else:
                epoch = self._bulletin.now.map.epoch
                answer = await self._peers[home].announce(announcement, epoch)
            if isinstance(answer, Answer):
                standing.announcer.answered(home, answer)
                pause_s = _PAUSE_MIN_S
                continue
            if isinstance(answer, ClusterMap):
                self.follow(answer)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _PAUSE_MAX_S)
