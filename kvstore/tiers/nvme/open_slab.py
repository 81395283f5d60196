"""An open slab: cells from a store to an eviction, while the disk answers.

A cell is found from the moment at which it is durable to the moment at which it is dropped. Its
slot is written again only after its freeing is durable, and after the last read of it ended, so a
store that has to make room waits; nobody waits for it. A delete is done when nothing on the disk
could bring the block back. What is damaged is dropped, so that the next store repairs it. What the
disk refuses to read is in doubt: kept, and a miss, until it can be read, or the next store has
taken its place.

Does not cover: the disk's coming and going (``tier``), where cells are and who leaves (``shelf``).
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from kvstore.clock import Clock
from kvstore.key import Keys, as_keys
from kvstore.table import Cells, Found
from kvstore.tiers.checks import Checks
from kvstore.tiers.nvme.deletions import Deletion, Deletions
from kvstore.tiers.nvme.disk_queue import Answer
from kvstore.tiers.nvme.doubts import Doubts
from kvstore.tiers.nvme.record import key_bytes, name_of, slot_bytes_of
from kvstore.tiers.nvme.requests import NO_EXTENT, Outcome, RequestKind, about_block
from kvstore.tiers.nvme.shelf import Shelf
from kvstore.tiers.nvme.spill import Declined, Done, NvmeStats, Result, Spill
from kvstore.tiers.nvme.traffic import Flight, Traffic
from kvstore.tiers.tier import CellChange

log = logging.getLogger(__name__)

WAITING_MAX = 256
"""Stores that wait for room."""
PAUSE_S = 5.0
"""How long nothing is stored after the disk refused a write: reads go on."""
EXPIRED_MAX = 256
TOUCHES_MAX = 1024
"""So many are dropped, or written down, at a time."""

_LOADED = {
    Outcome.DONE: Result.LOADED,
    Outcome.DAMAGED: Result.DAMAGED,
    Outcome.FAILED: Result.FAILED,
}
_STORED = {**_LOADED, Outcome.DONE: Result.STORED}


@dataclass(slots=True)
class _Waiting:
    ticket: int
    spill: Spill
    slot_bytes: int
    has_room_coming: bool = False


class OpenSlab:
    """Cells that are held, on their way in, and on their way out."""

    def __init__(
        self,
        shelf: Shelf,
        traffic: Traffic,
        deletions: Deletions,
        stats: NvmeStats,
        clock: Clock,
        sequence: int,
    ) -> None:
        self.shelf = shelf
        self.sequence = sequence
        """Of the last write or delete."""
        self._traffic = traffic
        self.checks = Checks(len(shelf.records), clock)
        self.doubts = Doubts(len(shelf.records), clock)
        self._deletions = deletions
        self._stats = stats
        self._clock = clock
        self._writing: dict[tuple[bytes, int], int | None] = {}
        """Cells on their way in, with the number of that in doubt whose place each is to take."""
        self._waiting: list[_Waiting] = []
        self._leaving: dict[int, bytes] = {}
        self._done: list[Done] = []
        self._changes: list[CellChange] = []
        self._pause_until_s = clock.monotonic_s()

    def find(self, keys: Keys, cells: Cells, wall_ms: int) -> Found:
        """Which cells are held, not expired and not in doubt, as ``Shelf.find`` says it."""
        found = self.shelf.find(keys, cells, wall_ms)
        found.held[:] &= ~self.doubts.among(found.slots)
        return found

    def store(self, spill: Spill) -> int | Declined:
        """Write a cell; the ticket says when it is durable."""
        if self._clock.monotonic_s() < self._pause_until_s:
            return Declined.CLOSED
        slot_bytes = slot_bytes_of(spill.length)
        if slot_bytes > self.shelf.identity.slot_bytes_max:
            return Declined.TOO_LARGE
        if (spill.key, spill.cell) in self._writing:
            return Declined.BUSY
        former = self._make_way(spill)
        if isinstance(former, Declined):
            return former
        if len(self._waiting) >= WAITING_MAX:
            return Declined.NO_ROOM
        if former is not None:
            self.shelf.pin(former)  # it stays until there is another one
        ticket = self._traffic.next_ticket()
        self._writing[spill.key, spill.cell] = former
        newest = _Waiting(ticket, spill, slot_bytes)
        is_first = not any(w.slot_bytes == newest.slot_bytes for w in self._waiting)
        if not (is_first and self._place(newest)) and self._has_hope(newest):
            self._waiting.append(newest)
        return ticket

    def load(self, number: int, sequence: int, arena_offset: int) -> int | Declined:
        """Read a cell that was found into an arena range as long as it was there."""
        if not self.shelf.is_current(number, sequence):
            return Declined.GONE
        self.shelf.pin(number)
        record = self.shelf.records[number]
        return self._traffic.submit(RequestKind.READ, record, number, arena_offset=arena_offset)

    def erase(self, deletion: Deletion) -> None:
        """Drop a deletion's blocks, and ask for everything that it waits for."""
        keys = set(deletion.keys)
        if not deletion.sequence:
            self.sequence += 1
            deletion.sequence = self.sequence
        for number in self.shelf.numbers_of(as_keys(b"".join(deletion.keys))):
            if int(self.shelf.records[number]["sequence"]) < deletion.sequence:
                self._stats.deleted += 1
                self._drop(number)
        writing = [flight.number for flight in self._traffic.of_kind(RequestKind.WRITE)]
        for number in [*writing, *self._leaving]:
            if key_bytes(self.shelf.records[number]) in keys:
                self._deletions.doom(number, deletion)
        for store in [w for w in self._waiting if w.spill.key in keys]:
            self._waiting.remove(store)
            self._end_waiting(store, Result.GONE)
        for key in deletion.keys:
            deletion.parts += 1
            named = about_block(key, deletion.sequence, self._clock.wall_ms())
            self._traffic.submit(RequestKind.BURY, named, deletion=deletion.ticket)

    def forget(self, keys: Iterable[bytes]) -> None:
        """Remove tombstones that are too old."""
        for key in keys:
            self._traffic.submit(RequestKind.FORGET, about_block(key, 0, 0))

    def leave(self, number: int) -> None:
        """Free a dropped cell's slot, when nobody reads it any more."""
        self._leaving[number] = key_bytes(self.shelf.records[number])
        if not self.shelf.is_pinned(number):
            self._traffic.submit(RequestKind.FREE, self.shelf.records[number], number)

    def unpin(self, number: int) -> None:
        """Undo one pin of the shelf; a dropped cell that nobody pins any more leaves."""
        self.shelf.unpin(number)
        if not (self.shelf.is_held(number) or self.shelf.is_pinned(number)):
            self.leave(number)

    def take(self, answer: Answer) -> None:
        """Go on with what the disk has done."""
        flight = self._traffic.answered(answer.ticket)
        if flight is None:
            return
        kind = flight.request.kind
        if kind is RequestKind.READ:
            self._loaded(answer, flight.number)
        elif kind is RequestKind.CHECK:
            self._checked(answer, flight.number)
        elif kind is RequestKind.WRITE:
            self._written(answer, flight)
        elif kind is RequestKind.TOUCH:
            return  # never again: its row may have been freed since
        elif answer.outcome is not Outcome.DONE:
            self._traffic.keep_for_retry(flight)
        elif kind is RequestKind.BURY:
            self._finish(self._deletions.part_done(flight.deletion))
        elif kind in (RequestKind.FREE, RequestKind.ERASE):
            self._freed(kind, flight)

    def expire(self) -> None:
        """Drop some of those whose time is up."""
        for number in self.shelf.expired(self._clock.wall_ms(), EXPIRED_MAX):
            self._stats.expired += 1
            self._drop(number)

    def write_touches(self) -> None:
        """Write down some of the later expiries and stamps; a lost one is no harm."""
        for number in self.shelf.take_dirty(TOUCHES_MAX):
            record = self.shelf.records[number]
            if name_of(record) not in self._writing:  # its row might come after the newer one's
                self._traffic.submit(RequestKind.TOUCH, record)

    def check_doubts(self) -> None:
        """Read a cell that is in doubt, when it is time."""
        number = self.doubts.next()
        if number is not None:
            self.shelf.pin(number)
            self._traffic.submit(RequestKind.CHECK, self.shelf.records[number], number)

    def place_waiting(self) -> None:
        """Give free slots to the stores that wait, first come first served, and make room."""
        waiting, self._waiting = self._waiting, []
        full: set[int] = set()
        for store in waiting:
            if store.slot_bytes not in full and self._place(store):
                continue
            full.add(store.slot_bytes)
            if self._has_hope(store):
                self._waiting.append(store)

    def drain_done(self) -> list[Done]:
        """Tickets that are done since the last call."""
        done, self._done = self._done, []
        return done

    def drain_changes(self) -> list[CellChange]:
        """What came and went since the last call, in order."""
        changes, self._changes = self._changes, []
        return changes

    def unfinished(self) -> list[int]:
        """Tickets of the stores and loads that are not done."""
        flights = self._traffic.of_kind(RequestKind.READ, RequestKind.WRITE)
        return [f.request.ticket for f in flights] + [w.ticket for w in self._waiting]

    def _make_way(self, spill: Spill) -> Declined | int | None:
        """Nothing stands in a cell's way but one in doubt, whose number it is; or it can't come."""
        wall_ms = self._clock.wall_ms()
        cell = np.array([spill.cell], np.uint8)
        found = self.shelf.find(as_keys(spill.key), cell, wall_ms=0)
        if not found.held[0]:
            return None
        number = int(found.slots[0])
        if self.shelf.has_expired(number, wall_ms):
            if self.shelf.is_pinned(number):
                return Declined.BUSY
            self._stats.expired += 1
            self._drop(number)
            return None
        if number in self.doubts:
            return number
        self.shelf.touch(found.slots, spill.stamp, wall_ms, spill.ttl_s)
        return Declined.HELD

    def _loaded(self, answer: Answer, number: int) -> None:
        result = self._judge(answer.outcome, number)
        self._stats.loaded += result is Result.LOADED
        self._done.append(Done(answer.ticket, result))

    def _checked(self, answer: Answer, number: int) -> None:
        is_refused = self._judge(answer.outcome, number) is Result.FAILED
        if not self.doubts.checked(number, is_refused):
            self._drop_damaged(number, "the disk reads others, and never this one")
        self.check_doubts()

    def _judge(self, outcome: Outcome, number: int) -> Result:
        """What a read says of a cell."""
        self.unpin(number)
        if outcome is Outcome.DONE:
            self.doubts.note_read()
        if not self.shelf.is_held(number):
            return Result.GONE
        if outcome is Outcome.DONE:
            self.checks.note(number)
            if self.doubts.end(number):
                self._say(self.shelf.records[number], added=True)
        elif outcome is Outcome.DAMAGED:
            self._drop_damaged(number, "its bytes are others")
        elif number not in self.doubts:
            self._stats.failed += 1
            self._say(self.shelf.records[number], added=False)
            self.doubts.begin(number)
            if len(self.doubts) == 1:
                log.warning("the NVMe disk refused to read a cell: it is a miss, and asked again")
        return _LOADED[outcome]

    def _drop_damaged(self, number: int, why: str) -> None:
        self._stats.damaged += 1
        log.warning("a cell in the NVMe slab is damaged, it is dropped: %s", why)
        self._drop(number)

    def _written(self, answer: Answer, flight: Flight) -> None:
        number, request = flight.number, flight.request
        former = self._writing.pop(name_of(request.record))
        result = _STORED[answer.outcome]
        if result is Result.STORED and request.extent != NO_EXTENT:
            self.shelf.extents.written(request.extent, request.extent_sequence)
        if self._deletions.is_doomed(number):
            result = Result.GONE
        elif result is Result.STORED and not self._publish(number, former):
            result = Result.NO_ROOM
        if result is not Result.STORED:
            self.shelf.drop(number)
            self.leave(number)
        if former is not None:
            self.unpin(former)
        if result is Result.FAILED:
            self._pause()
        self._done.append(Done(answer.ticket, result))

    def _publish(self, number: int, former: int | None) -> bool:
        """Let a written cell be found, in the place of the one in doubt if that is there still."""
        is_news = True
        if former is not None and self.shelf.is_held(former):
            self._replace(former, number)
            is_news = self.doubts.end(former)
            number = former
        elif not self.shelf.publish(number):
            return False
        self.checks.note(number)
        self._stats.stored += 1
        self._stats.stored_bytes += self.shelf.slot_bytes(number)
        if is_news:
            self._say(self.shelf.records[number], added=True)
        return True

    def _replace(self, former: int, newer: int) -> None:
        """Swap the numbers of two writes of one cell, and let the former one's slot leave."""
        for _ in range(self._traffic.redirect_reads(former, to=newer)):
            self.shelf.unpin(former)
            self.shelf.pin(newer)
        self.shelf.replace(former, newer)
        self.leave(newer)

    def _freed(self, kind: RequestKind, flight: Flight) -> None:
        """A slot is free again, unless a deletion wants it wiped for good first."""
        number = flight.number
        if kind is RequestKind.FREE and self._deletions.is_doomed(number):
            self._traffic.submit(RequestKind.ERASE, flight.request.record, number)
            return
        del self._leaving[number]
        self.shelf.release(number)
        self._finish(self._deletions.erased(number))

    def _pause(self) -> None:
        now_s = self._clock.monotonic_s()
        if now_s >= self._pause_until_s:
            log.warning("the NVMe disk refused a write: nothing is stored for %g s", PAUSE_S)
        self._stats.failed += 1
        self._pause_until_s = now_s + PAUSE_S

    def _place(self, store: _Waiting) -> bool:
        """Begin to write a cell; ``False`` if no slot is free."""
        placed = self.shelf.place(store.spill, self.sequence + 1)
        if placed is None:
            return False
        self.sequence += 2
        number, place = placed
        self._traffic.submit(
            RequestKind.WRITE, self.shelf.records[number], number, ticket=store.ticket,
            arena_offset=store.spill.arena_offset,
            extent=place.extent if place.is_new_extent else NO_EXTENT,
            extent_sequence=place.extent_sequence,
        )  # fmt: skip
        return True

    def _has_hope(self, store: _Waiting) -> bool:
        """Whether room is on its way for a store, after dropping who has to leave for it.

        Without hope the store is done.
        """
        if not (store.has_room_coming and self._leaving):
            for number in self.shelf.room_for(store.slot_bytes):
                self._stats.evicted += 1
                self._drop(number)
            store.has_room_coming = True
        if not self._leaving:
            self._end_waiting(store, Result.NO_ROOM)
        return bool(self._leaving)

    def _end_waiting(self, store: _Waiting, result: Result) -> None:
        former = self._writing.pop((store.spill.key, store.spill.cell))
        if former is not None:
            self.unpin(former)
        self._done.append(Done(store.ticket, result))

    def _drop(self, number: int) -> None:
        """A held cell is found no more."""
        if not self.doubts.end(number):  # else that was said
            self._say(self.shelf.records[number], added=False)
        self.shelf.drop(number)
        self.leave(number)

    def _finish(self, tickets: Iterable[int]) -> None:
        self._done += [Done(ticket, Result.DELETED) for ticket in tickets]

    def _say(self, record: np.void, added: bool) -> None:
        self._changes.append(CellChange(*name_of(record), span=int(record["span"]), added=added))
