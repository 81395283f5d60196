"""What a client answers with where blocks are deleted, promised and looked into.

Plans, and what became of reads and puts, are in ``kvstore.plan``.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from kvstore.calls import HoldOutcome, Inspection


@dataclass(frozen=True, slots=True)
class Deleted:
    """``blocks`` blocks were named, and are found on no node that answered.

    ``pending`` nodes did not confirm that it is so for good: they are down, or slow. They hear of
    it from the others, and show nothing before.
    """

    blocks: int
    pending: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether every node has confirmed."""
        return not self.pending


@dataclass(frozen=True, slots=True)
class Held:
    """A promise: the first ``tokens`` tokens are kept where GRANTED, ``bytes`` bytes of them.

    Where it was declined nothing new is kept, and ``node`` says who declined.
    """

    outcome: HoldOutcome
    bytes: int = 0
    tokens: int = 0
    node: str = ""

    @property
    def granted(self) -> bool:
        """Whether it is promised."""
        return self.outcome is HoldOutcome.GRANTED


@dataclass(frozen=True, slots=True)
class Released:
    """Whether any node had such a promise.

    Those of ``silent`` nodes, which gave no answer, end when their time is up.
    """

    found: bool
    silent: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Erased:
    """A tenant begins anew: what was stored for it is found by nobody who knows ``epoch``.

    ``pending`` nodes, or clients of theirs, may not know it yet.
    """

    epoch: int
    pending: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether every node has confirmed."""
        return not self.pending


@dataclass(frozen=True, slots=True)
class Inspected:
    """What every node of the tier knows of some blocks, by its name; and who gave no answer."""

    nodes: Mapping[str, tuple[Inspection, ...]]
    silent: tuple[str, ...] = ()
