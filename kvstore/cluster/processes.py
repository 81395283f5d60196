"""The processes of one tier: finding them, telling them from others, ending them.

A process belongs to a tier if it was recorded with its start time, if it was started with the
tier's random id in its environment, or if it descends from one that belongs. Nothing else is ever
signalled: a process is held by a pidfd before its start time is compared, so that a number that
was given to somebody else meanwhile is not hit.

Does not cover: what is recorded where (`kvstore.state`), starting (`kvstore.cluster.launch`).
"""

import os
import select
import signal
from collections.abc import Iterable, Sequence
from dataclasses import replace

from kvstore.clock import Clock, Deadline
from kvstore.process import PROC, living, start_ticks
from kvstore.state import ProcessRecord, Remains

MARKS = ("TIER_OF_SAMOVAR", "RAY_TIER_OF_SAMOVAR")
"""Variables with the tier's id. Two: a process that sets its title overwrites part of them."""
_ROUNDS_MAX = 5


def is_alive(process: ProcessRecord) -> bool:
    """Whether this very process still runs."""
    return start_ticks(process.pid) == process.start_ticks


def find(tier_id: str, known: Iterable[ProcessRecord] = ()) -> list[ProcessRecord]:
    """The live processes of a tier, oldest first; this process is never among them."""
    marks = [f"{name}={tier_id}".encode() for name in MARKS]
    # Called anew: Ray's idle processes become actors.
    found = {p.pid: replace(p, role=_role(p.pid, p.role)) for p in known if is_alive(p)}
    pids = [int(entry.name) for entry in PROC.iterdir() if entry.name.isdigit()]
    # Ascending start order is not given by numbers, so descendants may take a second look.
    for _ in range(2):
        for pid in pids:
            process = None if pid in found or pid == os.getpid() else living(pid)
            if process is None:
                continue
            if process.parent in found or any(mark in marks for mark in _variables(pid)):
                found[pid] = ProcessRecord(_role(pid), pid, process.start_ticks)
    return sorted(found.values(), key=lambda process: (process.start_ticks, process.pid))


def marked() -> dict[str, list[int]]:
    """All processes with any tier's mark that this user may see: numbers by tier id."""
    found: dict[str, list[int]] = {}
    prefixes = tuple(f"{name}=".encode() for name in MARKS)
    for entry in PROC.iterdir():
        if not entry.name.isdigit():
            continue
        for variable in _variables(int(entry.name)):
            if variable.startswith(prefixes):
                tier_id = variable.partition(b"=")[2].decode(errors="replace")
                found.setdefault(tier_id, []).append(int(entry.name))
                break
    return found


def command(pid: int) -> list[str]:
    """The words that the process was started with, none if that cannot be seen."""
    try:
        line = (PROC / str(pid) / "cmdline").read_bytes()
    except OSError:
        return []
    return [os.fsdecode(word) for word in line.split(b"\0")[:-1]]


def variable(pid: int, name: str) -> str | None:
    """What a variable of the process was at its start, None if that cannot be seen."""
    start = f"{name}=".encode()
    values = [each.removeprefix(start) for each in _variables(pid) if each.startswith(start)]
    return values[0].decode(errors="replace") if values else None


def end(remains: Remains, boot_id: str, clock: Clock, patience_s: float) -> list[ProcessRecord]:
    """End all that is left of a tier: ask, wait up to `patience_s`, then kill. Returns the ended.

    What was recorded in another boot has ended with it.
    """
    known = remains.processes if remains.boot_id == boot_id else ()
    ended: dict[int, ProcessRecord] = {}
    sign = signal.SIGTERM
    for _ in range(_ROUNDS_MAX):
        # Looked for anew every round: what dies may have started something meanwhile.
        living = find(remains.tier_id, known)
        if not living:
            break
        ended |= {process.pid: process for process in living}
        known = (*known, *living)
        _signal(living, sign, Deadline.after(clock, patience_s))
        sign = signal.SIGKILL
    return list(ended.values())


def _signal(processes: Sequence[ProcessRecord], sign: signal.Signals, deadline: Deadline) -> None:
    """Signal all of them and wait until they have ended or the deadline has passed."""
    held: list[int] = []
    waiting = 0
    poll = select.poll()
    try:
        for process in processes:
            try:
                descriptor = os.pidfd_open(process.pid)
            except ProcessLookupError:
                continue
            held.append(descriptor)
            if is_alive(process):
                signal.pidfd_send_signal(descriptor, sign)
                poll.register(descriptor, select.POLLIN)
                waiting += 1
        while waiting and not deadline.passed():
            for descriptor, _ in poll.poll(deadline.remaining_s() * 1_000):
                poll.unregister(descriptor)
                waiting -= 1
    finally:
        for descriptor in held:
            os.close(descriptor)


def _variables(pid: int) -> list[bytes]:
    """The process's environment, as far as it can be seen."""
    try:
        return (PROC / str(pid) / "environ").read_bytes().split(b"\0")
    except OSError:  # ended meanwhile, or another user's
        return []


def _role(pid: int, otherwise: str = "unknown") -> str:
    """What the process calls itself, for the record."""
    # A process that sets its title leaves blanks behind it.
    words = [word.rstrip() for word in command(pid) if word.strip()]
    if not words:
        return otherwise
    if "-m" in words[:-1]:
        return words[words.index("-m") + 1]
    scripts = [word for word in words if word.endswith(".py")]
    return os.path.basename((scripts or words)[0])
