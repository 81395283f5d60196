"""What the doctor says of machines other than this one."""

import errno
import fcntl
import importlib.metadata
import os
import resource
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from kvstore import doctor
from kvstore.cluster import processes
from kvstore.config import NodeConfig
from kvstore.doctor import Level
from kvstore.leaves import Implementation
from kvstore.state import ProcessRecord, Remains, TierFolder, TierRecord
from kvstore.tiers.nvme import capacity
from kvstore.tiers.nvme.disk import takes_direct
from tests.source_tree import ROOT

KNOWN_ID, LOST_ID = "aaaaaaaaaaaa", "bbbbbbbbbbbb"
KNOWN = [Remains(KNOWN_ID, "boot", (), ())]


@pytest.mark.parametrize(
    ("words", "level"), [("flags : fpu avx2 sse", Level.OK), ("flags : fpu", Level.WARN)]
)
def test_processor(tmp_path: Path, words: str, level: Level) -> None:
    (tmp_path / "cpuinfo").write_text(words)
    assert doctor.processor("x86_64", tmp_path / "cpuinfo").level is level


def test_shared_memory_that_is_none(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(f"a / ext4 rw 0 0\nb {tmp_path} xfs rw 0 0\n")
    found = doctor.shared_memory(tmp_path, mounts)
    assert found.level is Level.WARN
    assert "xfs" in found.sentence
    assert doctor.shared_memory(tmp_path / "absent", mounts).level is Level.FAIL


@pytest.mark.parametrize(("free_bytes", "level"), [(64 << 20, Level.WARN), (64 << 30, Level.OK)])
def test_room_for_an_arena(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free_bytes: int, level: Level
) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(f"shm {tmp_path} tmpfs rw 0 0\n")
    monkeypatch.setattr(doctor, "default_arena_bytes", lambda _: free_bytes)
    assert doctor.shared_memory(tmp_path, mounts).level is level


@pytest.mark.parametrize(
    ("limit", "level"),
    [(1024, Level.WARN), (65536, Level.OK), (resource.RLIM_INFINITY, Level.OK)],
)
def test_open_files(limit: int, level: Level) -> None:
    assert doctor.open_files(limit).level is level


def test_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config = NodeConfig(state_folder=Path("/s"), control_port=port)
        control, bulk = doctor.ports(config)
    assert (control.level, bulk.level) == (Level.WARN, Level.OK)
    assert str(port) in control.sentence


@pytest.mark.parametrize(
    ("version", "level"), [("2.51.1", Level.FAIL), ("2.52.0", Level.OK), ("3.0", Level.OK)]
)
def test_ray_version(version: str, level: Level) -> None:
    assert doctor.ray_version(lambda _: version).level is level


def test_ray_that_is_not_installed() -> None:
    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    assert doctor.ray_version(absent).level is Level.FAIL


def test_token_that_others_can_read(tmp_path: Path) -> None:
    folder = TierFolder(tmp_path)
    assert doctor.token(folder).level is Level.WARN
    folder.token(b"\0" * 32)
    assert doctor.token(folder).level is Level.OK
    folder.token_file.chmod(0o644)
    assert "chmod 600" in doctor.token(folder).sentence


@pytest.mark.parametrize(("boot_id", "level"), [("boot", Level.FAIL), ("later", Level.WARN)])
def test_tier_that_ended_without_a_word(tmp_path: Path, boot_id: str, level: Level) -> None:
    remains = Remains(KNOWN_ID, "boot", (), (ProcessRecord("gcs_server", 1 << 22, 1),))
    (tmp_path / "a").mkdir()
    (tmp_path / "file").touch()
    folder = TierFolder(tmp_path / "a")
    folder.write(TierRecord("a", 1, 1 << 20, 6379, "/r", (), remains))
    ((path, found),) = doctor.known_tiers(tmp_path)
    assert path == folder.path
    finding = doctor.tier(path, found, boot_id)
    assert finding.level is level
    assert "`samovar up`" in finding.sentence


def test_arenas_that_nobody_holds(tmp_path: Path) -> None:
    names = [f"samovar-x-{KNOWN_ID}-0", f"samovar-x-{LOST_ID}-0", f"samovar-x-y-{LOST_ID}-1"]
    for name in (*names, "somebody-else", "samovar-x"):
        (tmp_path / name).mkdir()
    lock = os.open(tmp_path / names[2] / "lock", os.O_CREAT | os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        (left,) = doctor.left_arenas(tmp_path, KNOWN)
    finally:
        os.close(lock)
    assert names[1] in left.sentence
    assert len(list(doctor.left_arenas(tmp_path, KNOWN))) == 2


def test_embedded_tiers_that_were_killed_while_they_were_made(tmp_path: Path) -> None:
    dead, made = (tmp_path / f"samovar-embedded-{name}" for name in ("dead", "made"))
    for folder in (dead, made):
        folder.mkdir()
        (folder / "lock").touch()
    with (made / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (left,) = doctor.left_embedded(tmp_path)
    assert f"rm -r {dead}" in left.sentence


def test_a_killed_maker_of_an_embedded_tier_is_found(tmp_path: Path) -> None:
    # The place in which the child stops is the only one where its arena has a name.
    script = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from kvstore import embedded\n"
        "from kvstore.client import Samovar\n"
        "def stop(*arguments):\n"
        "    print('made', flush=True)\n"
        "    time.sleep(60)\n"
        "embedded.LocalTransport.open = stop\n"
        "Samovar.open(1 << 20, Path(sys.argv[1]))\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "made\n"
        assert not list(doctor.left_embedded(tmp_path)), "its maker lives"
        child.kill()
    (left,) = doctor.left_embedded(tmp_path)
    assert "was killed: rm -r" in left.sentence


def test_a_token_file_that_cannot_be_used(tmp_path: Path) -> None:
    assert not list(doctor.token_file(None))
    (found,) = doctor.token_file(tmp_path / "absent")
    assert found.level is Level.FAIL
    file = tmp_path / "token"
    file.write_text("hush\n")
    file.chmod(0o600)
    (found,) = doctor.token_file(file)
    assert found.level is Level.OK
    file.chmod(0o644)
    (found,) = doctor.token_file(file)
    assert "chmod 600" in found.sentence


def test_ray_folders_that_nobody_uses(tmp_path: Path) -> None:
    for tier_id in (KNOWN_ID, LOST_ID):
        (tmp_path / f"samovar-{tier_id}").mkdir()
    (left,) = doctor.left_ray_folders(tmp_path, KNOWN)
    assert LOST_ID in left.sentence


def test_processes_without_a_record(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    marked = {KNOWN_ID: [1], LOST_ID: [7, 8]}
    token_file = tmp_path / "token"
    monkeypatch.setattr(processes, "marked", lambda: marked)
    monkeypatch.setattr(processes, "variable", lambda pid, name: str(token_file))
    (left,) = doctor.left_processes(KNOWN)
    assert "kill 7 8" in left.sentence
    lost = Remains(LOST_ID, "boot", (), ())
    TierFolder(tmp_path).write(TierRecord("b", 1, 1 << 20, 6379, "/r", (), lost))
    assert not list(doctor.left_processes(KNOWN))


def test_gpu_never_fails() -> None:
    assert doctor.gpu().level is Level.OK


@pytest.mark.parametrize("used", Implementation)
def test_it_says_who_copies_and_hashes(used: Implementation) -> None:
    found = doctor.native_code(used)
    slow = used is Implementation.PYTHON
    assert found.level is (Level.WARN if slow else Level.OK)
    assert ("install a C compiler" in found.sentence) == slow
    assert used.value in found.sentence


def test_a_disk_that_is_not_wanted(tmp_path: Path) -> None:
    assert doctor.nvme(0, [tmp_path / "nvme"]).level is Level.OK


@pytest.mark.parametrize("fault", [None, errno.EINVAL, errno.EACCES])
def test_how_bytes_get_to_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: int | None
) -> None:
    def opened(path: Path, flags: int, mode: int) -> int:
        if fault is not None and flags & os.O_DIRECT:
            raise OSError(fault, os.strerror(fault))
        return os.dup(0)

    monkeypatch.setattr("kvstore.tiers.nvme.disk.os.open", opened)
    found = doctor.nvme(64 << 20, [tmp_path / "tier" / "nodes" / "0"])
    level, words = {
        None: (Level.OK, "with O_DIRECT"),
        errno.EINVAL: (Level.WARN, "fdatasync"),
        errno.EACCES: (Level.FAIL, "--nvme-folder"),
    }[fault]
    assert found.level is level
    assert words in found.sentence
    assert list(tmp_path.iterdir()) == []


def test_the_real_disk_is_tried_without_leaving_anything(tmp_path: Path) -> None:
    assert takes_direct(tmp_path) in (True, False)
    assert list(tmp_path.iterdir()) == []


def test_room_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "takes_direct", lambda _: True)
    monkeypatch.setattr(doctor, "free_bytes_of", lambda _: 1 << 30)
    monkeypatch.setattr(capacity, "free_bytes_of", lambda _: 1 << 30)
    folders = [tmp_path / "0", tmp_path / "1"]
    assert doctor.nvme(1 << 29, folders).level is Level.OK
    too_much = doctor.nvme((1 << 29) + 1, folders)
    assert too_much.level is Level.FAIL
    assert "give a smaller one" in too_much.sentence
    assert doctor.nvme(None, folders).level is Level.WARN, "less than 64 MiB each"
    by_default = doctor.nvme(None, folders[:1])
    assert by_default.level is Level.OK
    assert "1,024 MiB free, a node's NVMe tier gets 102 MiB" in by_default.sentence
