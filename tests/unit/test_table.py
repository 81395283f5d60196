"""The key table against a dict, at full load, and seen while it is being written."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kvstore import table as table_module
from kvstore.errors import StateError
from kvstore.fs import LinuxFileSystem
from kvstore.key import Keys
from kvstore.table import (
    ENTRY,
    HEADER,
    LOAD_MAX,
    TABLE_FILE,
    WAYS,
    KeyTable,
    SlotState,
)
from tests.source_tree import ROOT
from tests.worlds import PAGE, cells_of, empty_table, key_number, packed

FS = LinuxFileSystem()


def publish(table: KeyTable, key: bytes, slot: int, cell: int = 0, generation: int = 1) -> bool:
    record = table.slots[slot]
    record["generation"] = generation
    record["cell"] = cell
    record["length"] = 100 + slot
    record["offset"] = slot * PAGE
    one = np.array([slot], np.uint32), np.array([slot * 7], np.uint64)
    return bool(table.insert_all(packed([key]), *one)[0])


def random_keys(count: int) -> Keys:
    return np.random.default_rng(1).integers(0, 256, (count, 32), np.uint8)


def test_find_agrees_with_a_dict(folder: Path) -> None:
    rng = np.random.default_rng(2)
    table = empty_table(FS, folder, slots=2000)
    keys = random_keys(800)
    oracle: dict[tuple[int, int], int] = {}
    unused = list(range(2000))
    for generation in range(1, 3000):
        name = int(rng.integers(800)), int(rng.integers(4))
        if name in oracle:
            slot = oracle.pop(name)
            table.clear(slot)
            unused.insert(0, slot)
        elif unused:
            slot = unused.pop()
            assert publish(table, keys[name[0]].tobytes(), slot, name[1], generation)
            oracle[name] = slot
    names = [(key, cell) for key in range(800) for cell in range(4)]
    found = table.find(keys[[key for key, _ in names]], cells_of(*(cell for _, cell in names)))
    for row, name in enumerate(names):
        assert found.held[row] == (name in oracle)
        if name in oracle:
            slot = oracle[name]
            assert found.slots[row] == slot
            assert found.offsets[row] == slot * PAGE
            assert found.lengths[row] == 100 + slot
            assert found.header_digests[row] == slot * 7
            assert found.generations[row] == table.slots[slot]["generation"]
            assert table.key_of(slot) == keys[name[0]].tobytes()


def test_nothing_asked_nothing_found(folder: Path) -> None:
    table = empty_table(FS, folder, slots=8)
    assert len(table.find(packed([]), cells_of()).held) == 0
    assert not table.find(packed([key_number(1)]), cells_of(0)).held[0]
    assert not table.find(packed([bytes(32)]), cells_of(0)).held[0]


def fill(table: KeyTable, keys: Keys, cells: int) -> int:
    """Publish every cell of every key; how many found no place."""
    unplaced = 0
    for slot in range(len(keys) * cells):
        unplaced += not publish(table, keys[slot // cells].tobytes(), slot, slot % cells)
    return unplaced


@pytest.mark.parametrize("cells", [1, 2, 64])
def test_a_full_table_places_everything(folder: Path, cells: int) -> None:
    slots = int(512 * WAYS * LOAD_MAX) // 64 * 64
    table = empty_table(FS, folder, slots)
    assert slots / LOAD_MAX <= len(table.entries) < slots / LOAD_MAX + WAYS
    assert fill(table, random_keys(slots // cells), cells) == 0
    held = table.find(
        np.repeat(random_keys(slots // cells), cells, axis=0),
        np.tile(np.arange(cells, dtype=np.uint8), slots // cells),
    )
    assert held.held.all()
    assert held.slots.tolist() == list(range(slots))


def test_two_full_buckets_refuse_and_name_their_slots(folder: Path) -> None:
    table = empty_table(FS, folder, slots=22)
    placed = [slot for slot in range(22) if publish(table, same_buckets(slot), slot)]
    assert len(placed) == 2 * WAYS
    assert sorted(table.rivals(same_buckets(99), 0)) == placed
    assert not publish(table, same_buckets(99), 21)
    table.clear(placed[3])
    assert publish(table, same_buckets(99), 21)


def same_buckets(number: int) -> bytes:
    """Keys that differ only where no bucket is chosen: always the first one and the middle one."""
    return bytes(8) + (1 << 63).to_bytes(8, "little") + (2 * number).to_bytes(16, "little")


def test_no_cell_is_believed_that_is_not_committed(folder: Path) -> None:
    table = empty_table(FS, folder, slots=8)
    publish(table, key_number(1), 0, generation=5)
    for state in SlotState:
        table.slots["state"][0] = state
        held = bool(table.find(packed([key_number(1)]), cells_of(0)).held[0])
        assert held == (state is SlotState.COMMITTED)
        assert table.is_current(0, 5, state)
    table.slots["state"][0] = SlotState.COMMITTED
    table.slots["generation"][0] = 6
    assert not table.find(packed([key_number(1)]), cells_of(0)).held[0]
    assert not table.is_current(0, 5, SlotState.COMMITTED)
    assert not table.is_current(8, 6, SlotState.COMMITTED)


def test_every_flipped_bit_of_an_entry_is_found(folder: Path) -> None:
    table = empty_table(FS, folder, slots=8)
    publish(table, key_number(1), 3)
    entry = int(table.slots["entry"][3])
    raw = table.entries[entry : entry + 1].view(np.uint8)
    three = np.array([3], np.uint32)
    for bit in range(8 * ENTRY.itemsize):
        raw[bit // 8] ^= 1 << bit % 8
        assert not table.find(packed([key_number(1)]), cells_of(0)).held[0], f"bit {bit}"
        assert not table.entries_are_whole(three)[0], f"bit {bit}"
        raw[bit // 8] ^= 1 << bit % 8
    assert table.find(packed([key_number(1)]), cells_of(0)).held[0]
    assert table.entries_are_whole(three)[0]


def test_a_wild_slot_number_is_a_miss(folder: Path) -> None:
    table = empty_table(FS, folder, slots=8)
    publish(table, key_number(1), 3)
    entry = int(table.slots["entry"][3])
    row = table.entries[entry : entry + 1]
    row["slot"] = 0xFFFFFFF0
    row["fold"] = table_module._fold(row)
    found = table.find(packed([key_number(1)]), cells_of(0))
    assert not found.held[0]
    assert not table.expired(found.slots, 1)[0], "rows that are not held can still be looked at"


def test_mixes_of_two_entries_do_not_fold() -> None:
    """Small numbers on purpose: slots and counters are small, and folds of them must differ."""
    rng = np.random.default_rng(3)
    count = 200_000
    rows = np.zeros(2 * count, ENTRY)
    rows["key"] = rng.integers(0, 1 << 63, (1, 4), np.uint64)  # the same key, stored again
    rows["generation"] = (1 << 40) + rng.integers(1, 4096, 2 * count).astype(np.uint64)
    rows["slot"] = rng.integers(0, 1024, 2 * count)
    rows["length"] = 4096
    rows["header_digest"] = rng.integers(0, 1 << 63, 2 * count, np.uint64)
    rows["fold"] = table_module._fold(rows)
    words = rows.view("<u8").reshape(2, count, 8)
    torn = np.where(rng.integers(0, 2, (count, 8), np.uint8) == 1, words[0], words[1])
    whole = (torn == words[0]).all(axis=1) | (torn == words[1]).all(axis=1)
    mixed = np.ascontiguousarray(torn[~whole]).view(ENTRY).reshape(-1)
    assert len(mixed) > count // 2
    accepted = int((table_module._fold(mixed) == mixed["fold"]).sum())
    assert accepted == 0


def test_folds_of_small_numbers_do_not_cancel() -> None:
    rows = np.zeros(64 * 64, ENTRY)
    numbers = np.arange(64 * 64)
    rows["generation"], rows["slot"] = numbers // 64, numbers % 64
    assert len(np.unique(table_module._fold(rows))) == 64 * 64


WRITER = """
import sys
from pathlib import Path
from kvstore.fs import LinuxFileSystem
from kvstore.table import KeyTable
table = KeyTable.map(LinuxFileSystem(), Path(sys.argv[1]), writable=True)
entry = int(table.slots["entry"][0])
rows = [table.entries[entry].copy(), table.entries[int(table.slots["entry"][1])].copy()]
print("go", flush=True)
while True:
    for _ in range(1000):
        table.entries[entry] = rows[1]
        table.entries[entry] = rows[0]
"""


def test_a_reader_never_takes_one_entry_for_another(folder: Path) -> None:
    """Another process rewrites an entry without pause: a row is the key's own, or a miss."""
    table = empty_table(FS, folder, slots=22)
    mine, other = same_buckets(1), same_buckets(2)
    publish(table, mine, 0)
    publish(table, other, 1)
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder)],
        env={"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"go\n"
        keys, cells = packed([mine] * 64), np.zeros(64, np.uint8)
        seen: set[int] = set()
        for _ in range(2000):
            found = table.find(keys, cells)
            seen |= set(found.slots[found.held].tolist())
        assert seen <= {0}
    finally:
        writer.kill()
        writer.communicate()


def test_only_a_key_table_is_mapped(folder: Path) -> None:
    with pytest.raises(StateError, match="has not started"):
        KeyTable.map(FS, folder)
    (folder / TABLE_FILE).write_bytes(b"x" * 10)
    with pytest.raises(StateError, match="is not a key table"):
        KeyTable.map(FS, folder)
    (folder / TABLE_FILE).write_bytes(b"x" * 100_000)
    with pytest.raises(StateError, match="is not a key table"):
        KeyTable.map(FS, folder)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("magic", b"", "is not a key table"),
        ("version", 1, "format version 1, this is version 3"),
        ("slots", 9, "torn"),
        ("slots", 1 << 63, "torn"),
        ("buckets", 0, "torn"),
        ("buckets", 3, "torn"),
        ("buckets", 1 << 60, "torn"),
    ],
)
def test_torn_or_foreign_tables_are_refused(
    folder: Path, field: str, value: int | bytes, words: str
) -> None:
    table = empty_table(FS, folder, slots=8)
    table.header[field] = value
    with pytest.raises(StateError, match=words):
        KeyTable.map(FS, folder)


def test_a_table_without_buckets_is_refused_at_its_right_size_too(folder: Path) -> None:
    table = empty_table(FS, folder, slots=8)
    size = (folder / TABLE_FILE).stat().st_size
    table.header["slots"] = int(table.header["slots"]) + len(table.entries)
    table.header["buckets"] = 0
    assert (folder / TABLE_FILE).stat().st_size == size
    with pytest.raises(StateError, match="torn"):
        KeyTable.map(FS, folder)


def test_a_table_is_what_its_header_says(folder: Path) -> None:
    table = empty_table(FS, folder, slots=100)
    again = KeyTable.map(FS, folder)
    assert HEADER.itemsize < 4096
    assert len(again.slots) == 100
    assert again.store_id == table.store_id
    assert any(again.store_id)
    publish(table, key_number(1), 7)
    assert again.find(packed([key_number(1)]), cells_of(0)).slots[0] == 7
    with pytest.raises(ValueError, match="read-only"):
        again.slots["state"][0] = 1
    before = table.store_id
    assert empty_table(FS, folder, slots=100).store_id != before
