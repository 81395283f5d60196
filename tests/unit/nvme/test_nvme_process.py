"""The disk process as a real child: files, LMDB, O_DIRECT, and what its death costs."""

import os
import resource
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from kvstore.tiers.nvme.catalog import Change, read_catalog
from kvstore.tiers.nvme.disk import LinuxDisk, aligned_bytes
from kvstore.tiers.nvme.drive import Drive
from kvstore.tiers.nvme.folder import CATALOG_FOLDER
from kvstore.tiers.nvme.identity import Identity
from kvstore.tiers.nvme.open_slab import PAUSE_S
from kvstore.tiers.nvme.record import PAGE_BYTES, RECORD, Tombstones
from kvstore.tiers.nvme.requests import Request, RequestKind
from kvstore.tiers.nvme.slab import SLAB_FILE, Slab
from kvstore.tiers.nvme.spill import Declined, Phase, Result
from kvstore.tiers.nvme.tier import RESTART_S, RETRY_S
from kvstore.tiers.nvme.tombstones import TOMBSTONE_S
from kvstore.tiers.nvme.worker import Worker
from tests.disk_node import Node
from tests.source_tree import ROOT
from tests.worlds import key_number, packed, shared_folder


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with shared_folder() as arena_folder:
        node = Node(arena_folder, tmp_path)
        node.start()
        yield node
        node.tier.stop()


def test_cells_go_to_disk_and_come_back(node: Node) -> None:
    assert [node.store(n, pages) for n, pages in ((1, 1), (2, 3), (3, 5))] == [Result.STORED] * 3
    assert [node.load(n) for n in (3, 1, 2)] == [Result.LOADED] * 3
    assert node.tier.stats.held_cells == 3


def test_a_restart_finds_them_again(node: Node) -> None:
    node.store(1)
    node.store(2)
    node.result(node.tier.delete(packed([key_number(2)])))
    node.tier.stop()
    node.start()
    assert node.load(1) is Result.LOADED
    assert not node.holds(2)


def test_a_tombstone_is_known_after_a_restart_and_forgotten_in_time(node: Node) -> None:
    node.store(1)
    node.result(node.tier.delete(packed([key_number(1)])))
    node.tier.stop()
    assert [t["key"].tobytes() for t in tombstones_of(node)] == [key_number(1)]
    node.start()
    node.clock.advance(TOMBSTONE_S)
    node.tier.tick()
    node.store(2)  # committed behind it
    node.tier.stop()
    assert not len(tombstones_of(node))


def tombstones_of(node: Node) -> Tombstones:
    """What is in the catalog of a node whose disk process has ended."""
    return read_catalog(node.settings.folder / CATALOG_FOLDER).tombstones


def test_hold_a_killed_disk_process_costs_what_was_on_its_way(node: Node) -> None:
    node.store(1)
    os.kill(node.process.pid, signal.SIGSTOP)
    ticket = node.tier.store(node.spill(2))
    os.kill(node.process.pid, signal.SIGKILL)
    assert node.result(ticket) is Result.FAILED
    assert node.tier.phase is Phase.OPENING
    assert not node.holds(1)
    node.clock.advance(RESTART_S[0])
    node.tier.tick()
    node.wait_for_phase()
    assert node.load(1) is Result.LOADED
    assert node.store(2) is Result.STORED


@pytest.mark.parametrize("opening", ["opened", "refused", "failed"])
def test_it_ends_quietly_when_nobody_waits_for_its_opening(
    node: Node, tmp_path: Path, opening: str
) -> None:
    node.tier.stop()
    folder = tmp_path / SLAB_FILE if opening == "failed" else tmp_path
    ours, theirs = socket.socketpair()
    ours.close()
    with theirs:
        ended = subprocess.run(
            [
                sys.executable, "-m", "kvstore.tiers.nvme.worker", "--folder", str(folder),
                "--arena-folder", str(node.settings.arena_folder),
                "--node-id", "node-b" if opening == "refused" else "node-a",
                "--extent-bytes", str(node.settings.extent_bytes),
                "--extents", str(node.settings.extents),
                "--cells-max", str(node.settings.cells_max),
                "--parent", str(os.getpid()), "--socket", str(theirs.fileno()),
            ],
            cwd=ROOT, pass_fds=[theirs.fileno()], capture_output=True, check=False,
        )  # fmt: skip
    assert (ended.returncode, ended.stderr) == (0, b"")


def test_another_nodes_files_are_refused_and_left_alone(node: Node) -> None:
    node.store(1)
    node.tier.stop()
    folder = node.settings.folder
    kept = (folder / SLAB_FILE).read_bytes()
    with shared_folder() as arena_folder:
        other = Node(arena_folder, folder, "node-b")
        other.start()
        assert other.tier.phase is Phase.REFUSED
        assert "node-a" in other.tier.reason
        assert "node-b" in other.tier.reason
        assert not other.holds(1)
        other.tier.stop()
    assert (folder / SLAB_FILE).read_bytes() == kept
    node.start()
    assert node.load(1) is Result.LOADED


def test_hold_a_lost_catalog_is_rebuilt_and_deletes_nothing_back(node: Node) -> None:
    for number in (1, 2, 3):
        node.store(number)
    node.result(node.tier.delete(packed([key_number(2)])))
    node.tier.stop()
    data = node.settings.folder / CATALOG_FOLDER / "data.mdb"
    data.write_bytes(b"\xff" * data.stat().st_size)
    node.start()
    assert [node.holds(n) for n in (1, 2, 3)] == [True, False, True]
    assert [node.load(n) for n in (1, 3)] == [Result.LOADED] * 2


def test_hold_a_catalog_that_kills_its_reader_is_rebuilt(node: Node) -> None:
    node.store(1)
    node.tier.stop()
    data = node.settings.folder / CATALOG_FOLDER / "data.mdb"
    os.truncate(data, 8192)  # meta pages that name pages beyond the end: SIGBUS
    node.start()
    assert node.load(1) is Result.LOADED


def test_a_disk_that_refuses_says_so_in_one_sentence_and_is_tried_again(
    node: Node, tmp_path: Path
) -> None:
    node.store(1)
    node.tier.stop()
    away = tmp_path / "away"
    slab = node.settings.folder / SLAB_FILE
    slab.rename(away)
    slab.mkdir()
    node.begin()
    while not node.tier.reason:
        node.step()
    assert node.tier.phase is Phase.OPENING
    assert node.tier.reason.startswith(f"the disk refuses the NVMe tier in {tmp_path}: ")
    assert "Is a directory" in node.tier.reason
    slab.rmdir()
    away.rename(slab)
    node.clock.advance(RESTART_S[0])
    node.tier.tick()
    node.wait_for_phase()
    assert node.load(1) is Result.LOADED


def test_hold_a_cell_that_cannot_be_read_for_a_while(node: Node) -> None:
    for number in (1, 2):
        assert node.store(number) is Result.STORED
    slab = node.settings.folder / SLAB_FILE
    image = slab.read_bytes()
    os.truncate(slab, int(node.tier.held_records()["offset"].min()))
    for number in (1, 2):
        assert node.load(number) is Result.FAILED
        assert not node.holds(number)
    assert node.store(1) is Result.STORED, "in another place"
    assert node.load(1) is Result.LOADED
    with slab.open("r+b") as file:
        file.write(image[: int(node.tier.sure_records()["offset"][0])])
    node.clock.advance(RETRY_S)
    node.take(node.tier.tick())
    while not node.holds(2):
        node.step()
    assert node.load(2) is Result.LOADED
    node.tier.stop()
    node.start()
    assert [node.load(number) for number in (1, 2)] == [Result.LOADED] * 2
    assert node.tier.stats.held_cells == 2


@contextmanager
def no_file_over(size_bytes: int, pid: int = 0) -> Iterator[None]:
    """A process, and what it starts, is refused every write beyond that: as on a full disk."""
    limits = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (size_bytes, limits[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("pages", [2, 3, 4, 5])
def test_hold_a_disk_that_is_full_for_a_while(node: Node, pages: int) -> None:
    """It refuses the catalog too, or breaks a slot's write off in the middle, on a page."""
    assert node.store(1) is Result.STORED
    slots = node.tier.held_records()["offset"].tolist()
    with no_file_over(slots[0] + pages * PAGE_BYTES, node.process.pid):
        assert node.store(2) is Result.FAILED
        assert node.tier.store(node.spill(3)) is Declined.CLOSED, "nothing is written for a while"
        assert node.load(1) is Result.LOADED
        deleted = node.tier.delete(packed([key_number(1)]))
        assert not node.holds(1)
    for _ in node.waiting_for(deleted):  # what was refused is asked again
        node.clock.advance(PAUSE_S)
        node.take(node.tier.tick())
    assert node.result(deleted) is Result.DELETED
    assert node.store(2) is Result.STORED
    node.tier.stop()
    node.start()
    assert node.load(2) is Result.LOADED
    assert not node.holds(1)
    assert node.tier.stats.held_cells == 1


def test_hold_a_disk_that_is_full_at_the_start(tmp_path: Path) -> None:
    with shared_folder() as arena_folder:
        node = Node(arena_folder, tmp_path)
        with no_file_over(1 << 16):
            node.begin()
            while not node.tier.reason:
                node.step()
        assert "File too large" in node.tier.reason
        assert node.tier.store(node.spill(1)) is Declined.CLOSED
        node.clock.advance(RESTART_S[0])
        node.tier.tick()
        node.wait_for_phase()
        assert node.store(1) is Result.STORED
        assert node.load(1) is Result.LOADED
        node.tier.stop()


class BrokenCatalog:
    """A catalog with a bug of ours."""

    def commit(self, change: Change) -> None:
        raise ZeroDivisionError

    def close(self) -> None:
        return


def test_a_bug_in_the_disk_process_ends_it_and_hangs_nobody(tmp_path: Path) -> None:
    """Its thread alone would be gone, and every request after it wait for ever."""
    ours, theirs = socket.socketpair()
    child = os.fork()
    if not child:
        os.close(2)
        disk = LinuxDisk.open(tmp_path / SLAB_FILE)
        slab = Slab(disk, Identity(bytes(16), "node-a", 1 << 18, 4))
        worker = Worker(
            Drive(slab, BrokenCatalog(), lambda start, size: aligned_bytes(size)), theirs
        )
        worker.start()
        worker.take(Request(RequestKind.TOUCH, 1, np.zeros(1, RECORD)[0]))
        signal.pause()
    theirs.close()
    with ours:
        ended = select.select([ours], [], [], 20)[0]
        os.kill(child, signal.SIGKILL)
        assert ended
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
