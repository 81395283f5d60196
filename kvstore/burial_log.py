"""The burial log: a node's burials on disk, one row for each, in the order in which it heard.

    row, 56 bytes   key, id, when (wall time), checksum

The checksum is XXH3-64 of the rest, seeded by the version. A row is durable when ``append``
answers so. A row that does not verify is passed over: what a crash tore was not answered. The row
of key 0 says up to which id burials were forgotten. A log that is mostly outdated is written anew,
and so is one into which a write failed, at the next chance. As long as a log can't be read it is
not written over, and nothing more is durable.

Does not cover: which burials are kept (``kvstore.burials``).
"""

import logging
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np
from xxhash import xxh3_64_intdigest

from kvstore.burials import Burial, BurialBook
from kvstore.fs import DurableFiles
from kvstore.key import KEY_BYTES

log = logging.getLogger(__name__)

BURIAL_LOG_FILE = "burials"
ROW = np.dtype([("key", f"V{KEY_BYTES}"), ("id", "<u8"), ("when_ms", "<u8"), ("checksum", "<u8")])
OUTDATED_ROWS_MAX = 4096
"""So many more rows than burials may there be, and as many again as there are burials."""
_VERSION = 1
_FLOOR_KEY = bytes(KEY_BYTES)
assert ROW.itemsize == 56


class BurialLog:
    """The file beside a book, which it fills at the start."""

    def __init__(
        self,
        files: DurableFiles,
        folder: Path,
        book: BurialBook,
        wall_ms: int,
        name: str = BURIAL_LOG_FILE,
    ) -> None:
        self._files = files
        self._path = folder / name
        self._book = book
        self._start_ms = wall_ms
        self._rows = 0
        self._is_whole = True
        self.is_read = True
        """Whether what is in the file is in the book. ``mend`` reads it where it could not be."""
        try:
            self._read()
        except OSError as fault:
            self.is_read = self._is_whole = False
            log.warning(
                "%s can't be read, which says what was deleted: until it can, nothing is shown or "
                "stored here: %s",
                self._path,
                fault,
            )
        self._tidy()

    def append(self, burials: Iterable[tuple[bytes, Burial]]) -> bool:
        """Make burials durable that have just been entered into the book.

        ``False``: the disk refused, they are tried again by ``mend``.
        """
        rows = [_row(key, burial) for key, burial in burials]
        if self._is_whole and rows:
            try:
                self._files.append(self._path, b"".join(rows))
            except OSError as fault:
                log.warning("deletes could not be logged, they are tried again: %s", fault)
                self._is_whole = False
            self._rows += len(rows)
        self._tidy()
        return self._is_whole

    def mend(self) -> bool:
        """Read what could not be read, write what could not be written; whether all is durable."""
        if not self.is_read:
            with suppress(OSError):  # it was said at the start
                self._read()
                self.is_read = True
                log.warning("%s could be read", self._path)
            self._is_whole = False  # what was heard meanwhile is not in it
        self._tidy()
        return self._is_whole

    def _tidy(self) -> None:
        is_tidy = self._rows <= 2 * len(self._book) + OUTDATED_ROWS_MAX
        if not self.is_read or (self._is_whole and is_tidy):
            return
        rows = [_row(key, burial) for key, burial in reversed(self._book.items())]
        if self._book.floor:
            rows.insert(0, _row(_FLOOR_KEY, Burial(self._book.floor, 0)))
        try:
            self._files.replace(self._path, b"".join(rows))
        except OSError:
            self._is_whole = False
            return
        if not self._is_whole:
            log.warning("all deletes are logged again")
        self._is_whole, self._rows = True, len(rows)

    def _read(self) -> None:
        """Enter what the file says into the book."""
        data = self._files.read(self._path) or b""
        whole = len(data) - len(data) % ROW.itemsize
        rows = [data[at : at + ROW.itemsize] for at in range(0, whole, ROW.itemsize)]
        for packed in rows:
            row = np.frombuffer(packed, ROW)[0]
            if int(row["checksum"]) != _checksum(packed):
                self._is_whole = False
            elif (key := bytes(row["key"])) == _FLOOR_KEY:
                self._book.raise_floor(int(row["id"]))
            else:
                # A clock that was set back makes nobody's burial last longer.
                when_ms = min(int(row["when_ms"]), self._start_ms)
                self._book.enter(key, Burial(int(row["id"]), when_ms))
        self._rows = len(rows)
        self._is_whole = self._is_whole and whole == len(data)
        if not self._is_whole:
            log.warning("%s was torn: %d deletes in it are whole", self._path, len(self._book))
        self._book.forget_outdated(self._start_ms)


def _row(key: bytes, burial: Burial) -> bytes:
    row = np.zeros((), ROW)
    row["key"] = np.void(key)
    row["id"] = burial.id
    row["when_ms"] = burial.when_ms
    row["checksum"] = _checksum(row.tobytes())
    return row.tobytes()


def _checksum(row: bytes) -> int:
    return xxh3_64_intdigest(row[: ROW.itemsize - 8], seed=_VERSION)
