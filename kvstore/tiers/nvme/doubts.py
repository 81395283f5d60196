"""Doubts: which cells a disk refused to read, and when it is asked for them again.

    held ── a read is refused ──> in doubt ── a check reads it, or a store takes its place ──> held
                                      └── it is damaged, or given up ──> dropped

A disk may refuse for a moment what it has, so a cell in doubt is kept; and it may do so for good,
so nobody finds it: a reader would be sent to it in vain each time. Checks go round all cells in
doubt, one at a time, whoever else waits for the disk; between rounds that clear up nothing the
pause gets longer. Where one is refused in ``ROUNDS_MAX`` rounds while other reads succeed, it is
the place that is bad and not the disk, and the cell is given up.

Does not cover: reading, dropping, and saying so (``open_slab``). Knows numbers, does no I/O.
"""

import numpy as np
import numpy.typing as npt

from kvstore.clock import Clock
from kvstore.table import Slots

PAUSE_S = (1.0, 30.0)
"""First and longest wait between two rounds; the first is also that after a check in a round."""
ROUNDS_MAX = 30
"""About a quarter of an hour for a cell that is the only one in doubt."""


class Doubts:
    """The cells of one slab that are in doubt, by the numbers of their records."""

    def __init__(self, cells_max: int, clock: Clock) -> None:
        self._clock = clock
        self._refused = np.zeros(cells_max, np.uint8)
        """For a cell in doubt, 1 and the rounds that speak against it; else 0."""
        self._count = 0
        self._round: list[int] = []
        """Who is still to be checked in this one."""
        self._is_checking = False
        self._has_read = False
        """Whether anything could be read since the last round."""
        self._due_s = clock.monotonic_s()
        self._pause_s = PAUSE_S[0]

    def __len__(self) -> int:
        return self._count

    def __contains__(self, number: int) -> bool:
        return bool(self._refused[number])

    @property
    def nbytes(self) -> int:
        """Memory for bookkeeping."""
        return self._refused.nbytes

    def among(self, numbers: Slots) -> npt.NDArray[np.bool_]:
        """Which of the cells are in doubt."""
        found: npt.NDArray[np.bool_] = self._refused[numbers] != 0
        return found

    def begin(self, number: int) -> None:
        """A read of a cell was refused."""
        assert number not in self, "in doubt already"
        soon_s = self._clock.monotonic_s() + PAUSE_S[0]
        if not self._count:
            self._has_read, self._due_s = False, soon_s
        self._due_s = min(self._due_s, soon_s)
        self._pause_s = PAUSE_S[0]
        self._count += 1
        self._refused[number] = 1

    def end(self, number: int) -> bool:
        """A cell can be read, or has gone; whether it was in doubt."""
        if number not in self:
            return False
        self._count -= 1
        self._refused[number] = 0
        self._pause_s = PAUSE_S[0]
        return True

    def note_read(self) -> None:
        """The disk has read something: it is there."""
        self._has_read = True

    def next(self) -> int | None:
        """A cell to be checked now, if it is time; ``checked`` is told what came of it."""
        if self._is_checking or self._clock.monotonic_s() < self._due_s:
            return None
        self._round = self._round or np.flatnonzero(self._refused).tolist()
        while self._round:
            number = self._round.pop()
            if number in self:
                self._is_checking = True
                return number
        return None

    def checked(self, number: int, is_refused: bool) -> bool:
        """A check has ended; ``False``: the cell is to be given up."""
        self._is_checking = False
        now_s = self._clock.monotonic_s()
        if is_refused and self._has_read:
            self._refused[number] += 1
        is_hopeless = self._refused[number] > ROUNDS_MAX
        self._due_s = now_s + PAUSE_S[0] if is_refused else now_s
        if not self._round:
            self._due_s = now_s + self._pause_s
            self._pause_s = min(2 * self._pause_s, PAUSE_S[1])
            self._has_read = False
        return not is_hopeless
