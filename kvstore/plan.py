"""What the client answers with: plans, and what became of them.

A ``Plan`` is packed, because a prompt of 100k tokens has thousands of blocks and looking it up
must cost little more than hashing it. Its rows are blocks in order: full blocks, then perhaps a
tail.

    row      0        1        2        3 (tail)
    tokens   [0, B)   [B, 2B)  [2B,3B)  [3B, stops[3])
    nodes    [n, cells of the mask]: index of the node to read each cell from, or OWN_NODE

A reader that has the first tokens itself takes the plan ``behind`` them: its row 0 is then block
``first`` of the chain.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from kvstore.cell import Cell
from kvstore.key import Keys
from kvstore.namespace import Namespace

OWN_NODE = -1
"""Read from the arena that this process has mapped."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The longest warm prefix of a prompt, and where its blocks were a moment ago.

    ``tokens`` is how many tokens it saves, at most one fewer than the prompt has. Nothing is
    pinned: a later read may deliver less. The rows begin with block ``first``; ``tokens`` counts
    from the first token of the prompt all the same.
    """

    namespace: Namespace
    mask: int
    tokens: int
    keys: Keys
    stops: npt.NDArray[np.int64]
    spans: npt.NDArray[np.uint64]
    nodes: npt.NDArray[np.int32]
    first: int = 0

    @property
    def blocks(self) -> int:
        """How many blocks (a tail is one) are to be read."""
        return len(self.keys)

    @property
    def cells(self) -> tuple[Cell, ...]:
        """The cells that are read of every block, one per column of the packed arrays."""
        return self.namespace.grid.masked(self.mask)

    def start(self, row: int) -> int:
        """First token of the block in ``row``."""
        return (self.first + row) * self.namespace.grid.block_tokens

    def behind(self, start: int) -> "Plan":
        """What of it a reader needs that has the first ``start`` tokens itself.

        Blocks wholly before ``start`` are left out; the block that contains it stays, as a whole.
        """
        block_tokens = self.namespace.grid.block_tokens
        cut = self.blocks if start >= self.tokens else max(0, start // block_tokens - self.first)
        return replace(
            self,
            keys=self.keys[cut:],
            stops=self.stops[cut:],
            spans=self.spans[cut:],
            nodes=self.nodes[cut:],
            first=self.first + cut,
        )


@dataclass(frozen=True, slots=True)
class Fetched:
    """What a read delivered: ``tokens`` tokens from ``start`` on are in the rows and verified.

    Rows before ``start`` were not written: they are what the reader has itself, less the part of a
    block that had to be loaded as a whole. ``by_source`` splits ``tokens`` into those of blocks
    that had to be read from a node's disk (``nvme``), and the rest into ``local`` (own node) and
    ``remote`` ones; ``failures`` counts the cells that were planned and did not come, by
    reason. Rows from ``stop`` to the end of the plan are undefined.
    """

    tokens: int
    by_source: Mapping[str, int]
    failures: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    start: int = 0

    @property
    def stop(self) -> int:
        """How many first tokens of the prompt the reader has now."""
        return self.start + self.tokens


@dataclass(frozen=True, slots=True)
class Stored:
    """What became of the blocks of a put; a block is as well off as its worst cell.

    ``reasons`` says, for cells that were refused, lost or failed, why and how often.
    """

    stored: int = 0
    present: int = 0
    busy: int = 0
    refused: int = 0
    failed: int = 0
    reasons: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def blocks(self) -> int:
        """All blocks of the put."""
        return self.stored + self.present + self.busy + self.refused + self.failed

    @property
    def complete(self) -> bool:
        """Whether every block is in the tier now."""
        return self.stored + self.present == self.blocks


def merged(parts: list[Stored]) -> Stored:
    """The sum of several puts."""
    reasons: Counter[str] = Counter()
    for part in parts:
        reasons.update(part.reasons)
    return Stored(
        stored=sum(part.stored for part in parts),
        present=sum(part.present for part in parts),
        busy=sum(part.busy for part in parts),
        refused=sum(part.refused for part in parts),
        failed=sum(part.failed for part in parts),
        reasons=MappingProxyType(dict(reasons)),
    )
