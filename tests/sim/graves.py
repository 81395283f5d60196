"""Graves: which blocks were deleted, and must be seen nowhere again; unless they were put since.

    answered by all nodes        dead from then on: a read that begins later must not get it
    answered, some are pending   dead once everybody is back and has heard of it
    not answered                 nobody knows

A put that was under way at any time from the beginning of the delete to its answer may have come
after it at some node: its blocks count as put again.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Dug:
    """A delete that is under way: which of its blocks no put could bring back, as it began."""

    keys: tuple[bytes, ...]
    puts: dict[bytes, int]


class Graves:
    """All deletes of a world, as its clients see them."""

    def __init__(self) -> None:
        self._puts: Counter[bytes] = Counter()
        """How many puts of a block have begun."""
        self._writing: Counter[bytes] = Counter()
        self._dead: dict[bytes, int] = {}
        self._dying: set[bytes] = set()
        self._count = 0
        self.answered = 0

    def put_begins(self, keys: Iterable[bytes]) -> None:
        """These blocks may be there again from now on."""
        for key in keys:
            self._puts[key] += 1
            self._writing[key] += 1
            self._dead.pop(key, None)
            self._dying.discard(key)

    def put_ends(self, keys: Iterable[bytes]) -> None:
        """Whatever became of it. Not said of a client that was killed: its bytes may be late."""
        self._writing.subtract(keys)

    def delete_begins(self, keys: Iterable[bytes]) -> Dug:
        """To be given back to ``delete_ends``."""
        quiet = tuple(key for key in keys if not self._writing[key])
        return Dug(quiet, {key: self._puts[key] for key in quiet})

    def delete_ends(self, dug: Dug, everywhere: bool, somewhere: bool) -> None:
        """It was answered: by all nodes, or by some of them at least."""
        self.answered += everywhere
        for key in dug.keys:
            if self._puts[key] != dug.puts[key]:
                continue
            if everywhere:
                self._count += 1
                self._dead[key] = self._count
                self._dying.discard(key)
            elif somewhere and key not in self._dead:
                self._dying.add(key)

    def disk_lost(self) -> None:
        """What only one node had heard of may be forgotten."""
        self._dying.clear()

    def read_begins(self, keys: Iterable[bytes]) -> dict[bytes, int]:
        """Which of these blocks must not come."""
        return {key: self._dead[key] for key in keys if key in self._dead}

    def risen(self, dead: dict[bytes, int], got: Iterable[bytes]) -> list[bytes]:
        """Blocks that came although they were dead all the time."""
        return [key for key in got if key in dead and self._dead.get(key) == dead[key]]

    def gone(self, all_are_back: bool) -> set[bytes]:
        """What no node may hold once everybody who is there has heard of everything."""
        return {*self._dead, *(self._dying if all_are_back else ())}
