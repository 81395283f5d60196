"""Deletes: blocks that are to be found no more, here and, when it is done, after any crash.

    delete ──> in memory, at once ──> on the disk, durably: done ──> buried: in the book and the log

Buried last, because a burial says that the delete is done here: after a crash before that, a
neighbour's gossip brings the same delete again. Deletes that others tell of are buried without
further asking. A block with a burial may be stored again. A disk that is refused nobody waits for:
it is owed the delete (``kvstore.owed``).

Does not cover: who else is told (``kvstore.rpc``), what a delete is to the tiers.
"""

from dataclasses import dataclass

import numpy as np

from kvstore.burial_log import BurialLog
from kvstore.burials import Burial, BurialBook, BurialPage, DeleteClock, Ids
from kvstore.calls import DELETE_ID_MAX, DELETE_KEYS_MAX
from kvstore.clock import Clock
from kvstore.errors import UsageError
from kvstore.holds import Holds
from kvstore.key import Keys, as_keys
from kvstore.lasting import Lasting
from kvstore.owed import OwedDeletes
from kvstore.tiers.behind import Behind, Erasure
from kvstore.tiers.host import HostTier

MEND_S = 1.0
"""How often a log that the disk refused is tried again, and what is outdated forgotten."""


@dataclass(frozen=True, slots=True, eq=False)
class Deletion:
    """One delete of ``keys``, invisible by now."""

    id: int
    keys: Keys
    erasure: Erasure

    @property
    def is_done(self) -> bool:
        """Whether nothing on the disk brings the blocks back, or nobody finds what is on it."""
        return self.erasure.is_done or self.erasure.is_owed


@dataclass(frozen=True, slots=True, eq=False)
class _Heard:
    """Deletes that a neighbour told of, or that could not be buried at once."""

    burials: dict[bytes, Burial]
    erasure: Erasure


class Deletes:
    """All deletes of a node."""

    def __init__(
        self, host: HostTier, behind: Behind, holds: Holds, clock: Clock, lasting: Lasting
    ) -> None:
        self.book = BurialBook()
        self._host = host
        self._holds = holds
        self._behind = behind
        self._clock = clock
        self._log = BurialLog(lasting.files, lasting.folder, self.book, clock.wall_ms())
        self._ids = DeleteClock()
        self._see_buried()
        self._begun: dict[bytes, int] = {}
        """The newest delete of each block that is not buried yet."""
        self._heard: list[_Heard] = []
        self._owed = OwedDeletes(behind, lasting, clock.wall_ms())
        self._mended_s = clock.monotonic_s()

    @property
    def is_read(self) -> bool:
        """Whether all that was deleted before this start is known."""
        return self._log.is_read and self._owed.is_read

    def begin(self, keys: Keys, delete_id: int | None = None) -> Deletion:
        """Delete blocks, under a new id unless another node has given it one."""
        if len(keys) > DELETE_KEYS_MAX:
            raise UsageError(f"{len(keys)} keys in one delete are over {DELETE_KEYS_MAX}: split it")
        if delete_id is None:
            delete_id = self._ids.next_id(self._clock.wall_ms())
        if not 0 < delete_id <= DELETE_ID_MAX:
            raise UsageError(f"{delete_id} is no id of a delete: 1 to {DELETE_ID_MAX} are")
        self._ids.see(delete_id)
        for key in keys:
            name = key.tobytes()
            self._begun[name] = max(delete_id, self._begun.get(name, 0))
        return Deletion(delete_id, keys.copy(), self._erase(keys))

    def newest(self, keys: Keys) -> Ids:
        """The newest delete of each block that this node has heard of, done or not; 0: none."""
        names = [key.tobytes() for key in keys]
        under_way = self._heard_of()
        buried = [self.book.get(name) for name in names]
        known = [0 if burial is None else burial.id for burial in buried]
        return np.array(
            [
                max(known_id, under_way.get(name, 0), self._begun.get(name, 0))
                for name, known_id in zip(names, known, strict=True)
            ],
            np.uint64,
        )

    def bury(self, deletion: Deletion) -> bool:
        """Remember a deletion that is done; whether it is remembered durably."""
        if not deletion.is_done:
            raise UsageError("a deletion is buried when it is done: wait until is_done says so")
        burial = Burial(deletion.id, self._clock.wall_ms())
        burials = {key.tobytes(): burial for key in deletion.keys}
        for name in burials:
            if self._begun.get(name) == deletion.id:
                del self._begun[name]
        if self._is_paid(burials, deletion.erasure):
            return self._enter(burials)
        self._heard.append(_Heard(burials, deletion.erasure))
        return False

    def hear(self, page: BurialPage) -> None:
        """Do what a neighbour has done, where it is news."""
        wall_ms = self._clock.wall_ms()
        under_way = self._heard_of()
        fresh: dict[bytes, Burial] = {}
        rows = zip(page.keys, page.ids.tolist(), page.ages_ms.tolist(), strict=True)
        for packed, delete_id, age_ms in rows:
            key = packed.tobytes()
            if not 0 < delete_id <= DELETE_ID_MAX:
                continue
            self._ids.see(delete_id)
            known = fresh.get(key)
            newest = max(under_way.get(key, 0), 0 if known is None else known.id)
            if delete_id > newest and self.book.is_news(key, delete_id):
                fresh[key] = Burial(delete_id, max(0, wall_ms - age_ms))
        if fresh:
            self._heard.append(_Heard(fresh, self._erase(as_keys(b"".join(fresh)))))

    def step(self) -> None:
        """Bury what others told of and is done here, and see to the log."""
        self._owed.step()
        for heard in [one for one in self._heard if self._is_paid(one.burials, one.erasure)]:
            self._heard.remove(heard)
            self._enter(heard.burials)
        now_s = self._clock.monotonic_s()
        if now_s - self._mended_s >= MEND_S:
            self._mended_s = now_s
            self.book.forget_outdated(self._clock.wall_ms())
            self._log.mend()
            self._see_buried()
            self._owed.mend()

    def _see_buried(self) -> None:
        self._ids.see(max([self.book.floor, *(burial.id for _, burial in self.book.items()[:1])]))

    def _is_paid(self, burials: dict[bytes, Burial], erasure: Erasure) -> bool:
        """Whether the disk has done it, or is owed it: before that, no burial may say so."""
        if erasure.is_done:
            return True
        return erasure.is_owed and self._owed.add(burials, self._clock.wall_ms())

    def _heard_of(self) -> dict[bytes, int]:
        """The newest delete of each block that a neighbour told of and that is not done."""
        under_way: dict[bytes, int] = {}
        for heard in self._heard:
            for key, burial in heard.burials.items():
                under_way[key] = max(burial.id, under_way.get(key, 0))
        return under_way

    def _erase(self, keys: Keys) -> Erasure:
        self._holds.lose(keys)
        self._host.delete(keys)
        return self._behind.erase(keys)

    def _enter(self, burials: dict[bytes, Burial]) -> bool:
        fresh = [(key, burial) for key, burial in burials.items() if self.book.enter(key, burial)]
        self.book.forget_outdated(self._clock.wall_ms())
        return self._log.append(fresh)
