"""How the conformance suite of tiers speaks to each of them, in a few words.

A tier joins with a class of these methods, and a line in ``ADAPTERS``. A cell's right bytes follow
from its name (``tests.worlds``), so ``holds`` says whether a cell is found *and* verifies.
"""

from pathlib import Path
from typing import Protocol

from kvstore.block import HEADER_BYTES
from kvstore.clock import ManualClock
from kvstore.fs import LinuxFileSystem
from kvstore.table import SlotState
from kvstore.tiers.host import HostTier
from kvstore.tiers.tier import CellChange, Commitment, NewCell, Refusal, Suspicion
from tests.worlds import PAGE, cells_of, packed, read_verified, write_cell

CELLS = 8
"""How many cells of ``new_cell`` every adapter's tier has room for."""


class TierAdapter(Protocol):
    """A tier in a folder, with a clock that is moved by hand."""

    def __init__(self, folder: Path) -> None: ...

    def begin(self, new: NewCell) -> bool:
        """Offer a cell and write it, but not yet to its end; whether it was not refused."""
        ...

    def finish(self, new: NewCell) -> None:
        """Make what was begun visible."""
        ...

    def give_up(self, new: NewCell) -> None:
        """The writer says that it will not finish."""
        ...

    def holds(self, new: NewCell) -> bool:
        """Whether the cell is delivered, every byte right; one that is damaged is not."""
        ...

    def evict(self, new: NewCell) -> None:
        """Drop a cell that is held."""
        ...

    def damage(self, new: NewCell, at: int) -> None:
        """Change a byte of a held cell where it lies; ``at`` counts from its header on."""
        ...

    def pass_time(self, seconds: float) -> None: ...

    def restart(self) -> None:
        """Killed with -9; a successor takes the folder over."""
        ...

    def accounted_bytes(self) -> tuple[int, int]:
        """What is held, and what is free or will be by itself."""
        ...

    def changes(self) -> list[CellChange]:
        """What came and went since the last call."""
        ...


class HostAdapter:
    """The host tier."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._clock = ManualClock()
        self._incarnation = 1
        self._begun: dict[bytes, tuple[int, int]] = {}
        self._fs = LinuxFileSystem()
        self._capacity = CELLS * 2 * PAGE
        self._tier = HostTier.create(self._fs, self._clock, folder, self._capacity, 2 * CELLS, 1)

    def begin(self, new: NewCell) -> bool:
        self._tier.find_for_writing(packed([new.key]), cells_of(new.cell))
        slot = self._tier.reserve(new, self._tier.next_stamp())
        if isinstance(slot, Refusal):
            assert slot is not Refusal.NONE, "refused without a reason"
            return False
        offset = int(self._tier.table.slots[slot]["offset"])
        self._begun[new.key] = slot, write_cell(self._tier.arena, offset, new)
        return True

    def finish(self, new: NewCell) -> None:
        assert self._tier.commit(*self._begun.pop(new.key)) is Commitment.STORED

    def give_up(self, new: NewCell) -> None:
        self._tier.abort(self._begun.pop(new.key)[0])

    def holds(self, new: NewCell) -> bool:
        found = self._tier.find(packed([new.key]), cells_of(new.cell))
        if not found.held[0]:
            return False
        place = int(found.offsets[0]), int(found.lengths[0])
        header = read_verified(self._tier.arena, *place, int(found.header_digests[0]))
        if header is None:
            suspicion = self._tier.discard(int(found.slots[0]), [new.length])
            assert suspicion is Suspicion.RIGHT, "damaged, and kept"
            return False
        return (header.key, header.cell) == (new.key, new.cell)

    def evict(self, new: NewCell) -> None:
        self._tier.evict(self._slot(new))

    def damage(self, new: NewCell, at: int) -> None:
        offset = int(self._tier.table.slots[self._slot(new)]["offset"])
        assert at < HEADER_BYTES + new.length
        self._tier.arena.view(offset + at, 1)[0] ^= 1

    def pass_time(self, seconds: float) -> None:
        self._clock.advance(seconds)
        self._tier.tick()

    def restart(self) -> None:
        self._incarnation += 1
        self._begun.clear()
        self._tier = HostTier.adopt(
            self._fs, self._clock, self._folder, self._capacity, self._incarnation
        )

    def accounted_bytes(self) -> tuple[int, int]:
        records = self._tier.table.slots
        resting = records["size_bytes"][records["state"] == SlotState.QUARANTINED]
        free_bytes = self._tier._space.free_bytes + int(resting.sum())
        return self._tier.stats.held_bytes, free_bytes

    def changes(self) -> list[CellChange]:
        return self._tier.drain_changes()

    def _slot(self, new: NewCell) -> int:
        found = self._tier.find(packed([new.key]), cells_of(new.cell))
        assert found.held[0]
        return int(found.slots[0])


ADAPTERS: dict[str, type[TierAdapter]] = {"host": HostAdapter}
