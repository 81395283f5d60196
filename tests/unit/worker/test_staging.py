"""Which rows are the same on both sides of a staging, so that they are not lifted again."""

import pytest

from tests.unit.worker.fakes import ArrayRows, DeferredStaging
from worker.staging import Mirror


def test_at_first_no_row_is() -> None:
    assert Mirror().missing(0, 70) == 0


@pytest.mark.parametrize(
    ("copied", "missing"),
    [
        ([(0, 70)], 70),
        ([(0, 40), (40, 70)], 70),
        ([(0, 40), (20, 30)], 40),
        ([(0, 40), (30, 60)], 60),
        ([(0, 40), (41, 70)], 40),
        ([(10, 70)], 0),
        ([(0, 90)], 70),
        ([(0, 0)], 0),
    ],
)
def test_rows_behind_one_another_that_were_copied_are(
    copied: list[tuple[int, int]], missing: int
) -> None:
    mirror = Mirror()
    for start, stop in copied:
        mirror.copying(start, stop)
    assert mirror.missing(0, 70) == missing


@pytest.mark.parametrize(("start", "missing"), [(0, 0), (20, 20), (70, 70), (90, 70)])
def test_rows_that_are_rewritten_are_not(start: int, missing: int) -> None:
    mirror = Mirror()
    mirror.copying(0, 70)
    mirror.rewritten(start)
    assert mirror.missing(0, 70) == missing


def test_a_lift_begins_where_the_sides_may_differ() -> None:
    cache = ArrayRows(1, 1, 100, 4)
    staging = DeferredStaging.over(cache)
    for value, start, stop in ((1, 0, 60), (2, 60, 70), (3, 20, 90)):
        cache.array[:, :, start:stop] = value
        staging.rewritten(start)
        staging.lift(0, stop).wait()
    assert staging.lifted == [(0, 60), (60, 70), (20, 90)]
    assert (staging.host.array == cache.array).all()
