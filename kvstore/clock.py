"""The only place that reads the machine's clocks.

Covers: monotonic time for leases, deadlines and heartbeats; wall time for expiry that outlives a
process. Does not cover: sleeping (shells do that) and how long anything lives (see retention).

Every class that needs time takes a ``Clock``; tests pass ``ManualClock`` and move it by hand.
"""

import time
from dataclasses import dataclass
from typing import Protocol


class Clock(Protocol):
    """Two readings: one never jumps, the other survives a restart."""

    def monotonic_s(self) -> float:
        """Seconds since an arbitrary point of this boot; never goes back."""
        ...

    def wall_ms(self) -> int:
        """Milliseconds since the Unix epoch; may jump when somebody sets the clock."""
        ...


class SystemClock:
    """The machine's clocks."""

    def monotonic_s(self) -> float:
        return time.monotonic()

    def wall_ms(self) -> int:
        return time.time_ns() // 1_000_000


@dataclass(slots=True)
class ManualClock:
    """A clock that moves only when told to, for tests and simulations."""

    now_s: float = 1_000.0
    wall_now_ms: int = 1_700_000_000_000

    def monotonic_s(self) -> float:
        return self.now_s

    def wall_ms(self) -> int:
        return self.wall_now_ms

    def advance(self, seconds: float) -> None:
        """Move both readings forward by ``seconds``."""
        self.now_s += seconds
        self.wall_now_ms += round(seconds * 1_000)


@dataclass(frozen=True, slots=True)
class Deadline:
    """A point of monotonic time after which nobody waits any more."""

    clock: Clock
    at_s: float

    @classmethod
    def after(cls, clock: Clock, seconds: float) -> "Deadline":
        """The deadline ``seconds`` from now."""
        return cls(clock, clock.monotonic_s() + seconds)

    def remaining_s(self) -> float:
        """Seconds left, never negative."""
        return max(0.0, self.at_s - self.clock.monotonic_s())

    def passed(self) -> bool:
        """Whether the time is up."""
        return self.clock.monotonic_s() >= self.at_s
