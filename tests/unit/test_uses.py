"""Uses: what readers note is taken once, read by read, whichever process noted it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvstore.fs import LinuxFileSystem
from kvstore.uses import Uses
from tests.worlds import shared_folder

FS = LinuxFileSystem()
SLOTS = 100


@pytest.fixture
def folder() -> Iterator[Path]:
    with shared_folder() as folder:
        yield folder


def slots(*numbers: int) -> np.ndarray[tuple[int], np.dtype[np.uint32]]:
    return np.array(numbers, np.uint32)


def noted(uses: Uses, *numbers: int) -> None:
    uses.note(slots(*numbers), uses.begin())


def taken(uses: Uses) -> list[list[int]]:
    return [some.tolist() for some in uses.take()]


def test_what_anybody_notes_is_taken_once_and_in_the_order_of_the_reads(folder: Path) -> None:
    node = Uses.create(FS, folder, SLOTS)
    readers = [Uses.map(FS, folder) for _ in range(2)]
    assert taken(node) == []
    first, second = readers[0].begin(), readers[1].begin()
    readers[1].note(slots(50, 7), second)
    readers[0].note(slots(99, 0), first)
    readers[0].note(slots(3), first)
    assert taken(node) == [[0, 3, 99], [7, 50]]
    assert taken(node) == []
    noted(readers[0], 1, 2)
    noted(readers[1], 2)
    assert taken(node) == [[1], [2]], "what was read twice counts with the later read"


def test_what_is_noted_while_the_node_takes_is_taken_the_next_time(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node, reader = Uses.create(FS, folder, SLOTS), Uses.map(FS, folder)
    look = np.argsort

    def meanwhile(*some: Any, **how: Any) -> Any:
        noted(reader, 3)
        return look(*some, **how)

    noted(reader, 1)
    with monkeypatch.context() as patched:
        patched.setattr(np, "argsort", meanwhile)
        assert taken(node) == [[1]]
    assert taken(node) == [[3]]


def test_a_number_that_goes_round_is_never_0(folder: Path) -> None:
    node = Uses.create(FS, folder, SLOTS)
    node._counter[0] = 0xFFFFFFFF
    assert node.begin() == 1


def test_who_has_the_file_of_a_former_node_does_no_harm(folder: Path) -> None:
    before = Uses.create(FS, folder, 10 * SLOTS)
    after = Uses.create(FS, folder, SLOTS)
    noted(before, 999, 3)
    assert taken(after) == []
