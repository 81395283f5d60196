"""Whose a node's folder is: one process at a time, whatever became of the one before."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvstore.clock import SystemClock
from kvstore.errors import StateError
from kvstore.node_folder import INCARNATION_FILE, LOCK_FILE, Holder, NodeFolder

CLOCK = SystemClock()
HOLD = """
import sys
from pathlib import Path
from kvstore.clock import SystemClock
from kvstore.node_folder import NodeFolder
folder = NodeFolder.claim(Path(sys.argv[1]), SystemClock(), 0.0)
"""
KEEP = HOLD + "print('held', flush=True)\nsys.stdin.read()\n"
FORK = """
import os
{hold}
os.set_inheritable(folder._lock, True)
if os.fork() == 0:
    print('held', os.getpid(), flush=True)
    sys.stdin.read()
os._exit(0)
"""


@contextmanager
def process(script: str, folder: Path) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """A Python process that has said its first line."""
    command = [sys.executable, "-c", script, str(folder)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as running:
        assert running.stdout is not None
        yield running, running.stdout.readline().split()
        assert running.stdin is not None
        running.stdin.close()


def claim(folder: Path, patience_s: float = 0.0) -> NodeFolder:
    return NodeFolder.claim(folder, CLOCK, patience_s)


def test_incarnations_count_starts(tmp_path: Path) -> None:
    for expected in (1, 2, 3):
        folder = claim(tmp_path / "node")
        assert folder.next_incarnation() == expected
        folder.release()
    assert (tmp_path / "node").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "node" / INCARNATION_FILE).stat().st_mode & 0o777 == 0o600


def test_an_incarnation_has_a_durable_name_before_it_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without that a power failure brings the former one back, and two lives have the same."""
    synced = []

    def note(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink())

    folder = claim(tmp_path / "node")
    monkeypatch.setattr(os, "fsync", note)
    folder.next_incarnation()
    assert synced[-1:] == [tmp_path / "node"]
    folder.release()


def test_a_damaged_incarnation_is_refused(tmp_path: Path) -> None:
    folder = claim(tmp_path)
    for text in ("many", "", "-1", str(1 << 24)):
        (tmp_path / INCARNATION_FILE).write_text(text)
        with pytest.raises(StateError, match="to start afresh"):
            folder.next_incarnation()
    folder.release()


def test_a_live_holder_is_named(tmp_path: Path) -> None:
    with process(KEEP, tmp_path) as (holder, _), pytest.raises(StateError) as refusal:
        claim(tmp_path)
    assert f"in use by process {holder.pid}:" in str(refusal.value)
    claim(tmp_path).release()


def test_two_of_one_process_are_two(tmp_path: Path) -> None:
    first = claim(tmp_path)
    with pytest.raises(StateError, match=f"process {os.getpid()}"):
        claim(tmp_path)
    first.release()


def test_a_killed_holder_is_followed_at_once(tmp_path: Path) -> None:
    with process(KEEP, tmp_path) as (holder, _):
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        claim(tmp_path).release()


def test_waits_for_a_holder_that_is_ending(tmp_path: Path) -> None:
    with process(KEEP, tmp_path) as (holder, _):
        holder.send_signal(signal.SIGKILL)
        claim(tmp_path, patience_s=10.0).release()  # not waited for: it may even be a zombie


def test_a_dead_holders_child_that_keeps_the_lock_does_not_matter(tmp_path: Path) -> None:
    with process(FORK.format(hold=HOLD), tmp_path) as (holder, words):
        holder.wait()
        assert words[0] == "held"
        folder = claim(tmp_path)
        with pytest.raises(StateError, match=f"process {os.getpid()}"):
            claim(tmp_path)
        folder.release()
        claim(tmp_path).release()


@pytest.mark.parametrize("record", [b"", b"not a record", b"1 2 pid:[1]\n", b"99999999"])
def test_an_unknown_holder_is_taken_for_alive(tmp_path: Path, record: bytes) -> None:
    with process(KEEP, tmp_path) as (_, _):
        (tmp_path / LOCK_FILE).write_bytes(record)
        with pytest.raises(StateError, match="in use by"):
            claim(tmp_path)


def test_a_number_that_was_given_to_another_process_is_dead() -> None:
    me = Holder.current()
    assert not me.is_dead()
    assert Holder.parse(me.record()) == me
    assert Holder(me.pid, me.start_ticks + 1, me.pid_namespace).is_dead()
    assert not Holder(me.pid, me.start_ticks + 1, "pid:[1]").is_dead()
