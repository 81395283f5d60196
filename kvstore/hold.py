"""A hold: cells that a node has promised to keep, for whom, under which handle, until when.

One with ``replicas`` has a copy on another node, its ``partner``. That carries it as a hold of its
own, whose first partner is the node that had it before, and names it after the same *granter*: the
node that a client asked. A granter numbers its *grants* in order, so that everybody can tell one of
before a release from one of after it, however late either is heard of.

It is of an epoch of its tenant, that of its blocks (``kvstore.tenants``): the tenant's erasure ends
it, whenever this node hears of that, and leaves those of the new epoch alone.

Does not cover: all holds of a node together (``kvstore.holds``).
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from kvstore.calls import HANDLE_BYTES_MAX, HOLD_TTL_MS_MAX, CarryRequest, HoldRequest
from kvstore.changes import as_words
from kvstore.errors import UsageError
from kvstore.key import KEY_BYTES, Keys
from kvstore.table import Cells
from kvstore.tenants import EPOCH_MAX, check_tenant

Sizes = npt.NDArray[np.uint64]
Rows = npt.NDArray[np.bool_]
Name = tuple[bytes, str, str]


@dataclass(frozen=True, slots=True, eq=False)
class Hold:
    """Different cells, a row each, until ``until_s`` (monotonic), at most ``ttl_ms`` from now.

    Nodes are named by their ids. ``grant`` is the granter's last one of this name; those up to
    ``released`` are over.
    """

    tenant: bytes
    handle: str
    keys: Keys
    cells: Cells
    sizes_bytes: Sizes
    ttl_ms: int
    until_s: float
    granter: str
    grant: int
    released: int = 0
    replicas: int = 1
    partner: str = ""
    tenant_epoch: int = 0

    def __len__(self) -> int:
        return len(self.cells)

    @property
    def name(self) -> Name:
        """No two holds of a node have the same."""
        return self.tenant, self.handle, self.granter

    def select(self, rows: Rows) -> "Hold":
        """The same promise for some of the cells."""
        return replace(
            self, keys=self.keys[rows], cells=self.cells[rows], sizes_bytes=self.sizes_bytes[rows]
        )

    def without(self, other: "Hold") -> "Hold":
        """The cells that the other one does not cover."""
        return self.select(~self.within([other]))

    def within(self, others: Iterable["Hold"]) -> Rows:
        """Which rows any of the others has."""
        theirs = {name for other in others for name in other.names()}
        return np.array([name in theirs for name in self.names()], np.bool_)

    def joined(self, other: "Hold") -> "Hold":
        """The cells of both, until the later end, on as many nodes as the one that wants more.

        If the other one is of a later epoch, or was granted after a release, this one is over.
        """
        if other.tenant_epoch > self.tenant_epoch or other.released >= self.grant:
            return other
        more = other.without(self)
        later = max((self, other), key=lambda hold: hold.until_s)
        return replace(
            self,
            ttl_ms=later.ttl_ms,
            until_s=later.until_s,
            grant=max(self.grant, other.grant),
            released=max(self.released, other.released),
            replicas=max(self.replicas, other.replicas),
            keys=np.concatenate([self.keys, more.keys]),
            cells=np.concatenate([self.cells, more.cells]),
            sizes_bytes=np.concatenate([self.sizes_bytes, more.sizes_bytes]),
        )

    def on(self, keys: Keys) -> Rows:
        """Which rows are of one of these blocks."""
        rows: Rows = np.isin(_words(self.keys), _words(keys))
        wanted = {key.tobytes() for key in keys}
        for row in np.flatnonzero(rows).tolist():
            rows[row] = self.keys[row].tobytes() in wanted
        return rows

    def names(self) -> list[bytes]:
        """Key and cell of each row."""
        packed = np.empty((len(self), KEY_BYTES + 1), np.uint8)
        packed[:, :KEY_BYTES], packed[:, KEY_BYTES] = self.keys, self.cells
        return [row.tobytes() for row in packed]


def distinct_bytes(holds: Iterable[Hold]) -> int:
    """What the cells of some holds take, each counted once."""
    every = list(holds)
    if not every:
        return 0
    words = [_words(hold.keys) for hold in every]
    cells = np.concatenate([hold.cells for hold in every]).astype(np.uint64)
    # Equal numbers of different cells are too rare to matter for a sum.
    names = np.concatenate(words) ^ cells * np.uint64(0x9E3779B97F4A7C15)
    sizes_bytes = np.concatenate([hold.sizes_bytes for hold in every])
    _, first = np.unique(names, return_index=True)
    return int(sizes_bytes[first].sum())


def _words(keys: Keys) -> npt.NDArray[np.uint64]:
    """The first word of each key."""
    words: npt.NDArray[np.uint64] = as_words(keys)[:, 0]
    return words


def check_promise(request: HoldRequest | CarryRequest) -> None:
    """Raises ``UsageError`` for a promise that nobody could give."""
    check_tenant(request.tenant)
    size_bytes = len(request.handle.encode())
    if not 0 < size_bytes <= HANDLE_BYTES_MAX:
        raise UsageError(f"a handle has 1 to {HANDLE_BYTES_MAX} bytes, not {size_bytes}")
    if not 0 < request.ttl_ms <= HOLD_TTL_MS_MAX:
        raise UsageError(f"a hold lasts 1 to {HOLD_TTL_MS_MAX} ms, not {request.ttl_ms}")
    if not 0 <= request.tenant_epoch <= EPOCH_MAX:
        raise UsageError(f"a tenant's epoch is 0 to {EPOCH_MAX}, not {request.tenant_epoch}")
