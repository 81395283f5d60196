"""What the demo shows while it runs, and for how long it waits."""

import io

import pytest
from rich.console import Console

from kvstore.clock import ManualClock
from worker.demo.progress import Show, TooSlow


def test_steps_are_lines_and_rounds_are_counted() -> None:
    out = io.StringIO()
    with Show(Console(file=out), ManualClock()) as show:
        show.step("a long step")
        assert list(show.rounds("some rounds", 3)) == [0, 1, 2]
    assert "a long step" in out.getvalue()
    assert "some rounds" in out.getvalue()


def test_watching_ends_with_enough() -> None:
    found = iter((0, 2, 5))
    with Show(Console(file=io.StringIO()), ManualClock()) as show:
        show.watch("blocks", lambda: next(found), wanted=4, patience_s=60)
    assert next(found, None) is None


def test_patience_is_bounded_and_says_how_far_it_came() -> None:
    clock = ManualClock()

    def measure() -> int:
        clock.advance(1)
        return 3

    with (
        Show(Console(file=io.StringIO()), clock) as show,
        pytest.raises(TooSlow, match=r"^blocks: 3 of 4 after 2 s"),
    ):
        show.watch("blocks", measure, wanted=4, patience_s=2)


def test_what_goes_on_changing_is_waited_for() -> None:
    clock = ManualClock()
    found = [1, 2, 3, 3, 3, 3]

    def measure() -> int:
        clock.advance(1)
        return found.pop(0)

    with Show(Console(file=io.StringIO()), clock) as show:
        show.settle("it", measure, rest_s=2, patience_s=60)
        assert found == [3]
        found[:] = range(100)
        with pytest.raises(TooSlow, match="it did not rest for 2 s within 9 s"):
            show.settle("it", measure, rest_s=2, patience_s=9)
