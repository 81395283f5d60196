"""What the tier knows of whoever does its disk work: requests go in, events come out.

Does not cover: the process behind it (``disk_process``).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from kvstore.tiers.nvme.requests import Opening, Outcome, Request


@dataclass(frozen=True, slots=True)
class Answer:
    """A request is done, and nothing of it goes on."""

    ticket: int
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Ended:
    """Whoever did the work is gone; of unanswered requests any part may have happened, and none
    goes on. The message says why."""

    reason: str


Event = Opening | Answer | Ended


class DiskQueue(Protocol):
    """Driven by one thread; nothing here waits for a disk."""

    def start(self) -> None:
        """Begin, or begin again after ``Ended``; an ``Opening`` or ``Ended`` will come."""
        ...

    def submit(self, requests: Sequence[Request]) -> None:
        """Ask for work. Between an ``Ended`` and the next ``Opening`` nothing may be asked."""
        ...

    def poll(self) -> list[Event]:
        """What has happened since the last call; never waits."""
        ...

    def stop(self) -> None:
        """End it, now. What was answered is durable, and nothing else is promised."""
        ...
