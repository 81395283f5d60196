"""Write-behind: cells go from the host tier down to the NVMe tier before they are missed there.

    about to be evicted   the next victims, when the arena has less room than ``LOW_WATER_SHARE``
    used again            by a second put, a lease or a touch: what one prompt alone uses stays out

Nobody waits for it: a cell is pinned while the disk reads it, some are under way at a time, and
what is evicted before its turn came was not worth it. Expired cells are not written. With a daily
allowance nothing is written once it is spent; days are those of UTC, and a restart begins anew.

Does not cover: the way back (``promotion``), who leaves the NVMe tier for it.
"""

import logging
from collections.abc import Iterable

import numpy as np

from kvstore.clock import Clock
from kvstore.table import Slots, SlotState
from kvstore.tiers.host import HostTier
from kvstore.tiers.nvme.spill import Declined, Done, Phase, Result, Spill
from kvstore.tiers.nvme.tier import NvmeTier

log = logging.getLogger(__name__)

LOW_WATER_SHARE = 0.25
"""Of the arena: with less room than that, the cells that would make it are written first."""
UNDER_WAY_SHARE = 0.125
UNDER_WAY_BYTES_MAX = 64 << 20
"""So much is pinned for the disk at most, the smaller of the two."""
VICTIMS_SEEN = 256
WANTED_MAX = 8192
"""Cells that were used again and wait; what comes on top has to be used once more."""
_DAY_MS = 24 * 3600 * 1000


class WriteBehind:
    """Cells that wait for the disk, and those that it is reading."""

    def __init__(self, host: HostTier, nvme: NvmeTier, clock: Clock, daily_bytes: int = 0) -> None:
        self._host = host
        self._nvme = nvme
        self._clock = clock
        self._daily_bytes = daily_bytes
        self._wanted: dict[int, int] = {}
        """Slots with the generation that was meant, first used first."""
        self._under_way: dict[int, int] = {}
        """Slots by ticket."""
        self._under_way_bytes = 0
        self._given_up: dict[int, int] = {}
        """Slots, with the generation, of cells that the disk will never take."""
        self._day = 0
        self._spent_bytes = 0

    def want(self, slots: Slots) -> None:
        """These cells were used again, and are not on the disk."""
        if self._nvme.phase is not Phase.OPEN:
            return
        room = WANTED_MAX - len(self._wanted)
        generations = self._host.table.slots["generation"]
        for slot in slots[: max(0, room)].tolist():
            self._wanted[slot] = int(generations[slot])

    def step(self) -> None:
        """Offer what is due, as much as may be under way."""
        if self._nvme.phase is not Phase.OPEN:
            return
        stamp = self._nvme.next_stamp()
        for slot in self._due():
            if not self._is_worth(slot):
                self._wanted.pop(slot, None)
                continue
            if not self._has_allowance(slot):
                return
            answer = self._nvme.store(self._spill(slot, stamp))
            if answer in (Declined.CLOSED, Declined.NO_ROOM):
                return
            self._wanted.pop(slot, None)
            if answer is Declined.TOO_LARGE:
                self._give_up(slot)
            if not isinstance(answer, Declined):
                self._begin(answer, slot)

    def take(self, done: Done) -> bool:
        """Let go of a cell whose ticket is done; ``False`` if it is somebody else's ticket."""
        slot = self._under_way.pop(done.ticket, None)
        if slot is None:
            return False
        self._host.unpin([slot])
        self._under_way_bytes -= self._size_bytes(slot)
        if done.result is Result.DAMAGED:
            log.warning("the cell in slot %d is damaged: it is not spilled", slot)
            self._give_up(slot)
        return True

    def _due(self) -> Iterable[int]:
        """Slots that are not on the disk: who is about to go, then what was used again."""
        wanted = list(self._wanted)[:VICTIMS_SEEN]
        slots = np.array(list(dict.fromkeys([*self._coming_victims(), *wanted])), np.uint32)
        records = self._host.table.slots
        gone = records["state"][slots] != SlotState.COMMITTED
        for slot in slots[gone].tolist():
            self._wanted.pop(slot, None)
        slots = slots[~gone]
        keys = self._host.table.keys_of(slots)
        below = self._nvme.find(keys, records["cell"][slots]).held
        for slot in slots[below].tolist():
            self._wanted.pop(slot, None)
        due: list[int] = slots[~below].tolist()
        return due

    def _coming_victims(self) -> list[int]:
        """Who has to leave until the arena has room again, first victim first."""
        lacking = LOW_WATER_SHARE * self._host.stats.capacity_bytes - self._host.free_bytes
        victims = []
        for slot in self._host.next_victims(VICTIMS_SEEN) if lacking > 0 else ():
            victims.append(slot)
            lacking -= self._size_bytes(slot)
            if lacking <= 0:
                break
        return victims

    def _is_worth(self, slot: int) -> bool:
        """Whether it is still the cell that was meant, alive, and not under way."""
        generation = int(self._host.table.slots[slot]["generation"])
        if self._wanted.get(slot, generation) != generation:
            return False
        if self._given_up.get(slot) == generation or slot in self._under_way.values():
            return False
        return not self._host.table.expired(np.array([slot], np.uint32), self._clock.wall_ms())[0]

    def _give_up(self, slot: int) -> None:
        self._given_up[slot] = int(self._host.table.slots[slot]["generation"])

    def _has_allowance(self, slot: int) -> bool:
        """Whether one more may be pinned now, and written today."""
        size_bytes = self._size_bytes(slot)
        bound_bytes = min(UNDER_WAY_BYTES_MAX, UNDER_WAY_SHARE * self._host.stats.capacity_bytes)
        if self._under_way and self._under_way_bytes + size_bytes > bound_bytes:
            return False
        day = self._clock.wall_ms() // _DAY_MS
        if day != self._day:
            self._day, self._spent_bytes = day, 0
        return not self._daily_bytes or self._spent_bytes + size_bytes <= self._daily_bytes

    def _begin(self, ticket: int, slot: int) -> None:
        self._host.pin([slot])
        self._under_way[ticket] = slot
        self._under_way_bytes += self._size_bytes(slot)
        self._spent_bytes += self._size_bytes(slot)

    def _spill(self, slot: int, stamp: int) -> Spill:
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
            stamp=stamp,
            ttl_s=int(record["ttl_s"]),
            expires_ms=int(record["expires_ms"]),
            arena_offset=int(record["offset"]),
        )

    def _size_bytes(self, slot: int) -> int:
        return int(self._host.table.slots[slot]["size_bytes"])
