"""One home's part of the directory: which node holds which cells of which key.

Soft state, told by the nodes themselves. Each node sends each home one stream of announcements:

    stream 1:  0 (starts over)   1   2   3 ...          a message is taken only when it is the
    stream 2:  0 (starts over)   1 ...                  next of the newest stream

Number 0 of a newer stream, or anything of a newer incarnation, forgets all that the node had
said. Everything else that is not the next message changes nothing, so that messages may be lost,
repeated and late. Every answer reports how far the home is, and a digest of what it remembers of
the sender, from which the sender sees what is to be done (``kvstore.announce``).

An entry is a hint: the node that holds a cell is the only one to know. ``remove`` takes out what
a node has refused; should that have been wrong, the digests differ and the node starts over.

Does not cover: which keys belong to this home (``kvstore.placement``), and whether a node is
reachable: entries of an unreachable node stay, see ``Located.without``.
"""

from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np

from kvstore.changes import Cells, Changes, Digest, Flags, Indexes, Words, as_words
from kvstore.cluster_map import NODES_MAX, ClusterMap
from kvstore.errors import UsageError
from kvstore.holders import HolderTable, Located, Masks
from kvstore.key import Keys

ANNOUNCEMENT_CHANGES_MAX = 1024
LOCATE_KEYS_MAX = 4096
HOLDERS_PER_KEY_MAX = 16
"""More holders of one key than a reader will ever try are not worth the answer's bytes."""


@dataclass(frozen=True, slots=True, eq=False)
class Announcement:
    """One message of a node's stream to a home; without changes it only asks for the answer."""

    node: int
    incarnation: int
    stream: int
    sequence: int
    changes: Changes

    def __post_init__(self) -> None:
        if not 0 <= self.node < NODES_MAX:
            raise UsageError(f"a node's index must be 0 to {NODES_MAX - 1}, got {self.node}")
        if self.stream < 1 or self.sequence < 0:
            raise UsageError(f"streams start at 1, got {self.stream}; messages at 0")
        if len(self.changes) > ANNOUNCEMENT_CHANGES_MAX:
            raise UsageError(
                f"{len(self.changes)} changes are over {ANNOUNCEMENT_CHANGES_MAX}: split them"
            )


class Reception(IntEnum):
    """What became of an announcement."""

    APPLIED = 1
    REPEATED = 2
    """Known already."""
    GAP = 3
    """Something before it is missing: a message, or all that was said before the home restarted."""
    STALE = 4
    """Of a stream or an incarnation that has been replaced."""


@dataclass(frozen=True, slots=True)
class Answer:
    """How far a home is with a node: its incarnation, stream (0: none), the next number."""

    reception: Reception
    incarnation: int
    stream: int
    expected: int
    digest: Digest


@dataclass(slots=True)
class _Progress:
    """What a home knows of one node's announcements."""

    incarnation: int
    stream: int = 0
    expected: int = 0
    digest: Digest = field(default_factory=Digest)

    def answer(self, reception: Reception) -> Answer:
        return Answer(reception, self.incarnation, self.stream, self.expected, self.digest)


class Directory:
    """What one home has been told. Called by one thread at a time."""

    def __init__(self) -> None:
        self._holders = HolderTable()
        self._progress: dict[int, _Progress] = {}

    def __len__(self) -> int:
        """How many blocks are held, a block held by two nodes counted twice."""
        return len(self._holders)

    @property
    def nbytes(self) -> int:
        """Bytes of all entries, free ones too."""
        return self._holders.nbytes

    def apply(self, announcement: Announcement) -> Answer:
        """Take an announcement if it is the next one; the answer says which one is."""
        node = announcement.node
        progress = self._progress.get(node)
        if progress is None or progress.incarnation < announcement.incarnation:
            self._forget(node)
            progress = self._progress[node] = _Progress(announcement.incarnation)
        elif progress.incarnation > announcement.incarnation:
            return progress.answer(Reception.STALE)
        if announcement.stream < progress.stream:
            return progress.answer(Reception.STALE)
        if announcement.stream > progress.stream:
            if announcement.sequence != 0:
                return progress.answer(Reception.GAP)
            self._forget(node)
            progress = _Progress(announcement.incarnation, announcement.stream)
            self._progress[node] = progress
        if announcement.sequence < progress.expected:
            return progress.answer(Reception.REPEATED)
        if announcement.sequence > progress.expected:
            return progress.answer(Reception.GAP)
        progress.expected += 1
        self._update(node, progress, announcement.changes)
        return progress.answer(Reception.APPLIED)

    def locate(self, keys: Keys, holders_max: int = HOLDERS_PER_KEY_MAX) -> Located:
        """Who holds each key, the newest announced first; at most ``holders_max`` each."""
        if len(keys) > LOCATE_KEYS_MAX:
            raise UsageError(f"{len(keys)} keys are over {LOCATE_KEYS_MAX}: split them")
        if not 1 <= holders_max < NODES_MAX:
            raise UsageError(f"holders_max must be 1 to {NODES_MAX - 1}, got {holders_max}")
        return self._holders.locate(as_words(keys), holders_max)

    def remove(self, node: int, keys: Keys, cells: Cells) -> None:
        """Take out cells that ``node`` has refused; what is not there is passed over."""
        progress = self._progress.get(node)
        if progress is not None:
            count = len(keys)
            refused = Changes(keys, cells, np.zeros(count, np.uint64), np.zeros(count, np.bool_))
            self._update(node, progress, refused)

    def drop(self, node: int) -> None:
        """Forget a node and its stream; it starts over with its next announcement."""
        self._forget(node)
        self._progress.pop(node, None)

    def follow(self, cluster_map: ClusterMap) -> None:
        """Forget the nodes that a newer map has no more, and what restarted nodes had said."""
        for node, progress in list(self._progress.items()):
            info = cluster_map.by_index(node)
            if info is None:
                self.drop(node)
            elif info.incarnation > progress.incarnation:
                self._forget(node)
                self._progress[node] = _Progress(info.incarnation)

    def digest(self, node: int) -> Digest:
        """Of all that is remembered of ``node``."""
        progress = self._progress.get(node)
        return Digest() if progress is None else progress.digest

    def _forget(self, node: int) -> None:
        if self.digest(node).cells:
            self._holders.drop(node)

    def _update(self, node: int, progress: _Progress, changes: Changes) -> None:
        if not len(changes):
            return
        words, gained, lost = _net(changes)
        old, new = self._holders.update(words, node, gained, lost)
        rows, cells = _bits(old ^ new)
        added = (new[rows] >> cells & np.uint64(1)).astype(np.bool_)
        progress.digest = progress.digest.after(words[rows], cells, added)


def _net(changes: Changes) -> tuple[Words, Masks, Masks]:
    """What changes come to: distinct keys, with the masks of cells added and removed."""
    words = as_words(changes.keys)
    order = np.lexsort((changes.cells, *words.T))
    words, cells, added = words[order], changes.cells[order], changes.added[order]
    new_key = _differs_from_previous(words)
    last_of_cell = np.ones(len(order), np.bool_)
    # Stable sort: of several changes of one cell, the last in the run is the last that happened.
    last_of_cell[:-1] = new_key[1:] | (cells[1:] != cells[:-1])
    bits = np.where(last_of_cell, np.uint64(1) << cells.astype(np.uint64), np.uint64(0))
    starts = np.flatnonzero(new_key)
    gained = np.bitwise_or.reduceat(np.where(added, bits, np.uint64(0)), starts)
    lost = np.bitwise_or.reduceat(np.where(added, np.uint64(0), bits), starts)
    return words[starts], gained, lost


def _differs_from_previous(words: Words) -> Flags:
    differs = np.ones(len(words), np.bool_)
    differs[1:] = (words[1:] != words[:-1]).any(axis=1)
    return differs


def _bits(masks: Masks) -> tuple[Indexes, Cells]:
    """Every set bit, as its row and its number."""
    octets = masks.astype("<u8").view(np.uint8).reshape(len(masks), 8)
    rows, cells = np.nonzero(np.unpackbits(octets, axis=1, bitorder="little"))
    return rows, cells.astype(np.uint8)
