"""Living: how many bytes a process has asked for and not given back, asked with SIGUSR1.

Python imports this at the start of each process that has this folder in PYTHONPATH. The answer is a
file of LIVING_FOLDER, named by the process's number. What was given back and is kept for later by
the allocator does not count: how much that is depends on chance, and on how long a process runs.
With PYTHONMALLOC=malloc objects of Python are included, as all that C and C++ libraries have.

Does not cover: memory that is mapped past the allocator, as the stacks of threads are.
"""

import ctypes
import gc
import os
import signal
from pathlib import Path
from types import FrameType

FOLDER = Path(os.environ["LIVING_FOLDER"])


class _Mallinfo(ctypes.Structure):
    """``struct mallinfo2`` of glibc."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


_mallinfo2 = ctypes.CDLL(None).mallinfo2
_mallinfo2.restype = _Mallinfo


def say(signum: int, frame: FrameType | None) -> None:
    """Put the figure where it is waited for, whole."""
    gc.collect()
    info = _mallinfo2()
    unfinished = FOLDER / f"{os.getpid()}.unfinished"
    unfinished.write_text(str(info.uordblks + info.hblkhd))
    unfinished.replace(FOLDER / str(os.getpid()))


signal.signal(signal.SIGUSR1, say)
