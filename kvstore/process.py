"""A process as the kernel shows it: whether it runs, whose child it is, and when it started.

The start time tells a process from a later one that was given the same number. Does not cover:
which processes belong to what (`kvstore.cluster.processes`, `kvstore.node_folder`), how a child
learns that its parent has ended (`kvstore.child`).
"""

from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")


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
