"""Free ranges against a map of every byte."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvstore.ranges import Ranges

WORLD = 40


class RangesMachine(RuleBasedStateMachine):
    """``free`` says of every byte whether it may be handed out."""

    def __init__(self) -> None:
        super().__init__()
        self.ranges = Ranges()
        self.ranges.free(0, WORLD)
        self.free = [True] * WORLD
        self.taken: list[tuple[int, int]] = []

    def runs(self) -> list[tuple[int, int]]:
        """Maximal free runs, ``(length, start)``."""
        found, start = [], None
        for at, free in enumerate([*self.free, False]):
            if free and start is None:
                start = at
            elif not free and start is not None:
                found.append((at - start, start))
                start = None
        return found

    @rule(length=st.integers(1, WORLD))
    def allocate(self, length: int) -> None:
        fitting = [run for run in self.runs() if run[0] >= length]
        start = self.ranges.allocate(length)
        if not fitting:
            assert start is None
            return
        assert start == min(fitting)[1], "not the best fit"
        assert all(self.free[start : start + length]), "handed out twice"
        self.free[start : start + length] = [False] * length
        self.taken.append((start, length))

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        start, length = self.taken.pop(data.draw(st.integers(0, len(self.taken) - 1)))
        cut = data.draw(st.integers(0, length))
        pieces = [(start, cut), (start + cut, length - cut)]
        for at, size in pieces:
            if size:
                self.ranges.free(at, size)
        self.free[start : start + length] = [True] * length

    @invariant()
    def agrees_with_the_map(self) -> None:
        runs = self.runs()
        assert self.ranges.free_bytes == sum(self.free)
        assert self.ranges.largest_bytes() == (max(runs)[0] if runs else 0)


TestRanges = RangesMachine.TestCase
TestRanges.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, derandomize=True
)
