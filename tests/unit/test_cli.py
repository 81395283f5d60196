"""The command line where no tier is needed: versions, help, bad input, exit codes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvstore.cluster_map import ClusterMap
from kvstore.process import living
from kvstore.state import ProcessRecord, Remains, TierFolder, TierRecord
from tests.served import Served, two_nodes
from tests.unit.command_line import Run, refuses, samovar
from tests.worlds import shared_folder


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """In a state folder of its own."""
    monkeypatch.setenv("SAMOVAR_STATE_FOLDER", str(tmp_path))
    return samovar(monkeypatch, capsys)


def recorded(tmp_path: Path) -> TierFolder:
    """A tier that ended without a word, a boot ago."""
    folder = TierFolder.of(tmp_path, "samovar")
    remains = Remains("0123456789ab", "boot", (), (ProcessRecord("raylet", 1, 1),))
    with folder.claim():
        folder.write(TierRecord("samovar", 1, 1 << 20, 6379, "/r", (), remains))
    return folder


def test_version_names_what_is_written_and_spoken(run: Run) -> None:
    code, output, _ = run("--version")
    assert code == 0
    assert "block format 1, wire 3, state 1" in output


def test_help_teaches(run: Run) -> None:
    for command in ("up", "down", "status", "doctor"):
        code, output, _ = run(command, "--help")
        assert code == 0
        assert "--state-folder" in output
        assert "SAMOVAR_STATE_FOLDER" in output
    code, output, _ = run("--help")
    assert code == 0
    assert "..." not in output.partition("Commands:")[2], "a command's line is cut off"
    assert "samovar up" in output


def test_help_of_up_shows_examples_sizes_and_what_is_next(run: Run) -> None:
    _, output, _ = run("up", "--help")
    for shown in ("samovar up --nodes 2", "--arena-bytes 8GiB", "128 KiB", "samovar status"):
        assert shown in output, shown


def test_commands_about_a_tier_offer_only_what_they_go_by(run: Run) -> None:
    for command in ("status", "down"):
        _, output, _ = run(command, "--help")
        assert "--name" in output
        assert "--arena-bytes" not in output


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["up", "--nodes", "none"], "--nodes"),
        (["up", "--arena-bytes", "1PiB"], "smaller --arena-bytes"),
        (["up", "--shm-folder", "/nowhere"], "--shm-folder"),
        (["up", "--nvme-bytes", "1PiB"], "smaller --nvme-bytes"),
        (["up", "--nvme-bytes", "1MiB"], "needs at least"),
        (["up", "--bind-host", "0.0.0.0"], "token_file"),
        (["up", "--name", "Not A Name"], "--name"),
        (["up", "--token-file", "/nowhere"], "token file"),
        (["up", "--nodes", "2", "--control-port", "7000"], "share a port"),
        (["status", "--token-file", "/nowhere"], "token file"),
        (["status", "--config", "/nowhere"], "/nowhere"),
        (["boil"], "No such command"),
    ],
)
def test_bad_input_gets_one_sentence_and_code_2(
    run: Run, tmp_path: Path, words: list[str], sentence: str
) -> None:
    refuses(run, words, sentence)
    assert not list(tmp_path.rglob("tier.json"))


def test_purge_knows_the_other_disks(run: Run, tmp_path: Path) -> None:
    folder, disk = recorded(tmp_path), tmp_path / "disk"
    for name in ("samovar-0", "samovar-1", "samovar-other-0", "samovar"):
        (disk / name).mkdir(parents=True)
    folder.note_disk(disk)
    assert run("down")[0] == 0
    assert len(list(disk.iterdir())) == 4
    assert run("down", "--purge")[0] == 0
    assert {each.name for each in disk.iterdir()} == {"samovar-other-0", "samovar"}


def test_other_platforms_are_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    code, _, complaint = run("up")
    assert code == 2
    assert "Linux" in complaint


def test_status_without_a_tier(run: Run) -> None:
    code, output, _ = run("status", "--json")
    assert code == 1
    assert "samovar up" in output
    assert json.loads(output.splitlines()[-1]) == {"name": "samovar", "map_epoch": 0, "nodes": []}


def running(tmp_path: Path, ray_port: int, cluster_map: ClusterMap) -> None:
    """The record of a tier whose Ray lives: this process stands for it."""
    this = living(os.getpid())
    assert this is not None
    remains = Remains(
        "0123456789ab", "boot", (), (ProcessRecord("raylet", os.getpid(), this.start_ticks),)
    )
    folder = TierFolder.of(tmp_path, "samovar")
    with folder.claim():
        folder.write(TierRecord("samovar", 2, 1 << 20, ray_port, "/r", (), remains))
        folder.write_map(cluster_map)


def test_status_of_a_tier_that_is_only_starting(run: Run, tmp_path: Path) -> None:
    running(tmp_path, 0, ClusterMap(0, ()))
    code, output, _ = run("status", "--json")
    assert code == 1
    assert "is being started, or its start was cut short: `samovar up`" in output
    assert json.loads(output.splitlines()[-1])["nodes"] == []


def test_status_of_a_tier_that_is_half_up(run: Run, tmp_path: Path) -> None:
    with shared_folder() as folder:
        served = Served(folder)
        running(tmp_path, 6379, two_nodes(1, served.address))
        code, output, _ = run("status", "--json")
        served.stop()
    assert code == 1
    assert "1 of 2 nodes gave no answer: one that died is back within seconds" in output
    nodes = json.loads(output.splitlines()[-1])["nodes"]
    assert [node["answers"] for node in nodes] == [True, False]
    assert "What becomes of blocks" in output
    assert {"holds", "promised_bytes", "burials", "is_sealed"} <= nodes[0].keys()


def test_down_without_a_tier(run: Run) -> None:
    code, output, _ = run("down", "--json")
    assert code == 0
    assert json.loads(output.splitlines()[-1]) == {"processes": 0, "folders": 0}


def test_down_clears_a_record_of_another_boot(run: Run, tmp_path: Path) -> None:
    folder = recorded(tmp_path)
    assert run("down")[0] == 0
    assert folder.read() is None


def test_another_version_is_refused_until_it_is_purged(run: Run, tmp_path: Path) -> None:
    folder = recorded(tmp_path)
    file = folder.path / "tier.json"
    file.write_text(file.read_text().replace('"state_version": 1', '"state_version": 9'))
    for command in ("up", "status", "down"):
        code, _, complaint = run(command)
        assert code == 2
        assert "state version 9" in complaint
        assert "samovar down --purge" in complaint
    assert run("down", "--purge")[0] == 0
    assert not folder.path.exists()


def test_doctor_ends_with_json(run: Run) -> None:
    code, output, _ = run("doctor", "--json")
    findings = json.loads(output.splitlines()[-1])["findings"]
    assert code == int(any(each["level"] == "fail" for each in findings))
    assert {"shared memory", "open files", "ray", "gpu"} <= {each["subject"] for each in findings}


def test_module_runs_as_a_command() -> None:
    command = [sys.executable, "-m", "kvstore.cli", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("samovar ")
