"""Promotion: cells of the NVMe tier come up into the host tier, for those who wait for them.

    begin ──> what is in the arena is pinned, what is on the disk only is asked for ──> end
                         reserved ──> read and verified by the disk process ──> committed, pinned

A call is promised no more than ``PROMISED_SHARE`` of the arena together with all others, and so
much is under way at a time; calls that want the same cell share its load. What the arena has no
room for, what expires, turns out damaged or can't be read does not come: nobody is told why, the
reader's prefix ends before it.

Does not cover: how long a call waits, its lease (``kvstore.node``).
"""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kvstore.key import Keys, as_keys
from kvstore.table import Cells, Found
from kvstore.tiers.host import HostTier
from kvstore.tiers.nvme.record import stored_bytes_of
from kvstore.tiers.nvme.spill import Declined, Done, Phase, Result
from kvstore.tiers.nvme.tier import NvmeTier
from kvstore.tiers.tier import Commitment, NewCell, Refusal

PROMISED_SHARE = 0.5
UNDER_WAY_SHARE = 0.25
UNDER_WAY_BYTES_MAX = 64 << 20

Name = tuple[bytes, int]
"""Key and cell."""


@dataclass(slots=True, eq=False)
class Promotion:
    """What one call has been promised. ``loaded`` says which of its cells came from the disk."""

    loaded: npt.NDArray[np.bool_]
    waiting: dict[Name, int] = field(default_factory=dict)
    """Rows of the cells that have not come, in order."""
    asked: set[Name] = field(default_factory=set)
    pinned: list[int] = field(default_factory=list)
    promised_bytes: int = 0

    @property
    def is_done(self) -> bool:
        """Whether nothing more will come."""
        return not self.waiting


@dataclass(frozen=True, slots=True)
class _Load:
    name: Name
    slot: int
    header_digest: int
    size_bytes: int
    waiters: list[Promotion]


class Promotions:
    """The loads that are under way, and who waits for them."""

    def __init__(self, host: HostTier, nvme: NvmeTier) -> None:
        self._host = host
        self._nvme = nvme
        self._loads: dict[int, _Load] = {}
        self._tickets: dict[Name, int] = {}
        self._active: list[Promotion] = []
        self._under_way_bytes = 0

    def begin(self, keys: Keys, cells: Cells) -> Promotion:
        """Keep what is in the arena there, and ask for what is on the disk only."""
        promotion = Promotion(np.zeros(len(keys), np.bool_))
        if self._nvme.phase is not Phase.OPEN:
            return promotion
        found = self._host.find(keys, cells)
        missing = np.flatnonzero(~found.held)
        below = self._nvme.find(keys[missing], cells[missing])
        if not below.held.any():
            return promotion
        on_disk = np.zeros(len(keys), np.bool_)
        on_disk[missing] = below.held
        lengths = found.lengths.copy()
        lengths[missing] = below.lengths
        self._promise(promotion, keys, cells, found, on_disk, lengths)
        self._active.append(promotion)
        self.advance()
        return promotion

    def end(self, promotion: Promotion) -> None:
        """The call is over: nothing is kept for it any more."""
        if promotion in self._active:
            self._active.remove(promotion)
            self._host.unpin(promotion.pinned)
            promotion.pinned.clear()

    def take(self, done: Done) -> None:
        """A load is done: publish the cell if it came whole."""
        load = self._loads.pop(done.ticket, None)
        if load is None:
            return
        del self._tickets[load.name]
        self._under_way_bytes -= load.size_bytes
        came = done.result is Result.LOADED
        if came:
            came = self._host.commit(load.slot, load.header_digest) is Commitment.STORED
        else:
            self._host.abort(load.slot)
        for promotion in load.waiters:
            if promotion in self._active and load.name in promotion.waiting:
                row = promotion.waiting.pop(load.name)
                if came:
                    self._keep(promotion, load.slot)
                    promotion.loaded[row] = True

    def advance(self) -> None:
        """Ask for more, while there is room under way: first come, first served."""
        for promotion in self._active:
            for name in [n for n in promotion.waiting if n not in promotion.asked]:
                if not self._ask(promotion, name):
                    return

    def _promise(
        self,
        promotion: Promotion,
        keys: Keys,
        cells: Cells,
        found: Found,
        on_disk: npt.NDArray[np.bool_],
        lengths: npt.NDArray[np.uint32],
    ) -> None:
        """The leading cells that there is room for, all together."""
        room = PROMISED_SHARE * self._host.stats.capacity_bytes
        room -= sum(other.promised_bytes for other in self._active)
        for row in np.flatnonzero(found.held | on_disk).tolist():
            size_bytes = stored_bytes_of(int(lengths[row]))
            if promotion.promised_bytes + size_bytes > room:
                return
            promotion.promised_bytes += size_bytes
            if found.held[row]:
                self._keep(promotion, int(found.slots[row]))
            else:
                promotion.waiting[keys[row].tobytes(), int(cells[row])] = row

    def _ask(self, promotion: Promotion, name: Name) -> bool:
        """Begin a load, or share one; ``False`` if too much is under way just now."""
        if name in self._tickets:
            self._loads[self._tickets[name]].waiters.append(promotion)
            promotion.asked.add(name)
            return True
        key, cell = _packed(name)
        here = self._host.find(key, cell)
        if here.held[0]:
            del promotion.waiting[name]
            self._keep(promotion, int(here.slots[0]))
            return True
        below = self._nvme.find(key, cell)
        size_bytes = stored_bytes_of(int(below.lengths[0]))
        if self._loads and self._under_way_bytes + size_bytes > self._bound_bytes():
            return False
        # One that has expired, and that somebody still reads, is in the table all the same.
        is_free = not (self._host.table.find(key, cell).held[0] or self._host.is_writing(*name))
        if not (is_free and below.held[0] and self._load(promotion, name, below, size_bytes)):
            del promotion.waiting[name]
        return True

    def _load(self, promotion: Promotion, name: Name, below: Found, size_bytes: int) -> bool:
        """Begin a load; ``False`` if the arena has no room for it."""
        number, sequence = int(below.slots[0]), int(below.generations[0])
        record = self._nvme.record(number)
        new = NewCell(
            *name, tokens=int(record["tokens"]), length=int(record["length"]),
            depth=int(record["depth"]), span=int(record["span"]), ttl_s=int(record["ttl_s"]),
        )  # fmt: skip
        slot = self._host.reserve(new, self._host.next_stamp())
        if isinstance(slot, Refusal):
            return False
        slots = self._host.table.slots
        if slots["expires_ms"][slot]:  # what was promised to live longer does so up there, too
            slots["expires_ms"][slot] = max(slots["expires_ms"][slot], record["expires_ms"])
        ticket = self._nvme.load(number, sequence, int(self._host.table.slots[slot]["offset"]))
        if isinstance(ticket, Declined):
            self._host.abort(slot)
            return False
        digest = int(below.header_digests[0])
        self._loads[ticket] = _Load(name, slot, digest, size_bytes, [promotion])
        self._tickets[name] = ticket
        self._under_way_bytes += size_bytes
        promotion.asked.add(name)
        return True

    def _keep(self, promotion: Promotion, slot: int) -> None:
        self._host.pin([slot])
        promotion.pinned.append(slot)

    def _bound_bytes(self) -> float:
        return min(UNDER_WAY_BYTES_MAX, UNDER_WAY_SHARE * self._host.stats.capacity_bytes)


def _packed(name: Name) -> tuple[Keys, Cells]:
    """One cell as tiers are asked for many."""
    return as_keys(name[0]), np.array([name[1]], np.uint8)
