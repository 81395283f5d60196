"""The NVMe tier as its node drives it: one object, whatever becomes of its disk.

    OPENING ── opened ──> OPEN ── the disk process ended ──> OPENING ...  started again, later and
       └── refused ──> REFUSED, until somebody sees to the files          later each time

Driven by one thread: ``store``, ``load`` and ``delete`` give tickets, ``poll`` says what became of
them. All disk work is done by a ``DiskQueue``. While that is away, everything is a miss; then held
is what the disk says, as after any start. A delete outlives all of it.

Does not cover: what happens while it is open (``open_slab``), who decides what is stored and
promoted, holds, other nodes' copies.
"""

import itertools
import logging

import numpy as np
import numpy.typing as npt

from kvstore.clock import Clock
from kvstore.key import Keys
from kvstore.table import Cells, Found, Slots
from kvstore.tiers.life import clamp
from kvstore.tiers.nvme.deletions import Deletion, Deletions
from kvstore.tiers.nvme.disk_queue import Answer, DiskQueue, Ended
from kvstore.tiers.nvme.identity import parse_identity
from kvstore.tiers.nvme.open_slab import OpenSlab
from kvstore.tiers.nvme.record import RECORD, TOMBSTONE, Records
from kvstore.tiers.nvme.requests import Opening, OpeningKind
from kvstore.tiers.nvme.shelf import Shelf
from kvstore.tiers.nvme.spill import Declined, Done, NvmeStats, Phase, Result, Spill
from kvstore.tiers.nvme.tombstones import TombstoneBook
from kvstore.tiers.nvme.traffic import Traffic
from kvstore.tiers.tier import CellChange

log = logging.getLogger(__name__)

RETRY_S = 1.0
"""How often what has expired is dropped, and a freeing that the disk refused is asked again; and
how often it is looked whether a cell in doubt is to be read."""
TOUCHES_S = 5.0
"""How often later expiries and stamps are written down."""
RESTART_S = (0.5, 30.0)
"""First and longest wait before a disk process that ended is started again."""
_COUNTER_BITS = 40


class NvmeTier:
    """Cells in a slab, found through an index, evicted by a policy."""

    def __init__(self, queue: DiskQueue, clock: Clock, cells_max: int, incarnation: int) -> None:
        self.phase = Phase.OPENING
        self.reason = ""
        """Why the tier is not open."""
        self.epoch = 0
        """Grows when what is held was replaced as a whole: ask for ``sure_records`` then."""
        self.is_sealed = False
        """Whether nobody may find anything for now."""
        self.stats = NvmeStats()
        self._queue = queue
        self._clock = clock
        self.cells_max = cells_max
        self._sequence = incarnation << _COUNTER_BITS
        self._tickets = itertools.count(1)
        self._traffic = Traffic(queue, self._tickets)
        self._open: OpenSlab | None = None
        self._tombstones = TombstoneBook(np.empty(0, TOMBSTONE))
        self._deletions = Deletions()
        self._done: list[Done] = []
        self._retried_s = self._touches_s = clock.monotonic_s()
        self._restart_s: float | None = None
        self._backoff_s = RESTART_S[0]
        queue.start()

    def find(self, keys: Keys, cells: Cells) -> Found:
        """Which cells are held, not expired and not in doubt. Neither pins nor touches.

        In the answer, slots are record numbers, generations are sequences, offsets are the slab's.
        """
        if self._open is None or self.is_sealed:
            return Found.nothing(len(keys))
        return self._open.find(keys, cells, self._clock.wall_ms())

    def holds(self, keys: Keys, cells: Cells) -> npt.NDArray[np.bool_]:
        """Which cells are held and not in doubt, whether expired or not: what came and is there."""
        if self._open is None:
            return np.zeros(len(keys), np.bool_)
        return self._open.find(keys, cells, wall_ms=0).held

    def locate(self, keys: Keys, cells: Cells) -> Found:
        """``find`` for the node itself: expired or not, in doubt or not, sealed or not."""
        if self._open is None:
            return Found.nothing(len(keys))
        return self._open.shelf.find(keys, cells, wall_ms=0)

    def keep(self, numbers: Slots) -> None:
        """Let held cells not leave; counted, until ``let_go`` or the end of this ``epoch``."""
        assert self._open is not None, "nothing is held while the tier is not open"
        for number in numbers.tolist():
            self._open.shelf.pin(number)

    def let_go(self, numbers: Slots) -> None:
        """Undo one ``keep``; also of cells that are held no more."""
        assert self._open is not None, "nothing is kept while the tier is not open"
        for number in numbers.tolist():
            self._open.unpin(number)
        self._traffic.send()

    def are_held(self, numbers: Slots) -> npt.NDArray[np.bool_]:
        """Of which records the cells are held still."""
        if self._open is None:
            return np.zeros(len(numbers), np.bool_)
        return self._open.shelf.are_held(numbers)

    def are_in_doubt(self, numbers: Slots) -> npt.NDArray[np.bool_]:
        """Of which records the cells are held, but the disk refused to read them the last time."""
        if self._open is None:
            return np.zeros(len(numbers), np.bool_)
        return self._open.doubts.among(numbers)

    def set_expiry(self, numbers: Slots, expires_ms: npt.NDArray[np.uint64]) -> None:
        """Say anew until when held cells live."""
        if self._open is not None:
            self._open.shelf.set_expiry(numbers, expires_ms)

    @property
    def records(self) -> Records:
        """All that is known of cells, by the numbers under which they were found just now."""
        assert self._open is not None, "nothing is found while the tier is not open"
        return self._open.shelf.records

    def checked_ago_ms(self, number: int) -> int | None:
        """How long ago a held cell was written or read whole, if it was since it was found."""
        assert self._open is not None, "nothing is found while the tier is not open"
        return self._open.checks.ago_ms(number)

    def record(self, number: int) -> np.void:
        """All that is known of a cell that was found just now."""
        found: np.void = self.records[number]
        return found

    def next_stamp(self) -> int:
        """One stamp for one operation on one prompt."""
        return self._open.shelf.next_stamp() if self._open else 0

    def touch(self, numbers: Slots, stamp: int, ttl_s: int | None = None) -> None:
        """Move held cells to ``stamp`` and slide their expiry; never shortens a life.

        ``ttl_s`` is what a new put of them asks for, 0 for no expiry.
        """
        if self._open is not None:
            shelf = self._open.shelf
            held = np.array([n for n in numbers.tolist() if shelf.is_held(n)], np.uint32)
            shelf.touch(held, stamp, self._clock.wall_ms(), ttl_s)

    def store(self, spill: Spill) -> int | Declined:
        """Write a cell out of the arena; the ticket says when it is durable."""
        if self._open is None:
            return Declined.CLOSED
        answer = self._open.store(spill)
        self._traffic.send()
        return answer

    def load(self, number: int, sequence: int, arena_offset: int) -> int | Declined:
        """Read a cell that was found into an arena range as long as its slot was there."""
        if self._open is None:
            return Declined.GONE
        answer = self._open.load(number, sequence, arena_offset)
        self._traffic.send()
        return answer

    def delete(self, keys: Keys) -> int:
        """Let blocks be found no more, from now on; the ticket says when that is for good.

        May be asked in any phase: it is done after the next opening then.
        """
        deletion = Deletion(next(self._tickets), tuple({key.tobytes() for key in keys}))
        self._deletions.waiting[deletion.ticket] = deletion
        self._bury(deletion)
        self._traffic.send()
        return deletion.ticket

    def poll(self) -> list[Done]:
        """What is done since the last call. Never waits."""
        for event in self._queue.poll():
            if isinstance(event, Opening):
                self._opened(event)
            elif isinstance(event, Ended):
                self._ended(event)
            else:
                self._answered(event)
        if self._open is not None:
            self._open.place_waiting()
            self._traffic.send()
            self._done += self._open.drain_done()
            self._count(self._open.shelf)
        done, self._done = self._done, []
        return done

    def tick(self) -> list[Done]:
        """``poll``, and whatever time has brought: expiry, retries, a new start."""
        now_s = self._clock.monotonic_s()
        if self._restart_s is not None and now_s >= self._restart_s:
            self._restart_s = None
            self.stats.restarts += 1
            self._queue.start()
        if self._open is not None and now_s - self._retried_s >= RETRY_S:
            self._retried_s = now_s
            self._traffic.retry()
            self._open.expire()
            self._open.forget(self._tombstones.take_outdated(self._clock.wall_ms()))
            self._open.check_doubts()
        if self._open is not None and now_s - self._touches_s >= TOUCHES_S:
            self._touches_s = now_s
            self._open.write_touches()
        return self.poll()

    def stop(self) -> None:
        """End the disk work, now. What was reported as done stays done, the rest has failed."""
        self._queue.stop()
        self._forget()
        self.phase = Phase.CLOSED
        self._restart_s = None

    def drain_changes(self) -> list[CellChange]:
        """What came and went within this ``epoch`` since the last call, in order."""
        return self._open.drain_changes() if self._open else []

    def held_records(self) -> Records:
        """Everything that is held, in doubt or not."""
        shelf = self._open.shelf if self._open else None
        return shelf.records[shelf.held()] if shelf else np.empty(0, RECORD)

    def sure_records(self) -> Records:
        """Everything that is held and not in doubt: what came and is there."""
        if self._open is None:
            return np.empty(0, RECORD)
        held = self._open.shelf.held()
        return self._open.shelf.records[held[~self._open.doubts.among(held)]]

    def metadata_bytes(self) -> int:
        """Memory for bookkeeping."""
        if self._open is None:
            return 0
        marks_bytes = self._open.checks.nbytes + self._open.doubts.nbytes
        return self._open.shelf.metadata_bytes() + marks_bytes

    def _opened(self, opening: Opening) -> None:
        """Begin with what the disk says."""
        identity = parse_identity(opening.identity, "the NVMe tier")
        if opening.kind is OpeningKind.REFUSED or identity is None:
            self.phase, self.reason = Phase.REFUSED, opening.text
            log.warning("no NVMe tier: %s", opening.text)
            return
        if opening.text:
            log.warning("%s", opening.text)
        self._sequence = max(
            self._sequence,
            int(opening.records["sequence"].max(initial=0)),
            int(opening.tombstones["sequence"].max(initial=0)),
        )
        shelf = Shelf(identity, self.cells_max)
        homeless = shelf.enter(opening.records)
        clamp(shelf.records, shelf.held(), self._clock.wall_ms())
        self._open = OpenSlab(
            shelf, self._traffic, self._deletions, self.stats, self._clock, self._sequence
        )
        for number in homeless:
            self._open.leave(number)
        self._tombstones = TombstoneBook(opening.tombstones)
        for deletion in self._deletions.begin_anew():
            self._bury(deletion)
        self.phase, self.reason = Phase.OPEN, ""
        self.epoch += 1
        self.stats.capacity_bytes = identity.extent_bytes * identity.extents
        log.info("the NVMe tier holds %d cells", len(opening.records))

    def _ended(self, ended: Ended) -> None:
        """Everything is a miss until the disk is back."""
        self._forget()
        if self.phase is Phase.REFUSED:
            return
        if self.phase is Phase.OPEN or ended.reason != self.reason:
            log.warning("the NVMe tier is away, all of it a miss: %s", ended.reason)
        self.phase, self.reason = Phase.OPENING, ended.reason
        self._restart_s = self._clock.monotonic_s() + self._backoff_s
        self._backoff_s = min(2 * self._backoff_s, RESTART_S[1])

    def _forget(self) -> None:
        """What was asked has failed, but for deletions; nothing is held."""
        if self._open is not None:
            self._done += self._open.drain_done()
            self._done += [Done(ticket, Result.FAILED) for ticket in self._open.unfinished()]
            self._sequence = self._open.sequence
            self.epoch += 1
        self._open = None
        self._traffic = Traffic(self._queue, self._tickets)
        self.stats.held_cells = self.stats.held_bytes = 0

    def _answered(self, answer: Answer) -> None:
        self._backoff_s = RESTART_S[0]
        if self._open is not None:
            self._open.take(answer)

    def _bury(self, deletion: Deletion) -> None:
        for key in deletion.keys:
            self._tombstones.enter(key, self._clock.wall_ms())
        if self._open is not None:
            self._open.erase(deletion)

    def _count(self, shelf: Shelf) -> None:
        self.stats.held_cells, self.stats.held_bytes = shelf.held_cells, shelf.held_bytes
