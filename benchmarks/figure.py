"""What a row comes to: a figure with its budget, or why there is none.

A figure carries what it was measured beside, how far its rounds were apart, and how busy the
machine was with other things. Does not cover: how it is shown (``benchmarks.report``).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from statistics import median
from types import MappingProxyType

from benchmarks.measure import Pairs


class Skip(Exception):
    """A row can't be measured here; the message says what is missing."""


class Sense(Enum):
    """Which side of its budget a figure should be on."""

    AT_LEAST = "≥"
    AT_MOST = "≤"


@dataclass(frozen=True, slots=True)
class Budget:
    """What a figure must reach."""

    sense: Sense
    value: float

    def met(self, value: float) -> bool:
        """Whether ``value`` is within it."""
        return value >= self.value if self.sense is Sense.AT_LEAST else value <= self.value

    def __str__(self) -> str:
        return f"{self.sense.value} {self.value:g}"


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured claim. ``beside`` says in words what ours and the limit were.

    ``low`` and ``high`` are the extremes of the rounds. ``best`` compares the fastest round of each
    side, which comes nearest to a machine with nothing else to do. ``others_cores`` is how many
    cores other processes kept busy meanwhile.
    """

    row: str
    variant: str
    value: float
    unit: str
    beside: str
    budget: Budget | None = None
    low: float = 0.0
    high: float = 0.0
    rounds: int = 1
    best: float = 0.0
    others_cores: float = 0.0
    details: Mapping[str, float | int | str] = field(default_factory=dict)

    @property
    def within(self) -> bool:
        """Whether it keeps its budget, if it has one."""
        return self.budget is None or self.budget.met(self.value)


@dataclass(frozen=True, slots=True)
class Skipped:
    """A row, or a variant of one, that could not be measured."""

    row: str
    variant: str
    why: str


def beside_limit(
    row: str,
    variant: str,
    pairs: Pairs,
    budget: Budget,
    unit: str,
    beside: str,
    details: Mapping[str, float | int | str] = MappingProxyType({}),
) -> Figure:
    """The figure of a measurement in pairs: a speed where much is good, a cost where little is."""
    ratios = pairs.speeds if budget.sense is Sense.AT_LEAST else pairs.costs
    best = min(pairs.ours_s) / min(pairs.limit_s)
    return Figure(
        row=row,
        variant=variant,
        value=median(ratios),
        unit=unit,
        beside=beside,
        budget=budget,
        low=min(ratios),
        high=max(ratios),
        best=best if budget.sense is Sense.AT_MOST else 1 / best,
        rounds=len(ratios),
        others_cores=pairs.others_cores,
        details={
            **details,
            "ours_s": pairs.ours_median_s,
            "limit_s": pairs.limit_median_s,
            "cpu_cost": pairs.cpu_cost,
        },
    )
