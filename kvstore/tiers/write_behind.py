"""Write-behind: cells go from the host tier down to the NVMe tier before they are missed there.

    next to leave    the oldest, when less than ``LOW_WATER_SHARE`` of the arena can be spared
    used again       by a second request: its put, lease or touch

Nobody waits for it, no put either: a cell is pinned while the disk reads it, and some are under way
at a time. What is next to leave and on the disk is expendable, so it leaves the arena before all
others. Where the disk can't keep up, puts evict what is not on it: it is dropped, and counted.

*No hole*: a prompt is written head first, what is dropped is the tail of the oldest, and a cell has
the same stamp in both tiers; so what the node keeps of a prompt is its beginning, however little
the disk had time for.

Expired cells are not written. With a daily allowance nothing is written once it is spent; days are
those of UTC, and a restart begins anew.

Does not cover: the way back (``promotion``), who leaves the NVMe tier for it.
"""

import logging
from collections import deque
from dataclasses import dataclass

import numpy as np

from kvstore.clock import Clock
from kvstore.table import Slots, SlotState
from kvstore.tiers.host import HostTier
from kvstore.tiers.nvme.spill import Declined, Done, Phase, Result, Spill
from kvstore.tiers.nvme.tier import NvmeTier

log = logging.getLogger(__name__)

LOW_WATER_SHARE = 0.25
"""Of the arena: with less than that to spare, the oldest cells are written."""
LOOK_S = 0.05
"""How often it is looked who is next to leave."""
OLDEST_SEEN = 4096
UNDER_WAY_SHARE = 0.125
UNDER_WAY_BYTES_MAX = 64 << 20
"""So much is pinned for the disk at most, the smaller of the two."""
WANTED_SEEN = 256
WANTED_MAX = 8192
"""Cells that were used again and wait; what comes on top has to be used once more."""
_DAY_MS = 24 * 3600 * 1000


@dataclass(frozen=True, slots=True)
class _Due:
    """A cell that is to be written. One that is next to leave is not, once it has another stamp."""

    slot: int
    generation: int
    size_bytes: int
    stamp: int
    is_next: bool


class WriteBehind:
    """Cells that wait for the disk, and those that it is reading."""

    def __init__(self, host: HostTier, nvme: NvmeTier, clock: Clock, daily_bytes: int = 0) -> None:
        self._host = host
        self._nvme = nvme
        self._clock = clock
        self._daily_bytes = daily_bytes
        self._wanted: dict[int, int] = {}
        """Slots with the generation that was meant, first used first."""
        self._next: deque[_Due] = deque()
        """What is next to leave, and waits."""
        self._next_bytes = 0
        """Of those that are next to leave, waiting or under way."""
        self._looked_s = clock.monotonic_s() - LOOK_S
        self._epoch = nvme.epoch
        self._under_way: dict[int, _Due] = {}
        """By ticket."""
        self._under_way_bytes = 0
        self._given_up: dict[int, int] = {}
        """Slots, with the generation, of cells that the disk will never take."""
        self._day = 0
        self._spent_bytes = 0

    def holds(self, slot: int) -> bool:
        """Whether the cell of a held slot is on the disk, and not in doubt there."""
        one = np.array([slot], np.uint32)
        table = self._host.table
        return bool(self._nvme.holds(table.keys_of(one), table.slots["cell"][one])[0])

    def want(self, slots: Slots) -> None:
        """These cells were used again, and are not on the disk, as far as that is known by now."""
        if self._nvme.phase not in (Phase.OPENING, Phase.OPEN):
            return
        room = WANTED_MAX - len(self._wanted)
        generations = self._host.table.slots["generation"]
        for slot in slots[: max(0, room)].tolist():
            self._wanted[slot] = int(generations[slot])

    def step(self) -> None:
        """Look ahead, and offer what is due, as much as may be under way."""
        if self._nvme.phase is not Phase.OPEN:
            return
        if self._epoch != self._nvme.epoch:
            self._epoch = self._nvme.epoch
            self._host.go_on_after(self._nvme.next_stamp())
        self._look_ahead()
        while self._next:
            if not self._offer(self._next[0]):
                return
            self._next.popleft()
        for due in self._used_again():
            if not self._offer(due):
                return
            self._wanted.pop(due.slot, None)

    def take(self, done: Done) -> bool:
        """Let go of a cell whose ticket is done; ``False`` if it is somebody else's ticket."""
        due = self._under_way.pop(done.ticket, None)
        if due is None:
            return False
        self._host.unpin([due.slot])
        self._under_way_bytes -= due.size_bytes
        if done.result is Result.NO_ROOM:  # nothing was written
            self._spent_bytes = max(0, self._spent_bytes - due.size_bytes)
        if done.result is Result.DAMAGED:
            log.warning("the cell in slot %d is damaged: it is not spilled", due.slot)
            self._given_up[due.slot] = due.generation
        self._end(due, is_stored=done.result is Result.STORED)
        return True

    def _look_ahead(self) -> None:
        """Who is next to leave: what is on the disk is expendable, the others are to be written."""
        now_s = self._clock.monotonic_s()
        if now_s - self._looked_s < LOOK_S:
            return
        self._looked_s = now_s
        host, table = self._host, self._host.table
        lacking = LOW_WATER_SHARE * host.stats.capacity_bytes - host.spare_bytes - self._next_bytes
        if lacking <= 0:
            return
        waiting = {due.slot for due in self._next}
        seen = host.next_to_leave(OLDEST_SEEN)
        slots = seen[~table.expired(seen, self._clock.wall_ms())]
        slots = np.array([s for s in slots.tolist() if s not in waiting], np.uint32)
        sizes = table.slots["size_bytes"][slots].astype(np.int64)
        slots = slots[np.cumsum(sizes) - sizes < lacking]
        below = self._nvme.find(table.keys_of(slots), table.slots["cell"][slots])
        host.expend(slots[below.held])
        for slot in slots[~below.held].tolist():
            due = self._due(slot, is_next=True)
            self._next_bytes += due.size_bytes
            self._next.append(due)

    def _used_again(self) -> list[_Due]:
        """Some of those that were used again, and are not on the disk yet."""
        if not self._wanted:
            return []
        seen = np.array(list(self._wanted)[:WANTED_SEEN], np.uint32)
        records = self._host.table.slots
        meant = np.array([self._wanted[slot] for slot in seen.tolist()], np.uint64)
        is_due = records["state"][seen] == SlotState.COMMITTED
        is_due &= records["generation"][seen] == meant
        held = seen[is_due]
        below = self._nvme.find(self._host.table.keys_of(held), records["cell"][held])
        is_due[is_due] = ~below.held
        for slot in seen[~is_due].tolist():
            del self._wanted[slot]
        return [self._due(slot, is_next=False) for slot in seen[is_due].tolist()]

    def _offer(self, due: _Due) -> bool:
        """Let the disk have a cell; ``False`` if that has to wait."""
        if not self._is_worth(due):
            self._end(due, is_stored=False)
            return True
        if not self._has_allowance(due.size_bytes):
            return False
        answer = self._nvme.store(self._spill(due.slot))
        if answer in (Declined.CLOSED, Declined.NO_ROOM):
            return False
        if isinstance(answer, Declined):
            if answer is Declined.TOO_LARGE:
                self._given_up[due.slot] = due.generation
            self._end(due, is_stored=answer is Declined.HELD)
            return True
        self._host.pin([due.slot])
        self._under_way[answer] = due
        self._under_way_bytes += due.size_bytes
        self._spent_bytes += due.size_bytes
        return True

    def _end(self, due: _Due, is_stored: bool) -> None:
        """A cell waits no more, and is not under way."""
        if due.is_next:
            self._next_bytes -= due.size_bytes
            if is_stored and self._is_current(due):
                self._host.expend(np.array([due.slot], np.uint32))

    def _is_worth(self, due: _Due) -> bool:
        """Whether it is still the cell that was meant, alive, and can be written."""
        slot = np.array([due.slot], np.uint32)
        return (
            self._is_current(due)
            and self._given_up.get(due.slot) != due.generation
            and not self._host.table.expired(slot, self._clock.wall_ms())[0]
        )

    def _is_current(self, due: _Due) -> bool:
        table = self._host.table
        if not table.is_current(due.slot, due.generation, SlotState.COMMITTED):
            return False
        return not due.is_next or int(table.slots[due.slot]["stamp"]) == due.stamp

    def _has_allowance(self, size_bytes: int) -> bool:
        """Whether one more may be pinned now, and written today."""
        bound_bytes = min(UNDER_WAY_BYTES_MAX, UNDER_WAY_SHARE * self._host.stats.capacity_bytes)
        if self._under_way and self._under_way_bytes + size_bytes > bound_bytes:
            return False
        day = self._clock.wall_ms() // _DAY_MS
        if day != self._day:
            self._day, self._spent_bytes = day, 0
        return not self._daily_bytes or self._spent_bytes + size_bytes <= self._daily_bytes

    def _due(self, slot: int, is_next: bool) -> _Due:
        record = self._host.table.slots[slot]
        return _Due(
            slot, int(record["generation"]), int(record["size_bytes"]), int(record["stamp"]),
            is_next,
        )  # fmt: skip

    def _spill(self, slot: int) -> Spill:
        table = self._host.table
        record = table.slots[slot]
        entry = table.entries[int(record["entry"])]
        return Spill(
            key=table.key_of(slot),
            cell=int(record["cell"]),
            tokens=int(record["tokens"]),
            length=int(record["length"]),
            depth=int(record["depth"]),
            span=int(record["span"]),
            header_digest=int(entry["header_digest"]),
            stamp=int(record["stamp"]),
            ttl_s=int(record["ttl_s"]),
            expires_ms=int(record["expires_ms"]),
            arena_offset=int(record["offset"]),
        )
