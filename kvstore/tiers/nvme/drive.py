"""The drive: does what the tier asks, in the stages that make it survive a crash.

    read     slot read and verified; a check does it for nobody
    write    slot written ──> slab synced, row committed
    free     row's removal committed ──> slot wiped; only then is it written again
    erase    row's removal committed ──> slot wiped ──> slab synced
    bury     tombstone committed ──> slab synced, and with it every wipe before
    touch, forget   row committed

Whatever is cut off in between leaves, at worst, a slot that no row names: it is wiped at the next
start (``recovery``). So a slot that describes itself is one that may be held, also when the
catalog is lost and the slab is all there is.

Commits happen in one thread, in the order in which requests come to them, many at a time; all else
in any thread. Does not cover: threads and processes (``worker``).
"""

from collections.abc import Callable, Sequence
from enum import Enum, auto

import numpy as np

from kvstore.fs import Mapped
from kvstore.tiers.nvme.catalog import Catalog, CatalogBroken, Change
from kvstore.tiers.nvme.disk import aligned_bytes
from kvstore.tiers.nvme.record import TOMBSTONE, slot_bytes_of, stored_bytes_of
from kvstore.tiers.nvme.requests import NO_EXTENT, Outcome, Request, RequestKind
from kvstore.tiers.nvme.slab import Slab

ArenaView = Callable[[int, int], Mapped]
"""Bytes of the arena: offset, length."""

_REMOVING = (RequestKind.FREE, RequestKind.ERASE)
_PUTTING = (RequestKind.WRITE, RequestKind.TOUCH)


class Stage(Enum):
    """A step of a request."""

    READ = auto()
    WRITE = auto()
    COMMIT = auto()
    WIPE = auto()
    SYNC = auto()


STAGES: dict[RequestKind, tuple[Stage, ...]] = {
    RequestKind.READ: (Stage.READ,),
    RequestKind.CHECK: (Stage.READ,),
    RequestKind.WRITE: (Stage.WRITE, Stage.COMMIT),
    RequestKind.FREE: (Stage.COMMIT, Stage.WIPE),
    RequestKind.ERASE: (Stage.COMMIT, Stage.WIPE, Stage.SYNC),
    RequestKind.BURY: (Stage.COMMIT, Stage.SYNC),
    RequestKind.TOUCH: (Stage.COMMIT,),
    RequestKind.FORGET: (Stage.COMMIT,),
}
"""What a request goes through; one that fails at a stage ends there."""
GROUPED = (Stage.COMMIT, Stage.SYNC)
"""Stages that cost the same for many requests as for one."""


class Drive:
    """One slab with its catalog."""

    def __init__(self, slab: Slab, catalog: Catalog, arena: ArenaView) -> None:
        self._slab = slab
        self._catalog = catalog
        self._arena = arena
        self.is_broken = False
        """Whether the catalog takes no more commits until it is opened anew."""

    def do(self, stage: Stage, requests: Sequence[Request]) -> list[Outcome]:
        """Do one stage of some requests, of just one unless the stage is ``GROUPED``."""
        try:
            if stage is Stage.COMMIT:
                return self._commit(requests)
            if stage is Stage.SYNC:
                self._slab.disk.sync()
                return [Outcome.DONE] * len(requests)
            return [self._transfer(stage, request) for request in requests]
        except OSError as fault:
            self.is_broken |= isinstance(fault, CatalogBroken)
            return [Outcome.FAILED] * len(requests)

    def close(self) -> None:
        """Let go of slab and catalog."""
        self._catalog.close()
        self._slab.disk.close()

    def _transfer(self, stage: Stage, request: Request) -> Outcome:
        record = request.record
        if stage is Stage.WIPE:
            self._slab.wipe(int(record["offset"]))
            return Outcome.DONE
        length = int(record["length"])
        if request.kind is RequestKind.CHECK:
            memory = aligned_bytes(stored_bytes_of(length))
        else:
            memory = self._arena(request.arena_offset, stored_bytes_of(length))
        if stage is Stage.READ:
            whole = self._slab.read_slot(record, memory)
            return Outcome.DONE if whole else Outcome.DAMAGED
        if request.extent != NO_EXTENT:
            self._slab.write_extent(request.extent, slot_bytes_of(length), request.extent_sequence)
        return Outcome.DONE if self._slab.write_slot(record, memory) else Outcome.DAMAGED

    def _commit(self, requests: Sequence[Request]) -> list[Outcome]:
        """All of them in one transaction, but for writes whose data can't be made durable."""
        lost = False
        if any(request.kind is RequestKind.WRITE for request in requests):
            try:
                self._slab.disk.sync()
            except OSError:
                lost = True
        self._catalog.commit(
            _change([r for r in requests if not (lost and r.kind is RequestKind.WRITE)])
        )
        return [
            Outcome.FAILED if lost and r.kind is RequestKind.WRITE else Outcome.DONE
            for r in requests
        ]


def _change(requests: Sequence[Request]) -> Change:
    return Change(
        puts=[r.record for r in requests if r.kind in _PUTTING],
        removals=[r.record for r in requests if r.kind in _REMOVING],
        tombstones=[tombstone_of(r.record) for r in requests if r.kind is RequestKind.BURY],
        forgotten=[tombstone_of(r.record) for r in requests if r.kind is RequestKind.FORGET],
    )


def tombstone_of(record: np.void) -> np.void:
    """The tombstone that a ``BURY`` request's record stands for."""
    tombstone = np.zeros(1, TOMBSTONE)
    for name, source in (("key", "key"), ("sequence", "sequence"), ("deleted_ms", "stamp")):
        tombstone[name] = record[source]
    found: np.void = tombstone[0]
    return found
