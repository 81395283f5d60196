"""The real disk file: O_DIRECT or not, its length, and how large a slab is by default."""

import os
import threading
from pathlib import Path

import numpy as np
import pytest

from kvstore.errors import ConfigError
from kvstore.tiers.nvme import capacity
from kvstore.tiers.nvme.capacity import (
    CAPACITY_BYTES_MIN,
    EXTENT_BYTES_MAX,
    default_capacity_bytes,
    extents_for,
)
from kvstore.tiers.nvme.disk import LinuxDisk, aligned_bytes
from kvstore.tiers.nvme.record import PAGE_BYTES
from kvstore.tiers.nvme.slab import SLAB_FILE, read_whole, write_whole


@pytest.mark.parametrize("refuses_direct", [False, True])
def test_a_file_is_written_and_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuses_direct: bool
) -> None:
    real = os.open

    def without_direct(path: Path, flags: int, mode: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "this file system has no O_DIRECT")
        return real(path, flags, mode)

    if refuses_direct:
        monkeypatch.setattr("os.open", without_direct)
    disk = LinuxDisk.open(tmp_path / "slab")
    assert not (refuses_direct and disk.is_direct)
    disk.allocate(4 * PAGE_BYTES)
    written, seen = aligned_bytes(2 * PAGE_BYTES), aligned_bytes(2 * PAGE_BYTES)
    written[:] = np.arange(2 * PAGE_BYTES, dtype=np.uint16).view(np.uint8)[: 2 * PAGE_BYTES]
    write_whole(disk, [written[:PAGE_BYTES], written[PAGE_BYTES:]], PAGE_BYTES)
    disk.sync()
    read_whole(disk, [seen], PAGE_BYTES)
    assert (written == seen).all()
    with pytest.raises(OSError, match=r"the slab ends at"):
        read_whole(disk, [seen], 3 * PAGE_BYTES)
    disk.allocate(2 * PAGE_BYTES)
    assert disk.size_bytes() == 2 * PAGE_BYTES
    disk.close()


def test_a_file_that_may_not_be_written_is_not_opened(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        LinuxDisk.open(tmp_path)


def test_a_file_is_opened_when_its_last_user_is_gone(tmp_path: Path) -> None:
    """A disk process that was killed may still be in the middle of a transfer."""
    first = LinuxDisk.open(tmp_path / "slab")
    opened: list[LinuxDisk] = []
    second = threading.Thread(target=lambda: opened.append(LinuxDisk.open(tmp_path / "slab")))
    second.start()
    second.join(0.1)
    assert not opened
    first.close()
    second.join()
    opened[0].close()


@pytest.mark.parametrize("capacity_bytes", [16 << 20, 100_000_000, 1 << 30, 20 << 30])
def test_a_slab_takes_what_it_is_given_and_never_more(capacity_bytes: int) -> None:
    extent_bytes, extents = extents_for(capacity_bytes)
    slab_bytes = PAGE_BYTES + extent_bytes * extents
    assert capacity_bytes - extent_bytes < slab_bytes <= capacity_bytes
    assert extent_bytes <= EXTENT_BYTES_MAX
    assert extents >= 15


def test_a_slab_without_room_for_anything_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"at least"):
        extents_for(CAPACITY_BYTES_MIN - 1)


def test_by_default_a_tenth_of_what_is_free_and_20_gib_at_most() -> None:
    assert default_capacity_bytes(10 << 30) == 1 << 30
    assert default_capacity_bytes(1 << 40) == 20 << 30
    assert default_capacity_bytes(10 << 30, nodes=4) == 1 << 28
    assert default_capacity_bytes(1 << 40, nodes=2) == 20 << 30


def test_a_disk_that_is_nearly_full_is_left_alone() -> None:
    assert default_capacity_bytes(640 << 20) == 64 << 20
    assert default_capacity_bytes((640 << 20) - 10) == 0
    assert default_capacity_bytes(1 << 30, nodes=2) == 0


def test_a_slab_that_is_there_keeps_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capacity, "free_bytes_of", lambda _: 10 << 30)
    folders = [tmp_path / name for name in "ab"]
    assert capacity.default_bytes_in(folders) == 1 << 29
    for folder, size_bytes in zip(folders, (3 << 20, 2 << 20), strict=True):
        folder.mkdir()
        (folder / SLAB_FILE).write_bytes(bytes(size_bytes))
        assert capacity.slab_bytes_in(folder) == size_bytes
    assert capacity.default_bytes_in(folders) == 3 << 20
    assert capacity.default_bytes_in([*folders, tmp_path]) == ((10 << 30) + (5 << 20)) // 10 // 3
    extent_bytes, extents = extents_for(100_000_000)
    assert extents_for(PAGE_BYTES + extents * extent_bytes) == (extent_bytes, extents)


def test_free_space_of_a_folder_to_be(tmp_path: Path) -> None:
    there = capacity.free_bytes_of(tmp_path)
    assert abs(capacity.free_bytes_of(tmp_path / "not" / "yet") - there) < 1 << 30
