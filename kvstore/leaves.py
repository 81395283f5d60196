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
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from kvstore.block import Leaf, leaf_digest, payload_leaves

FOLDER = Path(__file__).parent
LIBRARY = "libleaves.so"
AVX2_LIBRARY = "libleaves_avx2.so"
_VERSION = 2
"""``LEAF_VERSION`` of the library that this module can call."""
_ROW_WORDS = 6
"""A ``leaf`` of the library is so many 64-bit words."""
_U64_MASK = (1 << 64) - 1
_TIME_MAX_S = 1e9
"""More does not fit into the library's nanoseconds."""
_Function = Callable[[int, int, int], None]
_RECEIVE_ARGUMENTS = (
    ctypes.c_int, ctypes.c_int64, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_void_p,
    ctypes.c_void_p,
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
    leaves: Sequence[Leaf]
    seeds: Sequence[int]


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

    def digests(self, leaves: Sequence[Leaf], seeds: Sequence[int]) -> Digests:
        """The digests of leaves where they lie."""
        ...

    def receive(self, source: Source, leaves: Sequence[Leaf], seeds: Sequence[int]) -> Arrived:
        """Fill leaves from a socket, one after the other; the digests of what they hold then."""
        ...


class PythonMover:
    """The twin: leaf by leaf, in numpy and xxhash."""

    implementation = Implementation.PYTHON

    def scatter(self, parcels: Sequence[Parcel]) -> list[Digests]:
        return [_moved(_packed(one), one.leaves, one.seeds) for one in parcels]

    def gather(self, parcels: Sequence[Parcel]) -> list[Digests]:
        return [_moved(one.leaves, _packed(one), one.seeds) for one in parcels]

    def digests(self, leaves: Sequence[Leaf], seeds: Sequence[int]) -> Digests:
        return tuple(leaf_digest(leaf, seed) for leaf, seed in zip(leaves, seeds, strict=True))

    def receive(self, source: Source, leaves: Sequence[Leaf], seeds: Sequence[int]) -> Arrived:
        found: list[int] = []
        try:
            for leaf, seed in zip(leaves, seeds, strict=True):
                source.receive_into(leaf)
                found.append(leaf_digest(leaf, seed))
        except OSError as fault:
            return Arrived(tuple(found), fault)
        return Arrived(tuple(found), None)


class NativeMover:
    """The compiled library. It is given addresses, so every bound is kept here."""

    def __init__(self, library: ctypes.CDLL, implementation: Implementation) -> None:
        self.implementation = implementation
        self._scatter = _function(library, "leaf_scatter")
        self._gather = _function(library, "leaf_gather")
        self._digests = _function(library, "leaf_digests")
        self._receive = library.leaf_receive
        self._receive.argtypes = _RECEIVE_ARGUMENTS

    def scatter(self, parcels: Sequence[Parcel]) -> list[Digests]:
        assert all(leaf.flags.writeable for one in parcels for leaf in one.leaves)
        return _by_parcel(parcels, _called(self._scatter, _moves(parcels)))

    def gather(self, parcels: Sequence[Parcel]) -> list[Digests]:
        assert all(one.payload.flags.writeable for one in parcels)
        return _by_parcel(parcels, _called(self._gather, _moves(parcels)))

    def digests(self, leaves: Sequence[Leaf], seeds: Sequence[int]) -> Digests:
        rows = array("Q")
        _append(rows, leaves, seeds, packed=0)
        return _called(self._digests, rows)

    def receive(self, source: Source, leaves: Sequence[Leaf], seeds: Sequence[int]) -> Arrived:
        assert all(leaf.flags.writeable for leaf in leaves)
        rows = array("Q")
        _append(rows, leaves, seeds, packed=0)
        found = array("Q", bytes(len(leaves) * rows.itemsize))
        done = ctypes.c_uint64()
        time_ns = int(min(source.remaining_s(), _TIME_MAX_S) * 1e9)
        error = self._receive(
            source.fileno(), time_ns, rows.buffer_info()[0], len(found), found.buffer_info()[0],
            ctypes.byref(done),
        )  # fmt: skip
        fault = OSError(error, os.strerror(error)) if error else None
        return Arrived(tuple(found[: done.value]), fault)


def implementation() -> Implementation:
    """Which implementation is in use."""
    return _mover.implementation


def scatter(parcels: Sequence[Parcel]) -> list[Digests]:
    """Copy payloads into leaves; the digests of what the leaves hold then."""
    return _mover.scatter(parcels)


def gather(parcels: Sequence[Parcel]) -> list[Digests]:
    """Copy leaves into payloads; the digests of what the payloads hold then."""
    return _mover.gather(parcels)


def digests(leaves: Sequence[Leaf], seeds: Sequence[int]) -> Digests:
    """The digests of leaves where they lie."""
    return _mover.digests(leaves, seeds)


def receive(source: Source, leaves: Sequence[Leaf], seeds: Sequence[int]) -> Arrived:
    """Fill leaves from a socket, one after the other; the digests of what they hold then."""
    return _mover.receive(source, leaves, seeds)


def _packed(parcel: Parcel) -> list[Leaf]:
    return payload_leaves(parcel.payload, [leaf.shape for leaf in parcel.leaves])


def _moved(sources: Sequence[Leaf], targets: Sequence[Leaf], seeds: Sequence[int]) -> Digests:
    found = []
    for source, target, seed in zip(sources, targets, seeds, strict=True):
        np.copyto(target, source)
        found.append(leaf_digest(target, seed))
    return tuple(found)


def _moves(parcels: Sequence[Parcel]) -> "array[int]":
    """A row for every leaf: where it lies, and where it is packed."""
    rows = array("Q")
    for one in parcels:
        assert one.payload.flags.c_contiguous
        packed = one.payload.ctypes.data
        stop = _append(rows, one.leaves, one.seeds, packed)
        assert stop == packed + one.payload.nbytes, "payload and leaves disagree"
    return rows


def _append(rows: "array[int]", leaves: Sequence[Leaf], seeds: Sequence[int], packed: int) -> int:
    """Add a cell's leaves, packed one behind the other from an address on; where that ends."""
    for leaf, seed in zip(leaves, seeds, strict=True):
        heads, tokens, row_bytes = leaf.shape
        stride, token_stride, byte_stride = leaf.strides
        assert (token_stride, byte_stride) == (row_bytes, 1), "a head is not contiguous"
        head_bytes = tokens * row_bytes
        # A stride may be negative.
        rows.extend((_address(leaf), stride & _U64_MASK, heads, head_bytes, packed, seed))
        packed += heads * head_bytes
    return packed


def _address(leaf: Leaf) -> int:
    try:
        return ctypes.addressof(ctypes.c_char.from_buffer(leaf[0]))
    except TypeError:  # read-only: there is another way, at twice the price
        return leaf.ctypes.data


def _function(library: ctypes.CDLL, name: str) -> _Function:
    function: Any = getattr(library, name)
    function.argtypes = (ctypes.c_void_p, ctypes.c_uint64, ctypes.c_void_p)
    function.restype = None
    typed: _Function = function
    return typed


def _called(function: _Function, rows: "array[int]") -> Digests:
    """What the library answers to rows; whoever calls keeps alive what they point to."""
    found = array("Q", bytes(len(rows) // _ROW_WORDS * rows.itemsize))
    function(rows.buffer_info()[0], len(found), found.buffer_info()[0])
    return tuple(found)


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
