"""What a request to an engine gives: tokens as they are chosen, then a report of what it cost.

Does not cover: how tokens come about (see ``worker.engines.transformers``).
"""

from collections.abc import Generator, Iterator
from dataclasses import dataclass

from kvstore.errors import UsageError
from worker.engines.sampling import Choice


@dataclass(frozen=True, slots=True)
class Report:
    """What one request cost; times count from the moment its token ids arrived.

    Cached tokens stand by source: still in the engine's own cache, fetched from the memory of this
    machine's node, from that of another, from any node's disk. ``prefilled_tokens`` is counted
    where tokens enter the model.
    """

    prompt_tokens: int
    own_tokens: int
    local_tokens: int
    remote_tokens: int
    nvme_tokens: int
    prefilled_tokens: int
    generated_tokens: int
    ttft_s: float
    total_s: float

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that were not run."""
        return self.own_tokens + self.local_tokens + self.remote_tokens + self.nvme_tokens


class Answer(Iterator[Choice]):
    """An answer under way: iterate for its tokens; its report is there once it has ended."""

    def __init__(self, run: Generator[Choice, None, Report]) -> None:
        self._run = run
        self._report: Report | None = None

    def __next__(self) -> Choice:
        try:
            return next(self._run)
        except StopIteration as end:
            if end.value is not None:
                self._report = end.value
            raise

    @property
    def report(self) -> Report:
        """What the whole answer cost."""
        if self._report is None:
            raise UsageError("an answer has no report before its last token was taken")
        return self._report

    def close(self) -> None:
        """End the answer early; what was computed so far stays the engine's own."""
        self._run.close()


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer: ``gaps`` are each token's distance to the second likeliest (``Choice``)."""

    tokens: tuple[int, ...]
    gaps: tuple[float, ...]
    report: Report
