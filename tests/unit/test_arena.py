"""The arena: backed up front, mapped by many, given back where it is retired."""

from pathlib import Path

import pytest

from kvstore.arena import ARENA_FILE, SPARSE_FACTOR, Arena
from kvstore.errors import ConfigError
from kvstore.fs import LinuxFileSystem
from tests.faults import FaultyFileSystem
from tests.worlds import PAGE

FS = LinuxFileSystem()
CAPACITY = 8 * PAGE


def backed_bytes(folder: Path) -> int:
    return (folder / ARENA_FILE).stat().st_blocks * 512


def test_only_its_capacity_is_backed(folder: Path) -> None:
    arena = Arena.create(FS, folder, CAPACITY)
    assert arena.size_bytes == CAPACITY * SPARSE_FACTOR
    assert backed_bytes(folder) == CAPACITY


def test_everybody_sees_the_same_bytes(folder: Path) -> None:
    arena = Arena.create(FS, folder, CAPACITY)
    other = Arena.map(FS, folder)
    arena.view(PAGE, 4)[:] = 3
    assert other.view(PAGE, 4).tolist() == [3] * 4
    with pytest.raises(ValueError, match="read-only"):
        Arena.map(FS, folder, writable=False).view(0, 4)[:] = 1


def test_retired_memory_is_replaced_elsewhere(folder: Path) -> None:
    arena = Arena.create(FS, folder, CAPACITY)
    arena.punch(2 * PAGE, 2 * PAGE)
    assert backed_bytes(folder) == CAPACITY - 2 * PAGE
    arena.back(CAPACITY, 2 * PAGE)
    assert backed_bytes(folder) == CAPACITY
    arena.populate(CAPACITY, 2 * PAGE)
    arena.view(CAPACITY, 2 * PAGE)[:] = 1


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (0, CAPACITY * SPARSE_FACTOR + 1)])
def test_a_view_outside_is_a_bug(folder: Path, offset: int, length: int) -> None:
    arena = Arena.create(FS, folder, CAPACITY)
    with pytest.raises(AssertionError, match="outside the arena"):
        arena.view(offset, length)


def test_too_little_shared_memory_is_said_and_leaves_nothing(folder: Path) -> None:
    # Page tables and the file's length have limits of their own far above a machine's memory.
    too_much = -(-FS.free_bytes(folder) * 2 // PAGE) * PAGE
    with pytest.raises(ConfigError, match=r"no room for an arena .* lower arena_bytes"):
        Arena.create(FS, folder, too_much)
    assert list(folder.iterdir()) == []


def test_any_failing_operation_ends_in_an_error_and_a_second_try_works(folder: Path) -> None:
    for fail_at in range(1, 50):
        fs = FaultyFileSystem(FS, fail_at)
        try:
            Arena.create(fs, folder, CAPACITY)
        except (OSError, ConfigError):
            assert fs.faults
        else:
            assert not fs.faults, "a fault was swallowed"
            return
        assert Arena.create(FS, folder, CAPACITY).size_bytes == CAPACITY * SPARSE_FACTOR
    pytest.fail("no run without a fault")
