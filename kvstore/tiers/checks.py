"""Checks: when the bytes of each held cell were last found to be what they should be.

Four bytes for each of a tier's slots: seconds since the tier began, rounded up. Does not cover: who
reads and compares, what becomes of a cell that is damaged.
"""

import numpy as np
import numpy.typing as npt

from kvstore.clock import Clock


class Checks:
    """Of one tier, by the numbers of its slots."""

    def __init__(self, slots: int, clock: Clock) -> None:
        self._clock = clock
        self._began_s = clock.monotonic_s() - 1.0
        self._when_s = np.zeros(slots, np.uint32)

    @property
    def nbytes(self) -> int:
        """Memory for bookkeeping."""
        return self._when_s.nbytes

    def note(self, slots: npt.NDArray[np.integer] | int) -> None:
        """These are whole, just now."""
        self._when_s[slots] = int(self._clock.monotonic_s() - self._began_s)

    def ago_ms(self, slot: int) -> int | None:
        """How long that was ago; ``None`` if it was not since the tier began."""
        when_s = int(self._when_s[slot])
        if not when_s:
            return None
        ago_s = self._clock.monotonic_s() - self._began_s - when_s
        return max(0, round(1000 * ago_s))
