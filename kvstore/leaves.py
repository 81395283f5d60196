"""Leaves, many at a time: moved between payloads and an engine's memory, and hashed on arrival.

    scattering   payload ──copy──> leaves, the copy hashed           (a read from an arena)
    gathering    leaves ──copy──> payload, the copy hashed           (a write into an arena)
    digests      leaves, hashed where they lie                       (before a socket)
    receive      socket ──> leaves, hashed on the way                (behind a socket)

One call does the leaves of many cells. The native implementation (``native/leaves.c``) gives up the
interpreter lock for all of it, so that threads really work side by side. It is compiled where the
package is built; where there was no compiler its twin in Python does the same, slower. Which one it
is was settled when this module was imported.

What is to be copied is prepared for all cells before the first of them is, and nothing is left to
do in Python between two of them: whatever passes through the processor's caches in the meantime
makes that several times as slow.

Does not cover: what the digests should be (``kvstore.transport.verify``), who moves what.
"""

import ctypes
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from kvstore.block import Leaf, Seeds, leaf_digest, payload_leaves
from kvstore.leaf_table import HEAD_BYTES, HEADS, PLACE_WORDS, Leaves, Words, starts

FOLDER = Path(__file__).parent
LIBRARY = "libleaves.so"
FAR_BYTES = 8 << 20
"""So much does not stay in a processor's own caches until somebody reads it."""
_VERSION = 4
"""``LEAF_VERSION`` of the library that this module can call."""
_PACKED, _SEED, _ROW_WORDS = PLACE_WORDS, PLACE_WORDS + 1, PLACE_WORDS + 2
"""A ``leaf`` of the library is a place, where it is packed, and its seed: 64-bit words."""
_WORD_BYTES = 8
_TIME_MAX_S = 1e9
"""More does not fit into the library's nanoseconds."""
_Move = Callable[[int, int, int, bool], None]
_Digest = Callable[[int, int, int], None]
_DIGEST_ARGUMENTS = (ctypes.c_void_p, ctypes.c_uint64, ctypes.c_void_p)
_MOVE_ARGUMENTS = (*_DIGEST_ARGUMENTS, ctypes.c_int)
_RECEIVE_ARGUMENTS = (
    ctypes.c_int, ctypes.c_int64, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_void_p,
    ctypes.c_void_p, ctypes.c_int,
)  # fmt: skip

Digests = tuple[int, ...]
"""One for each leaf, in order."""


class Implementation(Enum):
    """Who does the work."""

    AVX512 = "native code, with AVX-512"
    AVX2 = "native code, with AVX2"
    NATIVE = "native code"
    PYTHON = "Python"


WIDE_LIBRARIES = {
    Implementation.AVX2: "libleaves_avx2.so",
    Implementation.AVX512: "libleaves_avx512.so",
}


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


class Moving(Protocol):
    """The leaves of several parcels, ready to be copied, in any order and by any threads."""

    @property
    def sizes(self) -> Words:
        """Bytes of each leaf."""
        ...

    @property
    def digests(self) -> npt.NDArray[np.uint64]:
        """Of the copies; of leaves that were not moved anything."""
        ...

    def move(self, part: slice) -> None:
        """Copy leaves [start, stop), and take their digests."""
        ...


class Mover(Protocol):
    """What an implementation can do."""

    implementation: Implementation

    def scattering(self, parcels: Sequence[Parcel]) -> Moving:
        """Payloads, to be copied into leaves, the copies hashed."""
        ...

    def gathering(self, parcels: Sequence[Parcel]) -> Moving:
        """Leaves, to be copied into payloads, the copies hashed."""
        ...

    def digests(self, leaves: Leaves, seeds: Seeds) -> Digests:
        """The digests of leaves where they lie."""
        ...

    def receive(self, source: Source, leaves: Leaves, seeds: Seeds) -> Arrived:
        """Fill leaves from a socket, one after the other; the digests of what came."""
        ...


class PythonMoving:
    """Leaves to be copied by numpy."""

    def __init__(
        self, sources: Sequence[Leaf], targets: Sequence[Leaf], seeds: Sequence[int]
    ) -> None:
        self._leaves = list(zip(sources, targets, seeds, strict=True))
        self.sizes = np.array([leaf.nbytes for leaf in targets], np.uint64)
        self.digests = np.zeros(len(targets), np.uint64)

    def move(self, part: slice) -> None:
        for number, (source, target, seed) in enumerate(self._leaves[part], part.start):
            np.copyto(target, source)
            self.digests[number] = leaf_digest(target, seed)


class NativeMoving:
    """Leaves to be copied by the library: it is given a table of addresses."""

    def __init__(self, function: _Move, parcels: Sequence[Parcel]) -> None:
        self._function = function
        self._alive = parcels
        self._rows = _moves(parcels)
        self.sizes = _sizes(self._rows)
        self._is_far = _is_far(self._rows)
        self.digests = np.zeros(len(self._rows), np.uint64)
        self._rows_at, self._digests_at = self._rows.ctypes.data, self.digests.ctypes.data

    def move(self, part: slice) -> None:
        start, stop = part.start, part.stop
        assert 0 <= start <= stop <= len(self.digests)
        self._function(
            self._rows_at + start * _ROW_WORDS * _WORD_BYTES,
            stop - start,
            self._digests_at + start * _WORD_BYTES,
            self._is_far,
        )


class PythonMover:
    """The twin: leaf by leaf, in numpy and xxhash."""

    implementation = Implementation.PYTHON

    def scattering(self, parcels: Sequence[Parcel]) -> Moving:
        return PythonMoving(
            sources=[leaf for one in parcels for leaf in _packed(one)],
            targets=[leaf for one in parcels for leaf in one.leaves],
            seeds=[seed for one in parcels for seed in one.seeds.tolist()],
        )

    def gathering(self, parcels: Sequence[Parcel]) -> Moving:
        return PythonMoving(
            sources=[leaf for one in parcels for leaf in one.leaves],
            targets=[leaf for one in parcels for leaf in _packed(one)],
            seeds=[seed for one in parcels for seed in one.seeds.tolist()],
        )

    def digests(self, leaves: Leaves, seeds: Seeds) -> Digests:
        return tuple(
            leaf_digest(leaf, seed) for leaf, seed in zip(leaves, seeds.tolist(), strict=True)
        )

    def receive(self, source: Source, leaves: Leaves, seeds: Seeds) -> Arrived:
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
        self._scatter: _Move = _function(library, "leaf_scatter", _MOVE_ARGUMENTS)
        self._gather: _Move = _function(library, "leaf_gather", _MOVE_ARGUMENTS)
        self._digests: _Digest = _function(library, "leaf_digests", _DIGEST_ARGUMENTS)
        self._receive = library.leaf_receive
        self._receive.argtypes = _RECEIVE_ARGUMENTS

    def scattering(self, parcels: Sequence[Parcel]) -> Moving:
        assert all(one.leaves.is_writeable for one in parcels)
        return NativeMoving(self._scatter, parcels)

    def gathering(self, parcels: Sequence[Parcel]) -> Moving:
        assert all(one.payload.flags.writeable for one in parcels)
        return NativeMoving(self._gather, parcels)

    def digests(self, leaves: Leaves, seeds: Seeds) -> Digests:
        return _called(self._digests, _rows([leaves], [seeds]))

    def receive(self, source: Source, leaves: Leaves, seeds: Seeds) -> Arrived:
        assert leaves.is_writeable
        rows, found = _rows([leaves], [seeds]), np.empty(len(leaves), np.uint64)
        done = ctypes.c_uint64()
        time_ns = int(min(source.remaining_s(), _TIME_MAX_S) * 1e9)
        error = self._receive(
            source.fileno(), time_ns, rows.ctypes.data, len(found), found.ctypes.data,
            ctypes.byref(done), _is_far(rows),
        )  # fmt: skip
        fault = OSError(error, os.strerror(error)) if error else None
        return Arrived(tuple(found[: done.value].tolist()), fault)


def implementation() -> Implementation:
    """Which implementation is in use."""
    return _mover.implementation


def scattering(parcels: Sequence[Parcel]) -> Moving:
    """Payloads, to be copied into leaves, the copies hashed."""
    return _mover.scattering(parcels)


def gathering(parcels: Sequence[Parcel]) -> Moving:
    """Leaves, to be copied into payloads, the copies hashed."""
    return _mover.gathering(parcels)


def digests(leaves: Leaves, seeds: Seeds) -> Digests:
    """The digests of leaves where they lie."""
    return _mover.digests(leaves, seeds)


def receive(source: Source, leaves: Leaves, seeds: Seeds) -> Arrived:
    """Fill leaves from a socket, one after the other; the digests of what came."""
    return _mover.receive(source, leaves, seeds)


def _packed(parcel: Parcel) -> list[Leaf]:
    return payload_leaves(parcel.payload, [leaf.shape for leaf in parcel.leaves])


def _moves(parcels: Sequence[Parcel]) -> Words:
    """A row for every leaf: where it lies, and where it is packed."""
    rows = _rows([one.leaves for one in parcels], [one.seeds for one in parcels])
    if not parcels:
        return rows
    assert all(one.payload.flags.c_contiguous for one in parcels)
    counts = [len(one.leaves) for one in parcels]
    firsts = np.cumsum([0, *counts[:-1]])
    sizes = _sizes(rows)
    packed_bytes = np.add.reduceat(sizes, firsts)
    assert packed_bytes.tolist() == [one.payload.nbytes for one in parcels], (
        "payload and leaves disagree"
    )
    behind = starts(sizes)
    payloads = np.array([one.payload.ctypes.data for one in parcels], np.uint64)
    rows[:, _PACKED] = np.repeat(payloads - behind[firsts], counts) + behind
    return rows


def _sizes(rows: Words) -> Words:
    sizes: Words = rows[:, HEADS] * rows[:, HEAD_BYTES]
    return sizes


def _is_far(rows: Words) -> bool:
    return int(_sizes(rows).sum()) >= FAR_BYTES


def _rows(leaves: Sequence[Leaves], seeds: Sequence[Seeds]) -> Words:
    """What the library is told of leaves, except where they are packed."""
    rows = np.empty((sum(len(some) for some in leaves), _ROW_WORDS), np.uint64)
    if len(rows):
        np.concatenate([some.places for some in leaves], out=rows[:, :PLACE_WORDS])
        np.concatenate(seeds, out=rows[:, _SEED])
    return rows


def _function(library: ctypes.CDLL, name: str, arguments: Sequence[Any]) -> Any:
    function = getattr(library, name)
    function.argtypes = arguments
    function.restype = None
    return function


def _called(function: _Digest, rows: Words) -> Digests:
    """What the library answers to rows; whoever calls keeps alive what they point to."""
    found = np.empty(len(rows), np.uint64)
    function(rows.ctypes.data, len(found), found.ctypes.data)
    return tuple(found.tolist())


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
    usable = {
        Implementation.AVX2: library.leaf_has_avx2(),
        Implementation.AVX512: library.leaf_has_avx512(),
    }
    for implementation, name in WIDE_LIBRARIES.items():
        wide = _library(name) if usable[implementation] else None
        if wide is not None:
            found.insert(0, NativeMover(wide, implementation))
    return found


_mover = movers()[0]
