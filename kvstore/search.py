"""Searching: the longest warm prefix of a prompt.

    own table, one gather ──> a hole at block h ──> directory, for what is missing from h on
                                                    (the own node may have it on its disk)
                                                    ──> nodes chosen, prefix cut at the next hole

A tail counts when every block before it is warm; of several the longest wins. The search reads
maps and soft state only: it neither pins nor touches, and what it finds may be gone a moment
later. Does not cover: how the directory is asked (``kvstore.locator``), reading
(``kvstore.reading``).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvstore.clock import Clock
from kvstore.holders import Located
from kvstore.key import Chain, Keys, as_keys
from kvstore.namespace import Namespace
from kvstore.plan import OWN_NODE, Plan
from kvstore.table import KeyTable

_NOWHERE = -2


Locate = Callable[[Keys, npt.NDArray[np.uint64]], Located]
"""Ask the directory about keys, with the names of the spans that they are in."""


@dataclass(frozen=True, slots=True)
class Candidates:
    """Every block that could be in the prefix: full blocks in order, then tails by boundary."""

    keys: Keys
    indexes: npt.NDArray[np.int64]
    stops: npt.NDArray[np.int64]
    full: int

    @classmethod
    def of(cls, chain: Chain) -> "Candidates":
        """The candidates of a prompt."""
        size = chain.block_tokens
        tails = as_keys(b"".join(chain.tails[boundary] for boundary in sorted(chain.tails)))
        boundaries = np.array(sorted(chain.tails), np.int64)
        full = np.arange(chain.blocks)
        return cls(
            keys=np.concatenate([chain.keys, tails]),
            indexes=np.concatenate([full, boundaries // size]),
            stops=np.concatenate([(full + 1) * size, boundaries]),
            full=chain.blocks,
        )


def longest_prefix(
    namespace: Namespace,
    chain: Chain,
    mask: int,
    own: KeyTable | None,
    clock: Clock,
    locate: Locate | None,
) -> Plan:
    """Plan the longest prefix that the own node and (through ``locate``) the others hold."""
    candidates = Candidates.of(chain)
    cells = np.array([cell.index for cell in namespace.grid.masked(mask)], np.uint8)
    held = _held_by_own(own, clock, candidates.keys, cells)
    nodes = np.where(held, OWN_NODE, _NOWHERE).astype(np.int32)
    hole = _leading(nodes[: candidates.full])
    asked = np.flatnonzero((candidates.indexes >= hole) & ~_whole(nodes))
    if locate is not None and len(asked):
        spans = chain.spans(candidates.indexes[asked])
        _assign(nodes, asked, cells, locate(candidates.keys[asked], spans))
    picked = _prefix_rows(candidates, nodes)
    stops = candidates.stops[picked]
    stop = int(stops[-1]) if len(stops) else 0
    return Plan(
        namespace=namespace,
        mask=mask,
        tokens=max(0, min(stop, chain.tokens - 1)),
        keys=candidates.keys[picked],
        stops=stops,
        spans=chain.spans(candidates.indexes[picked]),
        nodes=nodes[picked],
    )


def _held_by_own(
    own: KeyTable | None, clock: Clock, keys: Keys, cells: npt.NDArray[np.uint8]
) -> npt.NDArray[np.bool_]:
    """Which cells of which blocks the own node's arena has, ``[n, cells]``."""
    shape = len(keys), len(cells)
    if own is None or not len(keys):
        return np.zeros(shape, np.bool_)
    if len(cells) > 1:
        keys, cells = np.repeat(keys, len(cells), axis=0), np.tile(cells, len(keys))
    else:
        cells = np.full(len(keys), cells[0])
    return own.find_living(keys, cells, clock.wall_ms()).held.reshape(shape)


def _whole(nodes: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_]:
    """Which rows have every cell somewhere."""
    # By columns: there are few of them, and a reduction over short rows is slow.
    whole: npt.NDArray[np.bool_] = np.logical_and.reduce(nodes.T != _NOWHERE)
    return whole


def _leading(nodes: npt.NDArray[np.int32]) -> int:
    """How many leading rows have every cell somewhere."""
    whole = _whole(nodes)
    return len(whole) if bool(whole.all()) else int(whole.argmin())


def _assign(
    nodes: npt.NDArray[np.int32],
    asked: npt.NDArray[np.intp],
    cells: npt.NDArray[np.uint8],
    located: Located,
) -> None:
    """Fill holes, from the nodes that hold most of what is missing first: fewest nodes."""
    wanted = np.uint64(sum(1 << int(cell) for cell in cells))
    row_of = np.repeat(asked, located.counts)
    coverage: dict[int, int] = {}
    for node in np.unique(located.nodes).tolist():
        masks = located.masks[located.nodes == node] & wanted
        coverage[node] = int(np.bitwise_count(masks).sum())
    for node in sorted(coverage, key=lambda n: (-coverage[n], n)):
        here = located.nodes == node
        rows = row_of[here]
        has = (located.masks[here][:, None] >> cells.astype(np.uint64)) & np.uint64(1)
        holes = nodes[rows] == _NOWHERE
        nodes[rows] = np.where(holes & has.astype(np.bool_), node, nodes[rows])


def _prefix_rows(
    candidates: Candidates, nodes: npt.NDArray[np.int32]
) -> npt.NDArray[np.intp] | slice:
    """The leading whole blocks, and the longest whole tail that follows them."""
    warm = _leading(nodes[: candidates.full])
    tails = np.arange(candidates.full, len(candidates.keys))
    fits = (candidates.indexes[tails] == warm) & _whole(nodes[tails])
    following = tails[fits]
    if not len(following):
        return slice(warm)  # which copies nothing
    return np.concatenate([np.arange(warm), following[-1:]])
