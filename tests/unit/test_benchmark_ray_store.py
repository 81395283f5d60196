"""The peer that lives in Ray: where Ray does not start, a row is skipped and not lost."""

import pytest

from benchmarks.figure import Skip
from benchmarks.ray_store import starting


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        pytest.param(
            Exception("The raylet took too long.\nMore of it."), "took too long", id="told"
        ),
        pytest.param(TimeoutError(), "TimeoutError", id="not told"),
    ],
)
def test_a_node_that_does_not_start_is_a_reason_to_skip(fault: Exception, reason: str) -> None:
    with pytest.raises(Skip, match=rf"^Ray could not start two nodes: .*{reason}\.?$"), starting():
        raise fault
