"""Ray's head: what is said of one that has ended, and how it is started again."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvstore.clock import Deadline, SystemClock
from kvstore.cluster import head
from kvstore.process import start_ticks
from kvstore.state import ProcessRecord, Remains


def record(role: str, alive: bool = True) -> ProcessRecord:
    ticks = start_ticks(os.getpid())
    assert ticks is not None
    return ProcessRecord(role, os.getpid(), ticks if alive else ticks - 1)


def remains(*processes: ProcessRecord) -> Remains:
    return Remains("0123456789ab", "boot", (), processes)


def test_a_whole_ray_is_no_complaint() -> None:
    actor = record("ray::StorageNode", alive=False)  # Ray restarts it
    assert head.complaint(remains(record("gcs_server"), record("raylet"), actor)) is None


@pytest.mark.parametrize(
    ("dead", "sentence"),
    [
        ({"gcs_server"}, "Ray's head, gcs_server (PID), ended: the nodes go on, but"),
        ({"raylet"}, "raylet (PID) ended: `samovar up` restarts the tier"),
        ({"gcs_server", "raylet"}, "`samovar down` ends it"),
    ],
)
def test_what_ended_is_named_with_what_to_do(dead: set[str], sentence: str) -> None:
    found = [record(role, role not in dead) for role in ("gcs_server", "raylet")]
    complaint = head.complaint(remains(*found))
    assert complaint is not None
    assert sentence.replace("PID", str(os.getpid())) in complaint


def test_a_record_without_ray_is_one_that_ended() -> None:
    assert "Ray ended" in str(head.complaint(remains()))


def test_a_head_is_started_again_as_it_was(tmp_path: Path) -> None:
    said = tmp_path / "said"
    code = f"import os, pathlib; pathlib.Path({str(said)!r}).write_text(os.environ['OF'] * 2)"
    code += "; import sys; sys.stdin.read()"
    environment = {"OF": "before"}
    with subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdin=subprocess.PIPE
    ) as first:
        ticks = start_ticks(first.pid)
        assert ticks is not None
        head.note(remains(ProcessRecord("gcs_server", first.pid, ticks)), tmp_path)
    assert said.read_text() == "beforebefore"
    assert head.start_again(tmp_path, {"OF": "after"})
    waiting = Deadline.after(SystemClock(), 30)
    while said.read_text() != "afterafter":
        assert not waiting.passed(), "the command was not run again"


def test_without_a_note_there_is_no_way(tmp_path: Path) -> None:
    assert not head.start_again(tmp_path, {})


def test_an_older_ray_keeps_no_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert head.variables(tmp_path)["RAY_gcs_storage_path"] == str(tmp_path / "head")
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.59.1")
    assert head.variables(tmp_path) == {}
    head.note(remains(record("gcs_server")), tmp_path)
    assert not list(tmp_path.iterdir())
