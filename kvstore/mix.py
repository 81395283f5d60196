"""Mixing of 64-bit integers (the finaliser of SplitMix64), vectorised.

A bijection whose output bits all depend on all input bits. Not a cryptographic hash: it spreads
values that are already hard to guess, or whose guessing gains nothing.
"""

import numpy as np
import numpy.typing as npt

_STEP = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)


def mix64(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Each value mixed; integer overflow is part of it, which numpy arrays do silently."""
    mixed = values + _STEP
    mixed = (mixed ^ (mixed >> np.uint64(30))) * _FIRST
    mixed = (mixed ^ (mixed >> np.uint64(27))) * _SECOND
    return mixed ^ (mixed >> np.uint64(31))
