"""How to measure: in pairs, ours and the limit in turns.

Ours and the limit are timed in turns, the one that goes first alternating, so that a machine that
speeds up, slows down or is shared does the same to both. A figure is the median of the pairs'
ratios, never a ratio of two runs.

Does not cover: what becomes of the pairs (``benchmarks.figure``).
"""

import gc
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import psutil

Timed = Callable[[], float]
"""Does the work once; the seconds that count, set-up left out."""
Track = Callable[[Iterable[int], str], Iterator[int]]
"""Goes through rounds and shows how far it is."""


@dataclass(frozen=True, slots=True)
class Run:
    """How this run measures: ``quick`` for a smoke test's sizes, ``model`` a local model folder."""

    quick: bool
    track: Track
    model: Path | None = None

    def of(self, full: int, quick: int) -> int:
        """A size or a count, by the kind of run."""
        return quick if self.quick else full


@dataclass(frozen=True, slots=True)
class Pairs:
    """Seconds of ours and of the limit, round by round.

    ``cpu_cost`` is what ours costs this process in CPU time, as a multiple of the limit: unlike
    wall time it hardly minds a busy machine.
    """

    ours_s: tuple[float, ...]
    limit_s: tuple[float, ...]
    cpu_cost: float
    others_cores: float

    @property
    def ours_median_s(self) -> float:
        return median(self.ours_s)

    @property
    def limit_median_s(self) -> float:
        return median(self.limit_s)

    @property
    def speeds(self) -> list[float]:
        """Our speed as a share of the limit's, by round."""
        return [limit / ours for ours, limit in zip(self.ours_s, self.limit_s, strict=True)]

    @property
    def costs(self) -> list[float]:
        """Our time as a multiple of the limit's, by round."""
        return [ours / limit for ours, limit in zip(self.ours_s, self.limit_s, strict=True)]

    @property
    def cost_interval(self) -> tuple[float, float]:
        """Where the median of the costs lies with 95 % confidence, whatever scatters them."""
        ranked = sorted(self.costs)
        left_out = max(0, int((len(ranked) - 1.96 * len(ranked) ** 0.5) / 2))
        return ranked[left_out], ranked[-1 - left_out]


def paired(ours: Timed, limit: Timed, rounds: Iterable[int]) -> Pairs:
    """Time both once per round, after one round of each that does not count."""
    limit()
    ours()
    gc.collect()
    others = Others()
    sides: tuple[_Side, _Side] = (_Side(ours), _Side(limit))
    for number in rounds:
        for side in sides if number % 2 else reversed(sides):
            side.take()
    return Pairs(
        ours_s=tuple(sides[0].seconds),
        limit_s=tuple(sides[1].seconds),
        cpu_cost=median(sides[0].cpu_s) / max(median(sides[1].cpu_s), 1e-9),
        others_cores=others.busy_cores(),
    )


@dataclass(slots=True)
class _Side:
    work: Timed
    seconds: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)

    def take(self) -> None:
        started = time.process_time()
        self.seconds.append(self.work())
        self.cpu_s.append(time.process_time() - started)


def timed(work: Callable[[], object]) -> float:
    """Seconds that one call takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


class Others:
    """How busy everybody else keeps the machine, from now on."""

    def __init__(self) -> None:
        self._started_s = time.perf_counter()
        self._all_s, self._mine_s = _cpu_seconds()

    def busy_cores(self) -> float:
        """Cores that processes other than this one and its children used on average."""
        all_s, mine_s = _cpu_seconds()
        wall_s = time.perf_counter() - self._started_s
        return max(0.0, (all_s - self._all_s) - (mine_s - self._mine_s)) / max(wall_s, 1e-3)


def _cpu_seconds() -> tuple[float, float]:
    """CPU seconds so far of the whole machine, and of this process with all its children."""
    machine = psutil.cpu_times()
    own = os.times()
    mine = own.user + own.system + own.children_user + own.children_system
    for child in psutil.Process().children(recursive=True):
        try:
            times = child.cpu_times()
        except psutil.NoSuchProcess:
            continue
        mine += times.user + times.system
    return machine.user + machine.nice + machine.system, mine
