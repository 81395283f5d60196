"""The host tier: cells in shared memory, from reservation to eviction.

    UNUSED ── reserve ──> RESERVED ── commit ──> COMMITTED ── free ──> QUARANTINED ──> UNUSED
                             ├── abort (the writer's own word) ──────────────┘
                             └── retire (any other end): its offsets for good ───────────┘

Only this class writes the key table. It is driven by one thread, reads the time through its
clock, and knows nothing of sessions, leases or the network (``kvstore.node``). A cell that cannot
be stored is refused with a reason; what was held before is still held then. What a successor makes
of the slots is said in ``kvstore.tiers.adoption``.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kvstore.arena import ARENA_FILE, Arena
from kvstore.clock import Clock
from kvstore.fs import FileSystem
from kvstore.key import KEY_BYTES, Keys
from kvstore.table import (
    TABLE_FILE,
    Cells,
    Found,
    KeyTable,
    Slots,
    SlotState,
)
from kvstore.tiers.adoption import take_over
from kvstore.tiers.checks import Checks
from kvstore.tiers.departures import Below, Departures
from kvstore.tiers.inspection import is_announced, is_whole
from kvstore.tiers.life import clamp, slide
from kvstore.tiers.offer import Offer, Reserved
from kvstore.tiers.reservations import Reservations
from kvstore.tiers.space import Space
from kvstore.tiers.stats import HostStats
from kvstore.tiers.tier import CellChange, Commitment, NewCell, Refusal, Suspicion
from kvstore.tiers.vacancy import Vacancy
from kvstore.uses import Uses


class HostTier:
    """Cells in an arena, found through a key table, evicted by a policy."""

    def __init__(
        self,
        fs: FileSystem,
        clock: Clock,
        arena: Arena,
        table: KeyTable,
        uses: Uses,
        incarnation: int,
    ) -> None:
        self.table, self.arena, self.uses = table, arena, uses
        self.incarnation = incarnation
        self.stats = HostStats(capacity_bytes=int(table.header["capacity_bytes"]))
        self.checks = Checks(len(table.slots), clock)
        self._page_bytes = fs.page_bytes
        self._clock = clock
        self._space = Space(arena, table, clock)
        self._policy = Departures(table.slots)
        self._pins = self._policy.pins
        self._vacancy = Vacancy(table, self._space, clock, incarnation)
        self._reservations = Reservations()
        self._withdrawn: set[int] = set()
        """Deleted, and pinned still."""
        self._changes: list[CellChange] = []
        table.header["incarnation"] = incarnation

    @classmethod
    def create(
        cls,
        fs: FileSystem,
        clock: Clock,
        folder: Path,
        capacity_bytes: int,
        slots: int,
        incarnation: int,
    ) -> "HostTier":
        """An empty tier. Whatever the folder held is gone."""
        fs.make_folder(folder)
        fs.remove(folder / TABLE_FILE)
        fs.remove(folder / ARENA_FILE)
        capacity_bytes -= capacity_bytes % fs.page_bytes
        arena = Arena.create(fs, folder, capacity_bytes)
        table = KeyTable.create(fs, folder, slots, capacity_bytes, incarnation)
        tier = cls(fs, clock, arena, table, Uses.create(fs, folder, slots), incarnation)
        tier._space.free(0, capacity_bytes)
        return tier

    @classmethod
    def adopt(
        cls, fs: FileSystem, clock: Clock, folder: Path, capacity_bytes: int, incarnation: int
    ) -> "HostTier":
        """Go on with what a predecessor of the same boot and size left.

        Whole, committed cells are held again; what was being written is retired. Raises
        ``StateError``, saying why, when there is nothing to adopt.
        """
        capacity_bytes -= capacity_bytes % fs.page_bytes
        left = take_over(fs, folder, capacity_bytes, incarnation)
        records = left.table.slots
        uses = Uses.create(fs, folder, len(records))
        tier = cls(fs, clock, left.arena, left.table, uses, incarnation)
        tier._space.take_over(left.free, tier._extents(left.unfinished))
        for slot in left.unfinished.tolist():
            tier._vacancy.add(slot)
        tier._policy.enter(left.held, records["depth"][left.held], records["stamp"][left.held])
        tier.checks.note(left.held)
        clamp(records, left.held, clock.wall_ms())
        tier.stats.held_cells = tier.stats.adopted = len(left.held)
        tier.stats.held_bytes = int(records["size_bytes"][left.held].sum())
        tier.stats.retired_bytes = tier._space.retired_bytes
        return tier

    def find(self, keys: Keys, cells: Cells) -> Found:
        """Which cells are held and not expired. Neither pins nor touches."""
        return self.table.find_living(keys, cells, self._clock.wall_ms())

    def find_for_writing(self, keys: Keys, cells: Cells) -> Found:
        """What is held, also of a sealed table; the expired is dropped: it would be in the way."""
        found = self.table.find_sealed(keys, cells)
        expired = found.held & self.table.expired(found.slots, self._clock.wall_ms())
        for slot in dict.fromkeys(found.slots[expired].tolist()):
            if not self._pins[slot]:
                self._count_eviction(slot)
                self.evict(slot)
                found.held[found.slots == slot] = False
        return found

    def next_stamp(self) -> int:
        """One stamp for one operation on one prompt, in this tier and in the one below."""
        return self._policy.next_stamp()

    def go_on_after(self, stamp: int) -> None:
        """Every later stamp is newer than this one, too."""
        self._policy.go_on_after(stamp)

    def touch(self, slots: Slots, stamp: int, ttl_s: int | None = None) -> None:
        """Move held cells to ``stamp`` and slide their expiry; never shortens a life.

        ``ttl_s`` is what a new put of them asks for, 0 for no expiry.
        """
        records = self.table.slots
        self._policy.touch(slots, records["depth"][slots], stamp)
        slide(records, slots, stamp, self._clock.wall_ms(), ttl_s)

    def is_writing(self, key: bytes, cell: int) -> bool:
        """Whether somebody has this cell reserved."""
        return (key, cell) in self._reservations

    def reserve(self, new: NewCell, stamp: int) -> int | Refusal:
        """``reserve_all`` for one cell."""
        reserved = self.reserve_all(Offer.of(new, stamp))
        return Refusal(int(reserved.refusals[0])) or int(reserved.slots[0])

    def reserve_all(self, offer: Offer) -> Reserved:
        """Give cells that are neither held nor being written slots; evicts to make room."""
        records, refusals = self.table.slots, np.zeros(len(offer.cells), np.uint8)
        offsets, sizes = records["offset"], records["size_bytes"]
        slots = np.zeros(len(offer.cells), np.uint32)
        wanted = offer.size_bytes(self._page_bytes).tolist()
        for row, (name, size) in enumerate(zip(offer.names(), wanted, strict=True)):
            fits = size <= self.stats.capacity_bytes
            offset = self._allocate(size, offer.stamp) if fits else Refusal.TOO_LARGE
            if isinstance(offset, Refusal):
                refusals[row] = offset
                continue
            slots[row] = slot = self._vacancy.take()
            offsets[slot], sizes[slot] = offset, size
            self._reservations.begin(*name, slot)
        rows = np.flatnonzero(refusals == Refusal.NONE)
        taken = slots[rows]
        records[taken] = offer.rows(rows).records(
            records[taken], self._vacancy.next_generations(len(rows)), self._clock.wall_ms()
        )
        self.stats.reserved_cells += len(rows)
        return Reserved(slots, refusals)

    def commit(self, slot: int, header_digest: int) -> Commitment:
        """``commit_all`` for one slot."""
        return self.commit_all([slot], [header_digest])[0]

    def commit_all(self, slots: Sequence[int], header_digests: Sequence[int]) -> list[Commitment]:
        """Make reserved slots visible if they hold the cells that were announced.

        Unless it is STORED, a slot is free again, because its writer has said that it is done.
        """
        ends = [self._end(*one) for one in zip(slots, header_digests, strict=True)]
        rows = [row for row, end in enumerate(ends) if isinstance(end, bytes)]
        keys = np.frombuffer(b"".join(end for end in ends if isinstance(end, bytes)), np.uint8)
        whole = np.array([slots[row] for row in rows], np.uint32)
        digests = np.array([header_digests[row] for row in rows], np.uint64)
        keys = keys.reshape(-1, KEY_BYTES)
        inserted = self.table.insert_all(keys, whole, digests)
        self._stored(keys[inserted], whole[inserted])
        for at in np.flatnonzero(~inserted).tolist():
            inserted[at] = self._displace(keys[at : at + 1], whole[at : at + 1], digests[at])
        outcomes = [Commitment.NO_ROOM if isinstance(end, bytes) else end for end in ends]
        for row, is_stored in zip(rows, inserted.tolist(), strict=True):
            if is_stored:
                outcomes[row] = Commitment.STORED
            else:
                self._vacancy.rest(slots[row])
                self.stats.aborted += 1
        return outcomes

    def abort(self, slot: int) -> None:
        """The writer itself says that it will not write any more: the slot is free."""
        self._end_reservation(slot)
        self._vacancy.rest(slot)
        self.stats.aborted += 1

    def retire(self, slot: int) -> None:
        """The writer may still write: its offsets are never used again."""
        self._end_reservation(slot)
        record = self.table.slots[slot]
        record["generation"] = self._vacancy.next_generation()
        self._space.retire(int(record["offset"]), int(record["size_bytes"]))
        self._vacancy.add(slot)
        self.stats.retired += 1
        self.stats.retired_bytes = self._space.retired_bytes

    def lie_above(self, below: Below | None) -> None:
        """What leaves this tier is in another one, if it has come there in time."""
        self._policy.below = below

    @property
    def spare_bytes(self) -> int:
        """What could be handed out without losing anything: free, or on the disk as well."""
        return self._space.free_bytes + self._policy.expendable_bytes

    def next_to_leave(self, count: int) -> Slots:
        """Among the ``count`` oldest those that nobody needs, and that are not expendable yet."""
        return self._policy.next_to_leave(count)

    def expend(self, slots: Slots) -> None:
        """Held cells are on the disk too: while nobody uses them, they leave before others do."""
        self._policy.expend(slots)

    def pin(self, slots: Sequence[int]) -> None:
        """Keep cells from being evicted; counted."""
        for slot in slots:
            self._pins[slot] += 1

    def unpin(self, slots: Sequence[int]) -> None:
        """Undo one ``pin``."""
        for slot in slots:
            assert self._pins[slot] > 0, "unpinned more often than pinned"
            self._pins[slot] -= 1
            if slot in self._withdrawn and not self._pins[slot]:
                self._withdrawn.remove(slot)
                self._vacancy.rest(slot)

    def evict(self, slot: int) -> None:
        """Drop a held, unpinned cell."""
        assert self._pins[slot] == 0, "evicted while pinned"
        self._withdraw(slot)
        self._vacancy.rest(slot)

    def delete(self, keys: Keys) -> None:
        """Let blocks be found no more, at once, nor what is being written of them ever.

        Memory that somebody uses is free when he is done with it.
        """
        for slot in self.table.slots_of(keys).tolist():
            self.stats.deleted += 1
            if not self._pins[slot]:
                self.evict(slot)
                continue
            self._withdraw(slot)
            record = self.table.slots[slot]
            record["generation"] = self._vacancy.next_generation()
            record["state"] = SlotState.QUARANTINED
            self._withdrawn.add(slot)
        self._reservations.doom({key.tobytes() for key in keys})

    def _withdraw(self, slot: int) -> None:
        """A held cell is found no more."""
        record = self.table.slots[slot]
        key = self.table.key_of(slot)
        self._changes.append(CellChange(key, int(record["cell"]), int(record["span"]), added=False))
        self.table.clear(slot)
        self._policy.remove(slot)
        self.stats.held_cells -= 1
        self.stats.held_bytes -= int(record["size_bytes"])

    def discard(self, slot: int, leaf_bytes: Sequence[int]) -> Suspicion:
        """Drop a held cell that is damaged; one that is whole, or pinned, stays."""
        if self._pins[slot]:
            return Suspicion.OPEN
        if is_whole(self.arena, self.table, slot, leaf_bytes):
            return Suspicion.WRONG
        self.stats.damaged += 1
        self.evict(slot)
        return Suspicion.RIGHT

    def tick(self) -> None:
        """Let rested slots be used again, and take back memory behind retired offsets."""
        self._vacancy.tick()
        self._space.tick()

    def drain_changes(self) -> list[CellChange]:
        """What came and went since the last call, in order."""
        changes, self._changes = self._changes, []
        return changes

    def held_slots(self) -> Slots:
        """All slots with a visible cell."""
        return np.flatnonzero(self.table.slots["state"] == SlotState.COMMITTED).astype(np.uint32)

    def metadata_bytes(self) -> int:
        """Memory for bookkeeping, payload and headers not counted."""
        table = self.table
        known = self.uses.nbytes + self._vacancy.nbytes + self.checks.nbytes
        return table.nbytes + self._policy.metadata_bytes() + known

    def _allocate(self, size: int, stamp: int) -> int | Refusal:
        """A range of ``size`` bytes and a free slot record, evicting what is older, or nothing."""
        if (offset := self._vacancy.allocate(size)) is not None:
            return offset
        makes_room = False
        for slot in self._policy.unpinned(stamp):
            makes_room = makes_room or int(self.table.slots[slot]["size_bytes"]) >= size
            if not makes_room and self._space.longest_stretch(self._in_use(stamp)) < size:
                break
            makes_room = True
            self._count_eviction(slot)
            self.evict(slot)
            if (offset := self._vacancy.allocate(size)) is not None:
                return offset
        return Refusal.SHRUNK if self._space.longest_stretch(()) < size else Refusal.NO_ROOM

    def _in_use(self, stamp: int) -> list[tuple[int, int]]:
        """Start and length of what can't be evicted now, by an operation with this stamp."""
        return self._extents(
            np.array([*self._reservations.slots(), *self._policy.staying(stamp)], np.intp)
        )

    def _extents(self, slots: npt.NDArray[np.integer]) -> list[tuple[int, int]]:
        """Start and length of each slot's range."""
        found = self.table.slots[slots]
        return list(zip(found["offset"].tolist(), found["size_bytes"].tolist(), strict=True))

    def _count_eviction(self, slot: int) -> None:
        expires = int(self.table.slots[slot]["expires_ms"])
        if expires and expires <= self._clock.wall_ms():
            self.stats.expired += 1
        else:
            self.stats.evicted += 1
            has_disk = self._policy.below is not None
            self.stats.dropped_unspilled += has_disk and not self._policy.is_below(slot)

    def _end(self, slot: int, header_digest: int) -> bytes | Commitment:
        """A writer is done; the key of what it wrote, or why it is nothing and the slot rests."""
        key = self._end_reservation(slot)
        if not key:
            self._vacancy.rest(slot)
            return Commitment.DELETED
        if is_announced(self.arena, self.table, slot, key, header_digest):
            return key
        self._vacancy.rest(slot)
        self.stats.aborted += 1
        return Commitment.DAMAGED

    def _stored(self, keys: Keys, slots: Slots) -> None:
        """Cells are held from now on."""
        records = self.table.slots[slots]
        for stamp in np.unique(records["stamp"]).tolist():
            same = records["stamp"] == stamp
            self._policy.touch(slots[same], records["depth"][same], stamp)
        self.stats.held_cells += len(slots)
        self.stats.held_bytes += int(records["size_bytes"].sum())
        self.stats.stored += len(slots)
        self.checks.note(slots)
        for key, cell, span in zip(keys, records["cell"], records["span"], strict=True):
            self._changes.append(CellChange(key.tobytes(), int(cell), int(span), added=True))

    def _displace(self, key: Keys, slot: Slots, header_digest: np.uint64) -> bool:
        """Make a cell visible where all entries are taken, in the place of the oldest."""
        rivals = self.table.rivals(key.tobytes(), int(self.table.slots[slot[0]]["cell"]))
        for rival in sorted(rivals, key=self._age):
            if not self._pins[rival]:
                self._count_eviction(rival)
                self.evict(rival)
                self.table.insert_all(key, slot, np.array([header_digest], np.uint64))
                self._stored(key, slot)
                return True
        return False

    def _age(self, slot: int) -> int:
        return int(self.table.slots[slot]["stamp"])

    def _end_reservation(self, slot: int) -> bytes:
        self.stats.reserved_cells -= 1
        return self._reservations.end(slot)
