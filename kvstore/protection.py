"""Protection: of each cell that is promised, one copy that does not leave.

    on the disk         that copy: pinned in the NVMe tier, the one in the arena is ordinary
    in the arena only   that copy: pinned in the host tier, and wanted on the disk
    in doubt on the disk, which refused to read it
                        that copy if there is no other; else as if it were in the arena only, until
                        what is written again has taken its place

How many promises protect a copy is counted: packed, two bytes for each slot and each record. A
cell's expiry is moved behind the end of its promise, in both tiers; when the last one ends, the
cell lives no longer than a use just then would let it.

The disk's pins end with its ``epoch``, and a copy can turn out damaged: then everything is counted
anew by ``kvstore.holds``. Does not cover: who is promised what.
"""

import numpy as np
import numpy.typing as npt

from kvstore.key import Keys, as_keys
from kvstore.table import Cells, Found, Slots
from kvstore.tiers.behind import Behind
from kvstore.tiers.host import HostTier
from kvstore.tiers.life import later

Rows = npt.NDArray[np.bool_]


class Protection:
    """Which copies are protected, by how many promises."""

    def __init__(self, host: HostTier, behind: Behind) -> None:
        self._host = host
        self._behind = behind
        self._above = np.zeros(len(host.table.slots), np.uint16)
        self._below = np.zeros(behind.cells_max, np.uint16)
        self._epoch = behind.epoch
        self._is_lacking = False

    @property
    def nbytes(self) -> int:
        """Memory for bookkeeping."""
        return self._above.nbytes + self._below.nbytes

    def add(self, keys: Keys, cells: Cells, until_ms: int) -> Rows:
        """Promise different cells once more, until then; which of them are here."""
        self._follow()
        above = self._host.table.find_sealed(keys, cells)
        below = self._behind.locate(keys, cells)
        is_below = below.held & ~(above.held & self._behind.are_in_doubt(_slots(below)))
        numbers, slots = below.slots[is_below], above.slots[above.held & ~is_below]
        self._keep(numbers)
        self._below[numbers] += 1
        self._host.pin(slots[self._above[slots] == 0].tolist())
        self._above[slots] += 1
        self._prolong_above(above.slots[above.held], np.uint64(until_ms))
        self._prolong_below(numbers, np.uint64(until_ms))
        self._behind.want(slots)
        here: Rows = above.held | below.held
        return here

    def take(self, keys: Keys, cells: Cells, wall_ms: int) -> None:
        """Undo one ``add`` of these cells, wherever they are now."""
        self._follow()
        above = self._host.table.find_sealed(keys, cells)
        below = self._behind.locate(keys, cells)
        kept_below = below.held & (self._below[_slots(below)] > 0)
        kept_above = above.held & ~kept_below & (self._above[_slots(above)] > 0)
        numbers, slots = below.slots[kept_below], above.slots[kept_above]
        self._below[numbers] -= 1
        self._let_go(numbers[self._below[numbers] == 0])
        self._above[slots] -= 1
        self._host.unpin(slots[self._above[slots] == 0].tolist())
        # What has just arrived on the disk may be counted in both, for different promises.
        free = (kept_below | kept_above) & ~(below.held & (self._below[_slots(below)] > 0))
        free &= ~(above.held & (self._above[_slots(above)] > 0))
        self._curtail(above.slots[free & above.held], below.slots[free & below.held], wall_ms)

    def clear(self) -> None:
        """Protect nothing, before everything is added anew."""
        self._follow()
        self._host.unpin(np.flatnonzero(self._above).tolist())
        self._above[:] = 0
        self._let_go(np.flatnonzero(self._below).astype(np.uint32))
        self._below[:] = 0
        self._is_lacking = False

    def settle(self) -> bool:
        """Leave to the disk what has arrived there; ``False``: something has to be added anew."""
        self._follow()
        numbers = np.flatnonzero(self._below).astype(np.uint32)
        self._is_lacking |= not self._behind.are_held(numbers).all()
        self._recall(numbers[self._behind.are_in_doubt(numbers)])
        slots = np.flatnonzero(self._above).astype(np.uint32)
        if self._is_lacking or not len(slots):
            return not self._is_lacking
        records = self._host.table.slots
        below = self._behind.locate(self._host.table.keys_of(slots), records["cell"][slots])
        is_below = below.held & ~self._behind.are_in_doubt(_slots(below))
        arrived, numbers = slots[is_below], below.slots[is_below]
        self._keep(numbers)
        self._below[numbers] += self._above[arrived]
        self._prolong_below(numbers, records["expires_ms"][arrived])
        self._above[arrived] = 0
        self._host.unpin(arrived.tolist())
        self._behind.want(slots[~is_below])
        return True

    def lift(self, slot: int) -> int:
        """Let a cell of the arena go that somebody found damaged; how many promises it had."""
        count = int(self._above[slot])
        if count:
            self._above[slot] = 0
            self._host.unpin([slot])
        return count

    def lower(self, slot: int, count: int, is_whole: bool) -> None:
        """The end of ``lift``: it was whole, or is gone."""
        if count and is_whole:
            self._above[slot] = count
            self._host.pin([slot])
        self._is_lacking |= bool(count) and not is_whole

    def _recall(self, numbers: Slots) -> None:
        """Protect in the arena what is there again, and in doubt on the disk."""
        disk = self._behind.disk
        if disk is None or not len(numbers):
            return
        records = disk.records[numbers]
        above = self._host.table.find_sealed(
            as_keys(records["key"].tobytes()), records["cell"].copy()
        )
        slots, numbers = above.slots[above.held], numbers[above.held]
        self._host.pin(slots[self._above[slots] == 0].tolist())
        self._above[slots] += self._below[numbers]
        self._prolong_above(slots, disk.records["expires_ms"][numbers])
        self._below[numbers] = 0
        self._let_go(numbers)

    def _follow(self) -> None:
        """What the disk kept for us it does not any more if it went away meanwhile."""
        if self._epoch != self._behind.epoch:
            self._epoch = self._behind.epoch
            self._below[:] = 0
            self._is_lacking = True

    def _keep(self, numbers: Slots) -> None:
        disk = self._behind.disk
        if disk is not None:
            disk.keep(numbers[self._below[numbers] == 0])

    def _let_go(self, numbers: Slots) -> None:
        disk = self._behind.disk
        if disk is not None:
            disk.let_go(numbers)

    def _prolong_above(self, slots: Slots, until_ms: npt.NDArray[np.uint64] | np.uint64) -> None:
        """Let cells that expire live until then, at least."""
        expires = self._host.table.slots["expires_ms"]
        expires[slots] = later(expires[slots], until_ms)

    def _prolong_below(self, numbers: Slots, until_ms: npt.NDArray[np.uint64] | np.uint64) -> None:
        disk = self._behind.disk
        if disk is not None and len(numbers):
            disk.set_expiry(numbers, later(disk.records["expires_ms"][numbers], until_ms))

    def _curtail(self, slots: Slots, numbers: Slots, wall_ms: int) -> None:
        """Let cells live no longer than after a use just now."""
        records = self._host.table.slots
        records["expires_ms"][slots] = _after_use(records[slots], wall_ms)
        disk = self._behind.disk
        if disk is not None and len(numbers):
            disk.set_expiry(numbers, _after_use(disk.records[numbers], wall_ms))


def _slots(found: Found) -> Slots:
    """Where each is; slot 0 for those that are not held."""
    return np.where(found.held, found.slots, np.uint32(0))


def _after_use(records: npt.NDArray[np.void], wall_ms: int) -> npt.NDArray[np.uint64]:
    """Until when cells live at most, used now."""
    ttl_ms = records["ttl_s"].astype(np.uint64) * np.uint64(1000)
    expires_ms: npt.NDArray[np.uint64] = np.minimum(
        records["expires_ms"], np.uint64(wall_ms) + ttl_ms
    )
    return expires_ms
