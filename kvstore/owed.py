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
from kvstore.lasting import Lasting
from kvstore.tiers.behind import Behind, as_keys

log = logging.getLogger(__name__)

OWED_FILE = "owed"


class OwedDeletes:
    """What one node's disk has still to hear of."""

    def __init__(self, behind: Behind, lasting: Lasting, wall_ms: int) -> None:
        self._lasting = lasting
        self._wall_ms = wall_ms
        self._open()
        keys = as_keys(b"".join(key for key, _ in self._book.items()))
        self._payment = behind.erase(keys) if len(keys) else None
        """``None`` when there is nothing to pay before the next start."""

    def add(self, burials: Mapping[bytes, Burial]) -> bool:
        """Whether it is durable that these are owed; ask again if not."""
        self._payment = None
        return self._log.append([one for one in burials.items() if self._book.enter(*one)])

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

    def _open(self) -> None:
        self._book = BurialBook()
        files, folder = self._lasting.files, self._lasting.folder
        self._log = BurialLog(files, folder, self._book, self._wall_ms, OWED_FILE)
