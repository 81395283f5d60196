"""The cluster map: which storage nodes there are, numbered by the coordinator.

Only the map moves the homes of the directory; whether a node answers just now is another matter
(``kvstore.membership``). An epoch names one map of a tier for good; a higher one replaces a lower.
A node's index is never given to another node of the cluster, so an old index in a message names
a node that is gone, never a wrong one.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

from kvstore.cell import BLOCK_TOKENS_DEFAULT, check_block_tokens
from kvstore.errors import UsageError

NODES_MAX = 1 << 16
INCARNATION_MAX = (1 << 24) - 1
"""A generation is an incarnation and a 40-bit counter in 64 bits."""
RING_REACH = 2


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """One storage node: its number, its lasting name, where it runs and where it listens.

    ``incarnation`` grows with every start of the node; ``control`` and ``bulk`` are ``host:port``.
    """

    index: int
    node_id: str
    host_id: str
    incarnation: int
    control: str
    bulk: str
    arena_folder: str

    def __post_init__(self) -> None:
        if not 0 <= self.index < NODES_MAX:
            raise UsageError(f"a node's index must be 0 to {NODES_MAX - 1}, got {self.index}")
        if not self.node_id or not self.host_id:
            raise UsageError(f"node {self.index} needs a node_id and a host_id")
        if not 0 <= self.incarnation <= INCARNATION_MAX:
            raise UsageError(
                f"an incarnation must be 0 to {INCARNATION_MAX}, got {self.incarnation}: "
                "discard the node's state to start over"
            )
        for name, address in (("control", self.control), ("bulk", self.bulk)):
            host, _, port = address.rpartition(":")
            if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
                raise UsageError(f"{name} of {self.node_id} must be host:port, got {address!r}")


@dataclass(frozen=True)
class ClusterMap:
    """The storage nodes of one epoch, sorted by index, and what all their clients go by.

    ``tier_id`` is random, made when the tier is: epochs of two tiers have nothing to do with each
    other, even where the second has come to the addresses of the first. ``block_tokens`` is how
    many tokens a full block of this tier has.
    """

    epoch: int
    nodes: tuple[NodeInfo, ...]
    block_tokens: int = BLOCK_TOKENS_DEFAULT
    tier_id: str = ""

    def __post_init__(self) -> None:
        if self.epoch < 0:
            raise UsageError(f"a map's epoch must be at least 0, got {self.epoch}")
        check_block_tokens(self.block_tokens)
        indexes = [node.index for node in self.nodes]
        if indexes != sorted(set(indexes)):
            raise UsageError(f"nodes of a map must be sorted by distinct indexes, got {indexes}")
        if len(self._by_id) != len(self.nodes):
            raise UsageError("two nodes of a map have the same node_id: give each its own folder")

    @classmethod
    def of(
        cls,
        epoch: int,
        nodes: Iterable[NodeInfo],
        block_tokens: int = BLOCK_TOKENS_DEFAULT,
        tier_id: str = "",
    ) -> "ClusterMap":
        """A map of nodes in any order."""
        return cls(epoch, tuple(sorted(nodes, key=lambda node: node.index)), block_tokens, tier_id)

    def replaces(self, held: "ClusterMap") -> bool:
        """Whether whoever goes by ``held`` is to go by this one: newer, and of the same tier.

        A map without a ``tier_id`` is of none yet.
        """
        return held.tier_id in ("", self.tier_id) and self.epoch > held.epoch

    @cached_property
    def _by_index(self) -> dict[int, NodeInfo]:
        return {node.index: node for node in self.nodes}

    @cached_property
    def _by_id(self) -> dict[str, NodeInfo]:
        return {node.node_id: node for node in self.nodes}

    @cached_property
    def indexes(self) -> npt.NDArray[np.uint16]:
        """The nodes' indexes, in order."""
        return np.array([node.index for node in self.nodes], np.uint16)

    @cached_property
    def name_hashes(self) -> npt.NDArray[np.uint64]:
        """XXH3-64 of every node_id: placement must not move when a node restarts elsewhere."""
        hashes = [xxh3_64_intdigest(node.node_id.encode()) for node in self.nodes]
        return np.array(hashes, np.uint64)

    def by_index(self, index: int) -> NodeInfo | None:
        """The node with that index, or None where the map has none."""
        return self._by_index.get(index)

    def by_id(self, node_id: str) -> NodeInfo | None:
        """The node with that name, or None where the map has none."""
        return self._by_id.get(node_id)

    def ring_neighbours(
        self, index: int, skipped: frozenset[int] = frozenset(), reach: int = RING_REACH
    ) -> tuple[int, ...]:
        """The nodes beside ``index`` on the ring of indexes, sorted, itself not among them.

        Walks each way until it has met ``reach`` nodes that are not ``skipped``; the skipped
        ones on the way are neighbours too.
        """
        if index not in self._by_index:
            raise UsageError(f"node {index} is not in the map of epoch {self.epoch}")
        ring = [node.index for node in self.nodes]
        start = ring.index(index)
        after = ring[start + 1 :] + ring[:start]
        met = {*_walk(after, skipped, reach), *_walk(after[::-1], skipped, reach)}
        return tuple(sorted(met))


def _walk(ring: list[int], skipped: frozenset[int], reach: int) -> list[int]:
    met = []
    for index in ring:
        if reach == 0:
            break
        met.append(index)
        reach -= index not in skipped
    return met
