"""The parts of one transfer: cut so that each is worth its overhead, and run side by side.

How many are run depends on the machine: on 16 processors eight threads copy and hash three times as
fast as two, and the others are left to the engine.

The caller's own thread takes one part, so a transfer of one part starts no thread, and Ctrl-C
reaches it. ``run_shares`` returns, or raises, only when every part has ended: nothing writes into
an engine's memory behind the engine's back.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from functools import cache

from kvstore.machine import usable_processors

HANDS_MIN = 2
"""One of them often waits: for a socket, for memory, for the interpreter."""


def hands(most: int) -> int:
    """How many threads a transfer gets on this machine: half the processors, two to ``most``."""
    return max(HANDS_MIN, min(most, _processors() // 2))


@cache
def _processors() -> int:
    return usable_processors()


def run_shares(
    shares: int, work: Callable[[int], None], interrupt: Callable[[], None] = lambda: None
) -> None:
    """Call ``work`` for every number below ``shares``, each in a thread, and wait for all.

    When the caller's own part raises, ``interrupt`` is called to make the others end early. The
    first thing raised is raised here.
    """
    faults: list[BaseException] = []

    def guarded(share: int) -> None:
        try:
            work(share)
        except BaseException as fault:
            faults.append(fault)

    threads = [
        threading.Thread(target=guarded, args=(share,), name=f"samovar-transfer-{share}")
        for share in range(1, shares)
    ]
    for thread in threads:
        thread.start()
    try:
        work(0)
    except BaseException:
        interrupt()
        raise
    finally:
        for thread in threads:
            thread.join()
    if faults:
        raise faults[0]


def runs(sizes_bytes: Sequence[int], enough_bytes: int) -> Iterator[slice]:
    """Cut a row of things into neighbours that are together just over ``enough_bytes``."""
    start = together_bytes = 0
    for stop, size_bytes in enumerate(sizes_bytes, 1):
        together_bytes += size_bytes
        if together_bytes >= enough_bytes or stop == len(sizes_bytes):
            yield slice(start, stop)
            start, together_bytes = stop, 0
