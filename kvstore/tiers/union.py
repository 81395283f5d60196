"""The union of two tiers: a cell is held while either holds it, and is said to come and go once.

Each tier's changes of one cell come strictly in turns, so the first of them says whether the tier
held it before, and the last whether it does now; a tier without changes holds what it held.

Does not cover: a tier that is replaced as a whole (``kvstore.announce`` starts over then).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvstore.tiers.tier import CellChange

Name = tuple[bytes, int]
Holds = Callable[[Sequence[Name]], Sequence[bool]]
"""Which cells a tier holds now, expired ones too."""


@dataclass(slots=True)
class _Turn:
    before: bool
    now: bool


def joined(
    upper: Sequence[CellChange], lower: Sequence[CellChange], upper_holds: Holds, lower_holds: Holds
) -> list[CellChange]:
    """What came to the union, and went from it."""
    above, below = _turns(upper), _turns(lower)
    _complete(above, [name for name in below if name not in above], upper_holds)
    _complete(below, [name for name in above if name not in below], lower_holds)
    spans = {(change.key, change.cell): change.span for change in (*upper, *lower)}
    changes = []
    for name, span in spans.items():
        before = above[name].before or below[name].before
        now = above[name].now or below[name].now
        if before != now:
            changes.append(CellChange(*name, span, added=now))
    return changes


def _turns(changes: Sequence[CellChange]) -> dict[Name, _Turn]:
    turns: dict[Name, _Turn] = {}
    for change in changes:
        turn = turns.setdefault((change.key, change.cell), _Turn(not change.added, change.added))
        turn.now = change.added
    return turns


def _complete(turns: dict[Name, _Turn], names: list[Name], holds: Holds) -> None:
    """Add the cells about which the tier said nothing."""
    if not names:
        return
    for name, held in zip(names, holds(names), strict=True):
        turns[name] = _Turn(held, held)
