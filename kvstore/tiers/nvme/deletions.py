"""Deletions: what has still to happen on the disk before each of them is done.

A deletion waits for *parts*: the tombstones of its blocks, and the erasure of every copy of them
that was held, being written, or on its way out when it came. Those records are *doomed*: their
slots are not just freed, but wiped for good. A deletion outlives the disk process: it begins anew
when that is open again.

Does not cover: requests (``tier``). Knows numbers, does no I/O.
"""

from dataclasses import dataclass, field


@dataclass(slots=True)
class Deletion:
    """One delete, of ``keys``; done when it waits for nothing."""

    ticket: int
    keys: tuple[bytes, ...]
    sequence: int = 0
    """What was written before is deleted, what is written later is not; 0: not begun."""
    parts: int = 0


@dataclass(slots=True)
class Deletions:
    """The deletes that are not done."""

    waiting: dict[int, Deletion] = field(default_factory=dict)
    _doomed: dict[int, list[Deletion]] = field(default_factory=dict)

    def doom(self, number: int, deletion: Deletion) -> None:
        """The deletion waits for the erasure of this record."""
        self._doomed.setdefault(number, []).append(deletion)
        deletion.parts += 1

    def is_doomed(self, number: int) -> bool:
        """Whether the record's slot has to be wiped for good."""
        return number in self._doomed

    def erased(self, number: int) -> list[int]:
        """A record is erased; the tickets that are done with it."""
        return [
            ticket
            for deletion in self._doomed.pop(number, ())
            for ticket in self.part_done(deletion.ticket)
        ]

    def part_done(self, ticket: int) -> list[int]:
        """A part of a deletion is done; its ticket if that was the last."""
        deletion = self.waiting[ticket]
        deletion.parts -= 1
        if deletion.parts:
            return []
        del self.waiting[ticket]
        return [ticket]

    def begin_anew(self) -> list[Deletion]:
        """Forget how far they were; all of them."""
        self._doomed.clear()
        for deletion in self.waiting.values():
            deletion.parts = 0
        return list(self.waiting.values())
