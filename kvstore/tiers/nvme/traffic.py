"""Traffic: the requests that are out at the disk, by ticket.

Does not cover: what they are for (``open_slab``).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from kvstore.tiers.nvme.disk_queue import DiskQueue
from kvstore.tiers.nvme.requests import NO_EXTENT, Request, RequestKind

_READING = (RequestKind.READ, RequestKind.CHECK)


@dataclass(frozen=True, slots=True)
class Flight:
    """A request that is not answered: whose record it works on, which deletion waits for it."""

    request: Request
    number: int = 0
    deletion: int = 0


class Traffic:
    """Collects requests until ``send``, and knows which are not answered."""

    def __init__(self, queue: DiskQueue, tickets: Iterator[int]) -> None:
        self.flights: dict[int, Flight] = {}
        self._queue = queue
        self._tickets = tickets
        self._outbox: list[Request] = []
        self._refused: list[Request] = []

    def next_ticket(self) -> int:
        """A ticket that nothing else has."""
        return next(self._tickets)

    def submit(
        self, kind: RequestKind, record: np.void, number: int = 0, deletion: int = 0,
        ticket: int = 0, arena_offset: int = 0, extent: int = NO_EXTENT, extent_sequence: int = 0,
    ) -> int:  # fmt: skip
        """Ask for something, with a ticket of its own unless one is given; the ticket."""
        ticket = ticket or self.next_ticket()
        request = Request(kind, ticket, record.copy(), arena_offset, extent, extent_sequence)
        self.flights[ticket] = Flight(request, number, deletion)
        self._outbox.append(request)
        return ticket

    def answered(self, ticket: int) -> Flight | None:
        """Take a flight that has come back; ``None`` for an unknown one."""
        return self.flights.pop(ticket, None)

    def keep_for_retry(self, flight: Flight) -> None:
        """The disk refused it, but it has to be done: ``retry`` asks again."""
        self.flights[flight.request.ticket] = flight
        self._refused.append(flight.request)

    def retry(self) -> None:
        """Ask once more for everything that was refused."""
        self._outbox += self._refused
        self._refused = []

    def of_kind(self, *kinds: RequestKind) -> list[Flight]:
        """The flights that are out for something."""
        return [flight for flight in self.flights.values() if flight.request.kind in kinds]

    def redirect_reads(self, number: int, to: int) -> int:
        """Reads of one record's slot, which is another one's now; how many there are."""
        reads = [
            flight
            for flight in self.flights.values()
            if flight.number == number and flight.request.kind in _READING
        ]
        for flight in reads:
            self.flights[flight.request.ticket] = replace(flight, number=to)
        return len(reads)

    def send(self) -> None:
        """Hand over what was collected."""
        if self._outbox:
            self._queue.submit(self._outbox)
            self._outbox = []
