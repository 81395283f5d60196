"""Looking up natively: many cells of a key table in one call.

``KeyTable.find`` says what a look-up is, and does it in numpy where no compiler was at hand when
the package was built. Here is the same in C (``native/probe.c``), about five times as fast:
what a row needs from memory is fetched while other rows are worked on.

Does not cover: the table's form (``kvstore.table``), what is asked for (``kvstore.search``).
"""

import ctypes
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

LIBRARY = Path(__file__).parent / "libprobe.so"
_VERSION = 1
"""``PROBE_VERSION`` of the library that this module can call."""

_Words = npt.NDArray[np.uint64]


class Answers(Protocol):
    """Where the answers go: one contiguous array each, a row for every cell that is asked for."""

    @property
    def held(self) -> npt.NDArray[np.bool_]: ...
    @property
    def slots(self) -> npt.NDArray[np.uint32]: ...
    @property
    def generations(self) -> _Words: ...
    @property
    def offsets(self) -> _Words: ...
    @property
    def lengths(self) -> npt.NDArray[np.uint32]: ...
    @property
    def header_digests(self) -> _Words: ...


class _Table(ctypes.Structure):
    _fields_ = (
        ("tags", ctypes.c_void_p),
        ("entries", ctypes.c_void_p),
        ("records", ctypes.c_void_p),
        ("buckets", ctypes.c_uint64),
        ("slots", ctypes.c_uint64),
    )


class _Found(ctypes.Structure):
    _fields_ = (
        ("held", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("generations", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("lengths", ctypes.c_void_p),
        ("header_digests", ctypes.c_void_p),
    )


class NativeProbe:
    """The compiled look-up for one table, whose mapping must live as long."""

    def __init__(
        self, tags: _Words, entries: npt.NDArray[np.void], records: npt.NDArray[np.void]
    ) -> None:
        assert _library is not None, "ask is_native() first"
        self._find = _library.probe_find
        self._mapped = (tags, entries, records)
        places = (array.ctypes.data for array in self._mapped)
        self._table = _Table(*places, len(tags), len(records))

    def find(
        self, keys: npt.NDArray[np.uint8], cells: npt.NDArray[np.uint8], answers: Answers
    ) -> None:
        """Fill in a row for each of ``keys`` (uint8 ``[n, 32]``) and ``cells`` (uint8 ``[n]``).

        Rows that are not held mean nothing.
        """
        columns = (
            answers.held, answers.slots, answers.generations, answers.offsets, answers.lengths,
            answers.header_digests,
        )  # fmt: skip
        keys, cells = np.ascontiguousarray(keys), np.ascontiguousarray(cells)
        assert keys.shape == (len(cells), 32)
        assert keys.dtype == cells.dtype == np.uint8
        assert all(column.shape == cells.shape for column in columns)
        found = _Found(*(column.ctypes.data for column in columns))
        self._find(
            ctypes.byref(self._table), len(cells), keys.ctypes.data, cells.ctypes.data,
            ctypes.byref(found),
        )  # fmt: skip


def is_native() -> bool:
    """Whether the library was compiled and is one that this module can call."""
    return _library is not None


def load(path: Path) -> ctypes.CDLL | None:
    """The library at ``path``; ``None`` if there is none that this module can call."""
    try:
        library = ctypes.CDLL(str(path))
        version = library.probe_version
    except (OSError, AttributeError):
        return None
    version.restype = ctypes.c_uint64
    if version() != _VERSION:
        return None
    pointer = ctypes.c_void_p
    library.probe_find.argtypes = (pointer, ctypes.c_uint64, pointer, pointer, pointer)
    library.probe_find.restype = None
    return library


_library = load(LIBRARY)
