"""Staging: where the tier's bytes land before an engine may use them, and leave from after it did.

    tier ──> host rows ──land──> engine's cache     a load: usable once the landing was awaited
    tier <── host rows <─lift─── engine's cache     a save: readable once the landing was awaited

On a CPU the engine's cache is host memory, both sides are the same rows and nothing moves. On a
GPU the host rows are a bounce buffer, and copies run beside the computation. What has landed or was
lifted is the same on both sides until either writes there, so it is not lifted again:

    positions  0 ............ mirrored ............ length
               [ same both sides ][ the engine's alone ]

Does not cover: when to load or save what (``worker.connector``), GPUs (``worker.cuda_staging``).
"""

from typing import Protocol

from kvstore.rows import KVRows


class Landing(Protocol):
    """A copy under way."""

    def wait(self) -> None:
        """Block until the bytes are there."""
        ...


class Staging(Protocol):
    """One engine cache's way to and from host memory. Positions are tokens of the prompt."""

    @property
    def host_rows(self) -> KVRows:
        """The rows that the tier reads and writes."""
        ...

    def land(self, start: int, stop: int) -> Landing:
        """Start copying host rows [start, stop) into the engine's cache."""
        ...

    def lift(self, start: int, stop: int) -> Landing:
        """Start copying the engine's rows [start, stop) into host rows, where they differ."""
        ...

    def rewritten(self, start: int) -> None:
        """From row ``start`` on, the two sides may differ from now on: either was written to."""
        ...


class Mirror:
    """How many first rows are the same on both sides, once the copies under way have landed."""

    def __init__(self) -> None:
        self.rows = 0

    def missing(self, start: int, stop: int) -> int:
        """Where, of rows [start, stop), those begin that may differ; ``stop`` if none does."""
        return min(max(start, self.rows), stop)

    def copying(self, start: int, stop: int) -> None:
        """Rows [start, stop) are being copied, to either side."""
        if start <= self.rows:
            self.rows = max(self.rows, stop)

    def rewritten(self, start: int) -> None:
        """From row ``start`` on, the sides may differ."""
        self.rows = min(self.rows, start)


class Landed:
    """A landing that needs no waiting."""

    def wait(self) -> None:
        """The bytes are there already."""


class HostStaging:
    """For an engine whose cache is host memory: the rows are the cache, nothing is copied."""

    def __init__(self, rows: KVRows) -> None:
        self._rows = rows

    @property
    def host_rows(self) -> KVRows:
        return self._rows

    def land(self, start: int, stop: int) -> Landing:
        return Landed()

    def lift(self, start: int, stop: int) -> Landing:
        return Landed()

    def rewritten(self, start: int) -> None:
        """Nothing: there is one side."""
