"""Row ``arena_fill``: how full the arena stays when blocks of several models share it.

Blocks of three sizes (two models, and tails of any length) come in random order; when none fits,
the oldest go until one does, as in the host tier. What is measured is the arena's one allocator:
the share of it that holds blocks in the long run. A tier of size classes would be the other way.
"""

import random
from collections import deque
from collections.abc import Iterator
from statistics import fmean

from benchmarks.figure import Budget, Figure, Sense
from benchmarks.measure import Run
from kvstore.ranges import Ranges

PAGE_BYTES = 4096
ARENA_PAGES = (1 << 30) // PAGE_BYTES
MODEL_PAGES = (721, 513)
TAIL_SHARE = 0.1
BUDGET = Budget(Sense.AT_LEAST, 0.95)
SEED = 20


def measure(run: Run) -> Iterator[Figure]:
    """A long churn, its first third not counted."""
    blocks = run.of(60_000, 3_000)
    fills, evicted = _churn(blocks)
    yield Figure(
        row="arena_fill",
        variant="three sizes",
        value=fmean(fills[blocks // 3 :]),
        unit="of the arena",
        beside=f"{blocks} blocks through 1 GiB, {evicted / blocks:.3f} evicted for each, "
        f"at worst {min(fills[blocks // 3 :]):.3f} full",
        budget=BUDGET,
    )


def _churn(blocks: int) -> tuple[list[float], int]:
    """The arena's fill after each block once it is full, and how many had to go."""
    dice = random.Random(SEED)
    space = Ranges()
    space.free(0, ARENA_PAGES)
    held: deque[tuple[int, int]] = deque()
    fills, evicted = [], 0
    for _ in range(blocks):
        pages = dice.choice(MODEL_PAGES)
        if dice.random() < TAIL_SHARE:
            pages = dice.randrange(2, pages)
        while (start := space.allocate(pages)) is None:
            space.free(*held.popleft())
            evicted += 1
        held.append((start, pages))
        fills.append(1 - space.free_bytes / ARENA_PAGES)
    return fills, evicted
