"""Owed deletes: those that were buried while the node's disk was refused, or not configured.

    delete ──> nobody finds what is on the disk, until a restart at least ──> owed ──> buried
    restart ──> the disk is told before anybody finds something ──> it is done: nothing is owed

Such a disk may come back, with the right version or settings, and burials say that a delete is done
here. What it is owed is durable, and lasts as long as burials do.

Does not cover: a disk that is only away (``kvstore.deletes`` waits for it).
"""

import logging
from collections.abc import Mapping

from kvstore.burial_log import BurialLog
from kvstore.burials import Burial, BurialBook
from kvstore.key import as_keys
from kvstore.lasting import Lasting
from kvstore.tiers.behind import Behind, Erasure

log = logging.getLogger(__name__)

OWED_FILE = "owed"


class OwedDeletes:
    """What one node's disk has still to hear of."""

    def __init__(self, behind: Behind, lasting: Lasting, wall_ms: int) -> None:
        self._lasting = lasting
        self._wall_ms = wall_ms
        self._behind = behind
        self._payment: Erasure | None = None
        """``None`` when there is nothing to pay before the next start."""
        self._open()
        self._pay()

    @property
    def is_read(self) -> bool:
        """Whether it is known what the disk is owed."""
        return self._log.is_read

    def mend(self) -> None:
        """Read what could not be read, and have the disk told then."""
        if not self.is_read and self._log.mend():
            self._pay()

    def add(self, burials: Mapping[bytes, Burial], wall_ms: int) -> bool:
        """Whether it is durable that these are owed; ask again if not."""
        self._payment = None
        fresh = [one for one in burials.items() if self._book.enter(*one)]
        self._book.forget_outdated(wall_ms)
        return self._log.append(fresh)

    def step(self) -> None:
        """Once the disk has forgotten all that it was owed at the start, nothing is."""
        if self._payment is None or not self._payment.is_done:
            return
        try:
            self._lasting.files.replace(self._lasting.folder / OWED_FILE, b"")
        except OSError as fault:
            log.warning("%s could not be emptied, it is tried again: %s", OWED_FILE, fault)
            return
        self._payment = None
        self._open()

    def _pay(self) -> None:
        keys = as_keys(b"".join(key for key, _ in self._book.items()))
        self._payment = self._behind.erase(keys) if len(keys) else None

    def _open(self) -> None:
        self._book = BurialBook()
        files, folder = self._lasting.files, self._lasting.folder
        self._log = BurialLog(files, folder, self._book, self._wall_ms, OWED_FILE)
