"""Retired ranges against a set of offsets, with a death after every store into their rows."""

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.table import RANGE
from kvstore.tiers.retired import Retired

WORLD = 24
ROWS = WORLD // 2 + 1


class Column(np.ndarray[Any, Any]):
    """A column whose every store is followed by a copy of all rows: what a successor would see."""

    rows: np.ndarray[Any, Any]
    seen: list[np.ndarray[Any, Any]]

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(index, value)
        self.seen.append(self.rows.copy())


class Rows:
    """Rows as ``Retired`` takes them, each store of which is recorded."""

    def __init__(self) -> None:
        self.stored = np.zeros(ROWS, RANGE)
        self.seen: list[np.ndarray[Any, Any]] = []

    def __getitem__(self, name: str) -> Column:
        column = self.stored[name].view(Column)
        column.rows, column.seen = self.stored, self.seen
        return column


def covered(rows: np.ndarray[Any, Any]) -> set[int]:
    return {at for start, stop in rows.tolist() for at in range(start, stop)}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(order=st.permutations(range(WORLD // 2)), pairs=st.integers(1, WORLD // 2))
def test_every_death_leaves_a_successor_that_knows_all(order: list[int], pairs: int) -> None:
    rows = Rows()
    retired = Retired(rows)  # type: ignore[arg-type]
    known: set[int] = set()
    for number in order[:pairs]:
        start, stop = 2 * number, 2 * number + 1 + number % 2
        rows.seen.clear()
        retired.add(start, stop)
        wanted = known | set(range(start, stop))
        for seen in rows.seen:
            assert known <= covered(seen) <= wanted, "forgotten, or something else retired"
            successor = Retired(seen.copy())
            assert {at for a, b in successor.ranges() for at in range(a, b)} == covered(seen)
            assert successor.nbytes == len(covered(seen))
        known = wanted
        assert covered(rows.stored) == known
        assert retired.nbytes == len(known)
        edges = [edge for found in retired.ranges() for edge in found]
        assert sorted(set(edges)) == edges, "neighbours are one range, in order"
        assert retired.ranges() == Retired(rows.stored.copy()).ranges()
