"""What a process has of memory to itself, for rows that measure bookkeeping.

Does not cover: shared memory, whoever maps it.
"""

import ctypes
import gc
from pathlib import Path


def own_bytes() -> int:
    """This process's own memory, with what malloc keeps of what was freed."""
    gc.collect()
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return int(fields["RssAnon"].split()[0]) * 1024


def trimmed_bytes() -> int:
    """The same once malloc has given back what it can."""
    ctypes.CDLL(None).malloc_trim(0)
    return own_bytes()
