"""Only what belongs to the tier is found, and only what is found is ended."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from kvstore.clock import SystemClock
from kvstore.cluster import processes
from kvstore.process import start_ticks
from kvstore.state import ProcessRecord, Remains

STUBBORN = "import signal, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
WAIT = "print('up', flush=True); sys.stdin.read()"
PARENT = (
    "import subprocess, sys; "
    "child = subprocess.Popen([sys.executable, '-c', 'import sys; sys.stdin.read()'], env={}); "
    "print(child.pid, flush=True); sys.stdin.read()"
)
Child = subprocess.Popen[str]
Spawn = Callable[..., Child]


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    """Starts a Python process that waits, with a tier's mark or without."""
    children: list[Child] = []

    def start(code: str = "import sys; " + WAIT, mark: str | None = None) -> Child:
        environment = {} if mark is None else {processes.MARKS[0]: mark}
        child = subprocess.Popen(
            [sys.executable, "-c", code],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        children.append(child)
        return child

    yield start
    for child in children:
        child.kill()
        child.communicate()


@pytest.fixture
def tier_id() -> str:
    return os.urandom(6).hex()


def line(child: Child) -> str:
    assert child.stdout is not None
    return child.stdout.readline().strip()


def record(child: Child) -> ProcessRecord:
    ticks = start_ticks(child.pid)
    assert ticks is not None
    return ProcessRecord("child", child.pid, ticks)


def end(tier_id: str, known: tuple[ProcessRecord, ...] = (), boot_id: str = "now") -> set[int]:
    remains = Remains(tier_id, "now", (), known)
    return {each.pid for each in processes.end(remains, boot_id, SystemClock(), patience_s=0.3)}


def test_marked_and_recorded_are_ended_and_others_not(spawn: Spawn, tier_id: str) -> None:
    marked, recorded = spawn(mark=tier_id), spawn()
    other, bare = spawn(mark="f" * 12), spawn()
    for child in (marked, recorded, other, bare):
        line(child)
    assert end(tier_id, (record(recorded),)) == {marked.pid, recorded.pid}
    assert (marked.wait(), recorded.wait()) == (-signal.SIGTERM, -signal.SIGTERM)
    assert other.poll() is None
    assert bare.poll() is None


def test_process_that_does_not_listen_is_killed(spawn: Spawn, tier_id: str) -> None:
    child = spawn(STUBBORN + WAIT, mark=tier_id)
    line(child)
    assert end(tier_id) == {child.pid}
    assert child.wait() == -signal.SIGKILL


def test_descendants_belong_too(spawn: Spawn, tier_id: str) -> None:
    parent = spawn(PARENT, mark=tier_id)
    grandchild = int(line(parent))
    assert {each.pid for each in processes.find(tier_id)} == {parent.pid, grandchild}
    assert end(tier_id) == {parent.pid, grandchild}
    assert start_ticks(grandchild) is None


def test_number_that_was_given_to_another_process_is_not_hit(spawn: Spawn, tier_id: str) -> None:
    child = spawn()
    line(child)
    earlier = replace(record(child), start_ticks=record(child).start_ticks - 1)
    assert not processes.is_alive(earlier)
    assert end(tier_id, (earlier,)) == set()
    assert child.poll() is None


def test_records_of_another_boot_are_not_hit(spawn: Spawn, tier_id: str) -> None:
    child = spawn()
    line(child)
    assert end(tier_id, (record(child),), boot_id="later") == set()
    assert child.poll() is None


def test_a_recorded_process_is_called_what_it_calls_itself_now(spawn: Spawn, tier_id: str) -> None:
    child = spawn()
    line(child)
    (found,) = processes.find(tier_id, [record(child)])
    assert found == replace(record(child), role=os.path.basename(sys.executable))


def test_ended_process_is_not_alive(spawn: Spawn) -> None:
    child = spawn()
    line(child)
    found = record(child)
    assert processes.is_alive(found)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it is a zombie still
    assert not processes.is_alive(found)


def test_marks_are_seen_and_read(spawn: Spawn, tier_id: str) -> None:
    child = spawn(mark=tier_id)
    line(child)
    assert processes.marked()[tier_id] == [child.pid]
    assert processes.variable(child.pid, processes.MARKS[0]) == tier_id
    assert processes.variable(child.pid, "ABSENT") is None
