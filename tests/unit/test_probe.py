"""The native look-up against its twin in numpy, on tables in every state that may be seen."""

import ctypes
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvstore import probe
from kvstore.fs import LinuxFileSystem
from kvstore.key import Keys
from kvstore.table import Found, KeyTable, SlotState
from tests.worlds import empty_table, shared_folder

FS = LinuxFileSystem()
SLOTS = 700
CELLS = 3


@pytest.fixture
def table() -> Iterator[KeyTable]:
    with shared_folder() as folder:
        yield empty_table(FS, folder, SLOTS)


@pytest.fixture(autouse=True)
def compiled() -> None:
    assert probe.is_native(), "native/probe.c was not compiled, or is of another version"


def same(left: Found, right: Found) -> bool:
    rows = left.held
    columns = ("slots", "generations", "offsets", "lengths", "header_digests")
    return np.array_equal(rows, right.held) and all(
        np.array_equal(getattr(left, name)[rows], getattr(right, name)[rows]) for name in columns
    )


def filled(table: KeyTable, rng: np.random.Generator) -> Keys:
    """Every slot committed, with a random key and cell."""
    keys = rng.integers(0, 256, (SLOTS, 32), np.uint8)
    for slot in range(SLOTS):
        record = table.slots[slot]
        record["generation"] = 1 << 40 | slot
        record["offset"] = slot * 4096
        record["length"] = slot + 1
        record["cell"] = slot % CELLS
    for slots in np.array_split(np.arange(SLOTS, dtype=np.uint32), 10):
        digests = slots.astype(np.uint64) * np.uint64(977)
        assert table.insert_all(keys[slots], slots, digests).all()
    return keys


@pytest.mark.parametrize("seed", range(20))
def test_both_answer_alike_whatever_the_table_looks_like(table: KeyTable, seed: int) -> None:
    rng = np.random.default_rng(seed)
    keys = filled(table, rng)
    hit = rng.integers(0, 8, SLOTS)
    table.slots["state"][hit == 1] = SlotState.QUARANTINED
    table.slots["generation"][hit == 2] += np.uint64(1)
    places = table.slots["entry"]
    flips = table.entries.view(np.uint8).reshape(-1, 64)
    torn = places[hit == 3]
    flips[torn, rng.integers(0, 64, len(torn))] ^= np.uint8(1)
    table.entries["slot"][places[hit == 4]] = 0xFFFFFF
    asked = np.concatenate([keys, rng.integers(0, 256, (50, 32), np.uint8)])
    cells = np.concatenate([np.arange(SLOTS) % CELLS, np.zeros(50)]).astype(np.uint8)
    cells[rng.integers(0, SLOTS, 30)] = CELLS
    order = rng.permutation(len(asked))
    found = table.find(asked[order], cells[order])
    assert same(found, table.find_in_numpy(asked[order], cells[order]))
    assert 0 < found.held.sum() < SLOTS, "the world should have hits and misses"


@pytest.mark.parametrize("count", [0, 1, 31, 32, 33, 64])
def test_any_number_of_rows(table: KeyTable, count: int) -> None:
    keys = filled(table, np.random.default_rng(count))[:count]
    found = table.find(keys, (np.arange(count) % CELLS).astype(np.uint8))
    assert found.held.all()
    assert found.slots.tolist() == list(range(count))
    assert found.lengths.tolist() == list(range(1, count + 1))


def test_keys_may_lie_anywhere(table: KeyTable) -> None:
    keys = filled(table, np.random.default_rng(1))
    cells = (np.arange(SLOTS) % CELLS).astype(np.uint8)
    assert table.find(keys[::-3], cells[::-3]).held.all()


@pytest.mark.parametrize("content", [None, b"not a library"])
def test_what_is_no_library_is_not_loaded(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "libprobe.so"
    if content is not None:
        path.write_bytes(content)
    assert probe.load(path) is None


def test_a_library_of_another_version_is_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(probe.load(probe.LIBRARY), ctypes.CDLL)
    monkeypatch.setattr(probe, "_VERSION", 99)
    assert probe.load(probe.LIBRARY) is None
