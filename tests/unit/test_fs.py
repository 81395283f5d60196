"""The real file system: mappings are shared, not inherited, and give memory back."""

import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvstore.fs import DurableFiles, LinuxFileSystem, MemoryFiles
from tests.source_tree import ROOT
from tests.worlds import PAGE

FS = LinuxFileSystem()


def backed_bytes(path: Path) -> int:
    return path.stat().st_blocks * 512


def test_machine_facts() -> None:
    assert FS.page_bytes == mmap.PAGESIZE
    assert len(FS.boot_id()) == 16
    assert FS.boot_id() == FS.boot_id()
    assert len(FS.entropy(24)) == 24
    assert FS.entropy(16) != FS.entropy(16)


def test_files_are_sparse_private_and_emptied(folder: Path) -> None:
    path = folder / "file"
    assert FS.size_bytes(path) is None
    FS.create(path, 1000 * PAGE)
    assert FS.size_bytes(path) == 1000 * PAGE
    assert backed_bytes(path) == 0
    assert path.stat().st_mode & 0o777 == 0o600
    FS.allocate(path, 2 * PAGE, 3 * PAGE)
    assert backed_bytes(path) == 3 * PAGE
    FS.create(path, PAGE)
    assert FS.size_bytes(path) == PAGE
    assert backed_bytes(path) == 0
    FS.remove(path)
    FS.remove(path)
    assert FS.size_bytes(path) is None


def test_folders_are_private(folder: Path) -> None:
    FS.make_folder(folder / "a" / "b")
    FS.make_folder(folder / "a" / "b")
    assert (folder / "a" / "b").stat().st_mode & 0o777 == 0o700


def test_more_than_there_is_cannot_be_allocated(folder: Path) -> None:
    path = folder / "file"
    FS.create(path, FS.free_bytes(folder) * 4)
    with pytest.raises(OSError, match=r"\[Errno 28\]"):
        FS.allocate(path, 0, FS.free_bytes(folder) * 2)


def test_mappings_of_one_file_are_one_memory(folder: Path) -> None:
    path = folder / "file"
    FS.create(path, 4 * PAGE)
    writer, reader = FS.map(path, writable=True), FS.map(path, writable=False)
    writer[5] = 7
    assert reader[5] == 7
    with pytest.raises(ValueError, match="read-only"):
        reader[5] = 8


def test_a_mapping_outlives_its_file(folder: Path) -> None:
    path = folder / "file"
    FS.create(path, PAGE)
    mapped = FS.map(path, writable=True)
    FS.remove(path)
    FS.create(path, PAGE)
    mapped[:] = 255
    assert not FS.map(path, writable=False).any()


def test_punched_memory_is_given_back_and_reads_as_zeros(folder: Path) -> None:
    path = folder / "file"
    FS.create(path, 8 * PAGE)
    mapped = FS.map(path, writable=True)
    FS.populate(mapped, 0, 8 * PAGE)
    assert backed_bytes(path) == 8 * PAGE
    mapped[:] = 9
    FS.punch(mapped, 2 * PAGE, 3 * PAGE)
    assert backed_bytes(path) == 5 * PAGE
    assert not mapped[2 * PAGE : 5 * PAGE].any()
    assert (mapped[: 2 * PAGE] == 9).all()
    assert (mapped[5 * PAGE :] == 9).all()


def test_a_refused_punch_says_so(folder: Path) -> None:
    path = folder / "file"
    FS.create(path, PAGE)
    reader = FS.map(path, writable=False)
    with pytest.raises(OSError, match="could not give back"):
        FS.punch(reader, 0, PAGE)


FORK = """
import os, signal, sys
from pathlib import Path
from kvstore.fs import DurableFiles, LinuxFileSystem, MemoryFiles
fs = LinuxFileSystem()
path = Path(sys.argv[1])
fs.create(path, 4096)
mapped = fs.map(path, writable=True)
mapped[0] = 1
child = os.fork()
if child == 0:
    mapped[0] = 2
    os._exit(0)
status = os.waitpid(child, 0)[1]
assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGSEGV, status
assert mapped[0] == 1
"""


def test_a_fork_cannot_write_into_the_mapping(folder: Path) -> None:
    command = [sys.executable, "-X", "faulthandler=0", "-c", FORK, str(folder / "file")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("files", [FS, MemoryFiles()], ids=["disk", "memory"])
def test_small_files_are_appended_to_and_replaced_whole(
    tmp_path: Path, files: DurableFiles
) -> None:
    folder = tmp_path / "small"
    files.make_folder(folder)
    path = folder / "file"
    assert files.read(path) is None
    assert files.names(folder) == []
    files.append(path, b"one")
    files.append(path, b"two")
    assert files.read(path) == b"onetwo"
    files.replace(path, b"new")
    files.replace(folder / "other", b"")
    assert files.read(path) == b"new"
    assert files.names(folder) == ["file", "other"]
    files.remove(path)
    files.remove(path)
    assert files.names(folder) == ["other"]


def test_small_files_are_private_and_leave_nothing_beside_them(tmp_path: Path) -> None:
    FS.append(tmp_path / "log", b"row")
    FS.replace(tmp_path / "whole", b"content")
    assert {path.name for path in tmp_path.iterdir()} == {"log", "whole"}
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in tmp_path.iterdir())


def test_a_file_that_cannot_be_written_anew_stays_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: int) -> None:
        raise OSError("the disk refuses")

    FS.replace(tmp_path / "file", b"former")
    monkeypatch.setattr(os, "fdatasync", refuse)
    with pytest.raises(OSError, match="refuses"):
        FS.replace(tmp_path / "file", b"new")
    assert FS.read(tmp_path / "file") == b"former"
