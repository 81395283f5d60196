"""The catalog: which cells the slab holds for certain, in LMDB.

    key                        value
    "m"                        identity (``kvstore.tiers.nvme.identity``)
    "n"                        number of the transaction that wrote last
    "c" + block key + cell     record, 96 bytes, and its checksum
    "t" + block key            tombstone, 48 bytes, and its checksum

A row is written only after the slot that it names is durable. Commits are synchronous, and never
through a writable map, in which a full file system is a crash. A checksum is XXH3-64 of key and
value, seeded by the slab's id: LMDB itself notices few flipped bits, and a damaged page can end
the process that reads it, so a catalog is read for the first time in a throw-away child (``walk``).

LMDB keeps two roots and takes the one with the larger number, so a bit flipped there can show an
older state, in which every checksum is right. So the two numbers must be neighbours, and the tree
must say which of them it is.

Does not cover: what becomes of a damaged catalog (``recovery``).
"""

import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import lmdb
import numpy as np
from xxhash import xxh3_64_intdigest

from kvstore.tiers.nvme.identity import IDENTITY_BYTES, Identity
from kvstore.tiers.nvme.record import RECORD, TOMBSTONE, Records, Tombstones, key_bytes

DATA_FILE = "data.mdb"
"""The one file that LMDB makes in the catalog's folder."""
_META = b"m"
_NUMBER = b"n"
_CELL = b"c"
_TOMBSTONE = b"t"
_CHECKSUM = struct.Struct("<Q")
_ROOT_NUMBER_START = 144
"""Where a root page of LMDB 0.9 has its transaction's number."""
_BYTES_PER_CELL = 1024
"""Upper bound of what LMDB takes for a row, with pages that are copied while it is written."""
_SPARE_BYTES = 64 << 20


class CatalogDamage(Exception):
    """The catalog can't be believed; the message says what is wrong with it."""


class CatalogFault(OSError):
    """A commit failed; nothing of it happened."""


class CatalogBroken(CatalogFault):
    """LMDB takes no more commits in this process."""


@dataclass(frozen=True, slots=True)
class Content:
    """What a catalog says."""

    identity: bytes
    records: Records
    tombstones: Tombstones


@dataclass(frozen=True, slots=True)
class Change:
    """Rows that come and go together, in this order."""

    puts: Sequence[np.void] = ()
    removals: Sequence[np.void] = ()
    """Each is removed only if it is still the row that is there: a later write of the same cell
    has another sequence, and stays."""
    tombstones: Sequence[np.void] = ()
    forgotten: Sequence[np.void] = ()


NOTHING = Change()


class Catalog(Protocol):
    """Where rows are made durable. Used by one thread."""

    def commit(self, change: Change) -> None:
        """All of it or nothing, durable when it returns; ``OSError`` says that nothing happened."""
        ...

    def close(self) -> None:
        """Let go of the files."""
        ...


class LmdbCatalog:
    """The real one."""

    def __init__(self, folder: Path, slab_id: bytes, cells_max: int) -> None:
        self._seed = _seed(slab_id)
        self._env = _open(folder, cells_max)

    @classmethod
    def open(
        cls, folder: Path, identity: Identity, cells_max: int, change: Change = NOTHING
    ) -> "LmdbCatalog":
        """The catalog of that slab, which the caller has found whole, or an empty one.

        Its identity and ``change`` are entered together: there is no state with only one of them.
        """
        catalog = cls(folder, identity.slab_id, cells_max)
        with _writing(catalog._env) as transaction:
            transaction.put(_META, identity.pack())
            catalog._enter(transaction, change)
        return catalog

    def commit(self, change: Change) -> None:
        with _writing(self._env) as transaction:
            self._enter(transaction, change)

    def close(self) -> None:
        self._env.close()

    def _enter(self, transaction: lmdb.Transaction, change: Change) -> None:
        transaction.put(_NUMBER, _CHECKSUM.pack(transaction.id()))
        for record in change.puts:
            self._put(transaction, _cell_name(record), record.tobytes())
        for record in change.removals:
            name = _cell_name(record)
            found = transaction.get(name)
            if found is not None and _sequence_of(bytes(found)) == int(record["sequence"]):
                transaction.delete(name)
        for tombstone in change.forgotten:
            transaction.delete(_TOMBSTONE + key_bytes(tombstone))
        for tombstone in change.tombstones:
            self._put(transaction, _TOMBSTONE + key_bytes(tombstone), tombstone.tobytes())

    def _put(self, transaction: lmdb.Transaction, name: bytes, value: bytes) -> None:
        checksum = _CHECKSUM.pack(xxh3_64_intdigest(name + value, seed=self._seed))
        transaction.put(name, value + checksum)


@contextmanager
def _writing(env: lmdb.Environment) -> Iterator[lmdb.Transaction]:
    """A write transaction whose failures are ``CatalogFault``."""
    try:
        with env.begin(write=True) as transaction:
            yield transaction
    except lmdb.PanicError as fault:
        raise CatalogBroken(f"the catalog is broken: {fault}") from fault
    except lmdb.Error as fault:
        raise CatalogFault(f"the catalog could not be written: {fault}") from fault


def read_catalog(folder: Path) -> Content:
    """Everything that a catalog says, every checksum verified.

    Raises ``CatalogDamage``. May end the process with a signal on a damaged file.
    """
    try:
        with lmdb.open(str(folder), readonly=True, lock=False, max_dbs=0) as env:
            content = _content(env)
            _check_roots(folder, int(env.stat()["psize"]))
            return content
    except (lmdb.Error, UnicodeError, struct.error) as fault:
        raise CatalogDamage(f"LMDB refuses it: {fault}") from fault


def _content(env: lmdb.Environment) -> Content:
    with env.begin() as transaction:
        identity = bytes(transaction.get(_META, b""))
        if len(identity) != IDENTITY_BYTES:
            raise CatalogDamage("it has no identity")
        if transaction.get(_NUMBER) != _CHECKSUM.pack(env.info()["last_txnid"]):
            raise CatalogDamage("its root leads to an older state")
        # The same bytes as in ``Identity.pack``; whose they are is looked at by the caller.
        seed = _seed(identity[24:40])
        cells = b"".join(_values(transaction, _CELL, RECORD.itemsize, seed))
        tombstones = b"".join(_values(transaction, _TOMBSTONE, TOMBSTONE.itemsize, seed))
        rows = transaction.stat()["entries"]
    records = np.frombuffer(cells, RECORD)
    buried = np.frombuffer(tombstones, TOMBSTONE)
    if 2 + len(records) + len(buried) != rows:
        raise CatalogDamage("it has rows that nobody wrote, or lacks some that it counts")
    return Content(identity, records, buried)


def _check_roots(folder: Path, page_bytes: int) -> None:
    """The two roots must be those of the last two transactions, and both trees must say so.

    The older tree is looked at in a copy in which the newer root counts for nothing. The copy is
    in memory: for want of disk space a catalog is not damaged.
    """
    image = bytearray((folder / DATA_FILE).read_bytes())
    starts = (_ROOT_NUMBER_START, page_bytes + _ROOT_NUMBER_START)
    numbers = [int.from_bytes(image[at : at + 8], "little") for at in starts]
    if abs(numbers[0] - numbers[1]) != 1:
        raise CatalogDamage("its two roots are not those of the last two transactions")
    older = _CHECKSUM.pack(min(numbers)) if min(numbers) else None  # LMDB's own first, empty
    newer = starts[numbers.index(max(numbers))]
    image[newer : newer + 8] = bytes(8)
    with os.fdopen(os.memfd_create("catalog"), "wb") as copy:
        copy.write(image)
        copy.flush()
        path = f"/proc/self/fd/{copy.fileno()}"
        with (
            lmdb.open(path, subdir=False, readonly=True, lock=False, max_dbs=0) as env,
            env.begin() as before,
        ):
            if before.get(_NUMBER) != older:
                raise CatalogDamage("its two roots are not those of the last two transactions")


def _values(
    transaction: lmdb.Transaction, prefix: bytes, size_bytes: int, seed: int
) -> Iterator[bytes]:
    """The values of one kind of rows, verified."""
    with transaction.cursor() as cursor:
        if not cursor.set_range(prefix):
            return
        for packed_name, packed in cursor:
            name, value = bytes(packed_name), bytes(packed)
            if name[:1] != prefix:
                return
            body = value[:size_bytes]
            checksum = _CHECKSUM.pack(xxh3_64_intdigest(name + body, seed=seed))
            if value[size_bytes:] != checksum or name[1:33] != body[:32]:
                raise CatalogDamage("a row does not match its checksum")
            yield body


def _open(folder: Path, cells_max: int) -> lmdb.Environment:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        return lmdb.open(
            str(folder),
            map_size=cells_max * _BYTES_PER_CELL + _SPARE_BYTES,
            sync=True,
            metasync=True,
            writemap=False,
            readahead=False,
            lock=False,  # the node's folder has one owner, and one thread of it comes here
            max_dbs=0,
            mode=0o600,
        )
    except lmdb.Error as fault:
        raise CatalogFault(f"the catalog in {folder} can't be opened: {fault}") from fault


def _seed(slab_id: bytes) -> int:
    return int.from_bytes(slab_id[8:16], "little")


def _cell_name(record: np.void) -> bytes:
    return _CELL + key_bytes(record) + bytes([int(record["cell"])])


def _sequence_of(value: bytes) -> int:
    """The sequence of a packed record."""
    record: np.void = np.frombuffer(value[: RECORD.itemsize], RECORD)[0]
    return int(record["sequence"])
