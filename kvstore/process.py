"""A process as the kernel shows it: whether it runs, whose child it is, and when it started.

A child that serves its parent learns here when to end. The start time tells a process from a later
one that was given the same number. Does not cover: which processes belong to what
(`kvstore.cluster.processes`, `kvstore.node_folder`).
"""

import ctypes
import os
import signal
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Living:
    """A process that has not ended; `start_ticks` counts from the machine's boot."""

    parent: int
    start_ticks: int


def living(pid: int) -> Living | None:
    """The process of that number; None if there is none, or a zombie, which has ended."""
    try:
        text = (PROC / str(pid) / "stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name, in parentheses, may hold spaces and parentheses itself.
    fields = text[text.rindex(")") + 2 :].split()
    return None if fields[0] in "ZX" else Living(int(fields[1]), int(fields[19]))


def start_ticks(pid: int) -> int | None:
    """When the process started, None if it has ended."""
    found = living(pid)
    return None if found is None else found.start_ticks


def follow(parent: int) -> int | None:
    """Serve ``parent``: the answer is a descriptor that becomes readable when it has ended.

    ``None`` if it has ended already. Ctrl-C is the parent's to handle from now on.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Ends a stop (SIGSTOP) that would keep us from noticing that the parent is gone.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGCONT)
    try:
        watched = os.pidfd_open(parent)
    except ProcessLookupError:
        return None
    # If it ended before we looked, its number may be somebody else's by now.
    return watched if os.getppid() == parent else None
