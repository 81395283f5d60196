"""Leaves, many at a time: moved between payloads and an engine's memory, and hashed on arrival.

    scatter   payload ──copy──> leaves, hashed in the leaves      (a read from an arena)
    gather    leaves ──copy──> payload, hashed in the payload     (a write into an arena)
    digests   leaves, hashed where they lie                       (before a socket)
    receive   socket ──> leaves, hashed in the leaves             (behind a socket)

One call does the leaves of several cells. The native implementation (``native/leaves.c``)
gives up the interpreter lock for all of it, so that two threads really work side by side. It is
compiled where the package is built; where there was no compiler its twin in Python does the same,
slower. Which one it is was settled when this module was imported.

Does not cover: what the digests should be (``kvstore.transport.verify``), who moves what.
"""

import ctypes
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from kvstore.block import Leaf, Seeds, leaf_digest, payload_leaves
from kvstore.leaf_table import PLACE_WORDS, Leaves, Words, starts

FOLDER = Path(__file__).parent
LIBRARY = "libleaves.so"
AVX2_LIBRARY = "libleaves_avx2.so"
_VERSION = 3
"""``LEAF_VERSION`` of the library that this module can call."""
_PACKED, _SEED, _ROW_WORDS = PLACE_WORDS, PLACE_WORDS + 1, PLACE_WORDS + 2
"""A ``leaf`` of the library is a place, where it is packed, and its seed: 64-bit words."""
_TIME_MAX_S = 1e9
"""More does not fit into the library's nanoseconds."""
_Function = Callable[[int, int, int], None]
_RECEIVE_ARGUMENTS = (
    ctypes.c_int, ctypes.c_int64, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint64,
    ctypes.c_void_p, ctypes.c_void_p,
)  # fmt: skip

Digests = tuple[int, ...]
"""One for each leaf, in order."""


class Implementation(Enum):
    """Who does the work."""

    AVX2 = "native code, with AVX2"
    NATIVE = "native code"
    PYTHON = "Python"


@dataclass(frozen=True, slots=True)
class Parcel:
    """One cell's bytes in two places: packed in ``payload``, and apart in ``leaves``."""

    payload: npt.NDArray[np.uint8]
    leaves: Leaves
    seeds: Seeds


@dataclass(frozen=True, slots=True)
class Arrived:
    """What came out of a socket: the digests of the leaves that are whole, from the first on.

    ``fault`` is what kept the others from coming; then the socket is only good for closing.
    """

    digests: Digests
    fault: OSError | None


class Source(Protocol):
    """A connected socket in blocking mode, and until when it may be waited for."""

    def fileno(self) -> int:
        """Its descriptor."""
        ...

    def remaining_s(self) -> float:
        """Seconds until the deadline, never negative."""
        ...

    def receive_into(self, leaf: Leaf) -> None:
        """Fill a leaf; raises ``OSError``."""
        ...


class Mover(Protocol):
    """What an implementation can do."""

    implementation: Implementation

    def scatter(self, parcels: Sequence[Parcel]) -> list[Digests]:
        """Copy payloads into leaves; the digests of what the leaves hold then."""
        ...

    def gather(self, parcels: Sequence[Parcel]) -> list[Digests]:
        """Copy leaves into payloads; the digests of what the payloads hold then."""
        ...

    def digests(self, leaves: Leaves, seeds: Seeds) -> Digests:
        """The digests of leaves where they lie."""
        ...

    def receive(
        self, source: Source, leaves: Leaves, seeds: Seeds, behind_bytes: int = 0
    ) -> Arrived:
        """Fill leaves from a socket, one after the other; the digests of what they hold then.

        ``behind_bytes`` come behind them for certain, and are left there: a receiver who knows of
        much to come may sleep longer.
        """
        ...


class PythonMover:
    """The twin: leaf by leaf, in numpy and xxhash."""

    implementation = Implementation.PYTHON

    def scatter(self, parcels: Sequence[Parcel]) -> list[Digests]:
        return [_moved(_packed(one), one.leaves, one.seeds) for one in parcels]

    def gather(self, parcels: Sequence[Parcel]) -> list[Digests]:
        return [_moved(one.leaves, _packed(one), one.seeds) for one in parcels]

    def digests(self, leaves: Leaves, seeds: Seeds) -> Digests:
        return tuple(
            leaf_digest(leaf, seed) for leaf, seed in zip(leaves, seeds.tolist(), strict=True)
        )

    def receive(
        self, source: Source, leaves: Leaves, seeds: Seeds, behind_bytes: int = 0
    ) -> Arrived:
        found: list[int] = []
        try:
            for leaf, seed in zip(leaves, seeds.tolist(), strict=True):
                source.receive_into(leaf)
                found.append(leaf_digest(leaf, seed))
        except OSError as fault:
            return Arrived(tuple(found), fault)
        return Arrived(tuple(found), None)


class NativeMover:
    """The compiled library. It is given addresses: ``Leaves`` knows that they are good."""

    def __init__(self, library: ctypes.CDLL, implementation: Implementation) -> None:
        self.implementation = implementation
        self._scatter = _function(library, "leaf_scatter")
        self._gather = _function(library, "leaf_gather")
        self._digests = _function(library, "leaf_digests")
        self._receive = library.leaf_receive
        self._receive.argtypes = _RECEIVE_ARGUMENTS

    def scatter(self, parcels: Sequence[Parcel]) -> list[Digests]:
        assert all(one.leaves.is_writeable for one in parcels)
        return _by_parcel(parcels, _called(self._scatter, _moves(parcels)))

    def gather(self, parcels: Sequence[Parcel]) -> list[Digests]:
        assert all(one.payload.flags.writeable for one in parcels)
        return _by_parcel(parcels, _called(self._gather, _moves(parcels)))

    def digests(self, leaves: Leaves, seeds: Seeds) -> Digests:
        return _called(self._digests, _rows([leaves], [seeds]))

    def receive(
        self, source: Source, leaves: Leaves, seeds: Seeds, behind_bytes: int = 0
    ) -> Arrived:
        assert leaves.is_writeable
        rows, found = _rows([leaves], [seeds]), np.empty(len(leaves), np.uint64)
        done = ctypes.c_uint64()
        time_ns = int(min(source.remaining_s(), _TIME_MAX_S) * 1e9)
        error = self._receive(
            source.fileno(), time_ns, rows.ctypes.data, len(found), behind_bytes,
            found.ctypes.data, ctypes.byref(done),
        )  # fmt: skip
        fault = OSError(error, os.strerror(error)) if error else None
        return Arrived(tuple(found[: done.value].tolist()), fault)


def implementation() -> Implementation:
    """Which implementation is in use."""
    return _mover.implementation


def scatter(parcels: Sequence[Parcel]) -> list[Digests]:
    """Copy payloads into leaves; the digests of what the leaves hold then."""
    return _mover.scatter(parcels)


def gather(parcels: Sequence[Parcel]) -> list[Digests]:
    """Copy leaves into payloads; the digests of what the payloads hold then."""
    return _mover.gather(parcels)


def digests(leaves: Leaves, seeds: Seeds) -> Digests:
    """The digests of leaves where they lie."""
    return _mover.digests(leaves, seeds)


def receive(source: Source, leaves: Leaves, seeds: Seeds, behind_bytes: int = 0) -> Arrived:
    """Fill leaves from a socket, one after the other; the digests of what they hold then.

    ``behind_bytes`` come behind them for certain, and are left there.
    """
    return _mover.receive(source, leaves, seeds, behind_bytes)


def _packed(parcel: Parcel) -> list[Leaf]:
    return payload_leaves(parcel.payload, [leaf.shape for leaf in parcel.leaves])


def _moved(sources: Iterable[Leaf], targets: Iterable[Leaf], seeds: Seeds) -> Digests:
    found = []
    for source, target, seed in zip(sources, targets, seeds.tolist(), strict=True):
        np.copyto(target, source)
        found.append(leaf_digest(target, seed))
    return tuple(found)


def _moves(parcels: Sequence[Parcel]) -> Words:
    """A row for every leaf: where it lies, and where it is packed."""
    rows = _rows([one.leaves for one in parcels], [one.seeds for one in parcels])
    start = 0
    for one in parcels:
        stop, sizes = start + len(one.leaves), one.leaves.sizes
        assert one.payload.flags.c_contiguous
        assert sizes.sum() == one.payload.nbytes, "payload and leaves disagree"
        rows[start:stop, _PACKED] = one.payload.ctypes.data + starts(sizes)
        start = stop
    return rows


def _rows(leaves: Sequence[Leaves], seeds: Sequence[Seeds]) -> Words:
    """What the library is told of leaves, except where they are packed."""
    rows = np.empty((sum(len(some) for some in leaves), _ROW_WORDS), np.uint64)
    if len(rows):
        np.concatenate([some.places for some in leaves], out=rows[:, :PLACE_WORDS])
        np.concatenate(seeds, out=rows[:, _SEED])
    return rows


def _function(library: ctypes.CDLL, name: str) -> _Function:
    function: Any = getattr(library, name)
    function.argtypes = (ctypes.c_void_p, ctypes.c_uint64, ctypes.c_void_p)
    function.restype = None
    typed: _Function = function
    return typed


def _called(function: _Function, rows: Words) -> Digests:
    """What the library answers to rows; whoever calls keeps alive what they point to."""
    found = np.empty(len(rows), np.uint64)
    function(rows.ctypes.data, len(found), found.ctypes.data)
    return tuple(found.tolist())


def _by_parcel(parcels: Sequence[Parcel], found: Digests) -> list[Digests]:
    stops = accumulate((len(one.leaves) for one in parcels), initial=0)
    return [found[start:stop] for start, stop in pairwise(stops)]


def _library(name: str) -> ctypes.CDLL | None:
    """A compiled library, ``None`` if there is none that this module can call."""
    try:
        library = ctypes.CDLL(str(FOLDER / name))
        return library if library.leaf_version() == _VERSION else None
    except (OSError, AttributeError):
        return None


def movers() -> list[Mover]:
    """All that this machine can use, the fastest first."""
    found: list[Mover] = [PythonMover()]
    library = _library(LIBRARY)
    if library is None:
        return found
    found.insert(0, NativeMover(library, Implementation.NATIVE))
    wide = _library(AVX2_LIBRARY) if library.leaf_has_avx2() else None
    if wide is not None:
        found.insert(0, NativeMover(wide, Implementation.AVX2))
    return found


_mover = movers()[0]
