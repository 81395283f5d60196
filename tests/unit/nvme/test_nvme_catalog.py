"""The LMDB catalog: what was committed is read back, and what was altered is never believed."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import lmdb
import numpy as np
import pytest

from kvstore.tiers.nvme import catalog as catalog_module
from kvstore.tiers.nvme.catalog import (
    DATA_FILE,
    CatalogDamage,
    CatalogFault,
    Change,
    LmdbCatalog,
    read_catalog,
)
from kvstore.tiers.nvme.folder import CatalogFolder
from kvstore.tiers.nvme.identity import Identity
from kvstore.tiers.nvme.record import PAGE_BYTES, RECORD, TOMBSTONE, Records
from kvstore.tiers.nvme.walk import walk
from tests.source_tree import ROOT
from tests.worlds import key_number

IDENTITY = Identity(bytes(range(16)), "node-a", 1 << 20, 4)
CELLS = 40


def records_of(count: int, sequence: int = 1) -> Records:
    records = np.zeros(count, RECORD)
    for number in range(count):
        records["key"][number] = np.frombuffer(key_number(number), "<u8")
    records["length"] = 1000
    records["sequence"] = sequence
    records["offset"] = np.arange(count) * 4096
    return records


def tombstone_of(number: int) -> np.void:
    tombstone = np.zeros(1, TOMBSTONE)
    tombstone["key"] = np.frombuffer(key_number(number), "<u8")
    tombstone["deleted_ms"] = 17
    found: np.void = tombstone[0]
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A catalog with ``CELLS`` rows and a tombstone, closed."""
    catalog = LmdbCatalog.open(tmp_path / "catalog", IDENTITY, 64)
    catalog.commit(Change(puts=list(records_of(CELLS)), tombstones=[tombstone_of(99)]))
    catalog.close()
    return tmp_path / "catalog"


def test_what_was_committed_is_read_back(folder: Path) -> None:
    for content in (read_catalog(folder), walk(folder)):
        assert content.identity == IDENTITY.pack()
        order = np.argsort(content.records["offset"])
        assert (content.records[order] == records_of(CELLS)).all()
        assert content.tombstones[0] == tombstone_of(99)


def test_a_row_is_removed_only_by_who_entered_it(folder: Path) -> None:
    catalog = LmdbCatalog.open(folder, IDENTITY, 64)
    catalog.commit(Change(puts=list(records_of(2, sequence=5))))
    catalog.commit(Change(removals=list(records_of(3)), forgotten=[tombstone_of(99)]))
    catalog.close()
    content = read_catalog(folder)
    assert len(content.records) == CELLS - 1
    assert sorted(content.records["sequence"].tolist())[-2:] == [5, 5]
    assert not len(content.tombstones)


def test_a_commit_that_fails_changes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog_module, "_SPARE_BYTES", 1 << 16)
    catalog = LmdbCatalog.open(folder, IDENTITY, 1)
    with pytest.raises(CatalogFault, match=r"could not be written"):
        catalog.commit(Change(puts=list(records_of(4000, sequence=9))))
    catalog.commit(Change(removals=list(records_of(1))))
    catalog.close()
    content = read_catalog(folder)
    assert len(content.records) == CELLS - 1
    assert set(content.records["sequence"].tolist()) == {1}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (b"c" + key_number(1) + b"\0", b"short"),
        (b"c" + key_number(1) + b"\0", b"x" * (RECORD.itemsize + 8)),
        (b"t" + key_number(1), b"x" * (TOMBSTONE.itemsize + 8)),
        (b"z", b"nobody wrote this"),
        (b"m", b"too short"),
    ],
)
def test_an_altered_row_is_damage(folder: Path, name: bytes, value: bytes) -> None:
    with lmdb.open(str(folder), lock=False) as env, env.begin(write=True) as transaction:
        transaction.put(name, value)
    with pytest.raises(CatalogDamage):
        read_catalog(folder)


def test_a_row_under_another_key_is_damage(folder: Path) -> None:
    with lmdb.open(str(folder), lock=False) as env, env.begin(write=True) as transaction:
        moved = transaction.pop(b"c" + key_number(1) + b"\0")
        assert moved is not None
        transaction.put(b"c" + key_number(1) + b"\1", bytes(moved))
    with pytest.raises(CatalogDamage):
        walk(folder)


@pytest.mark.parametrize(
    ("ends", "is_damage"),
    [
        ("kill -KILL $$", False),
        ("kill -TERM $$", False),
        ("exit 4", False),
        ("kill -BUS $$", True),
        ("kill -SEGV $$", True),
        ("exit 1", True),
    ],
)
def test_a_reader_that_somebody_killed_says_nothing_of_the_catalog(
    folder: Path, monkeypatch: pytest.MonkeyPatch, ends: str, is_damage: bool
) -> None:
    reader = folder / "reader"
    reader.write_text(f"#!/bin/sh\n{ends}\n")
    reader.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(reader))
    with pytest.raises(CatalogDamage if is_damage else OSError):
        walk(folder)


def test_a_commit_that_a_full_disk_refuses_changes_nothing(folder: Path) -> None:
    catalog = LmdbCatalog.open(folder, IDENTITY, 4096)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((folder / DATA_FILE).stat().st_size, limits[1]))
    try:
        with pytest.raises(CatalogFault, match=r"could not be written"):
            catalog.commit(Change(puts=list(records_of(2000, sequence=9))))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    catalog.commit(Change(removals=list(records_of(1))))
    catalog.close()
    content = read_catalog(folder)
    assert len(content.records) == CELLS - 1
    assert set(content.records["sequence"].tolist()) == {1}


def test_hold_a_damaged_page_that_no_reader_comes_to_stops_no_writer(folder: Path) -> None:
    """LMDB's list of free pages: rows are read as if nothing were wrong, and commits fail."""
    before = LmdbCatalog.open(folder, IDENTITY, 64)
    for sequence in range(2, 6):
        before.commit(Change(puts=list(records_of(CELLS, sequence))))
    before.close()
    whole, content = (folder / DATA_FILE).read_bytes(), read_catalog(folder)
    unseen = 0
    for page in range(2, len(whole) // PAGE_BYTES):
        damaged = bytearray(whole)
        damaged[page * PAGE_BYTES : (page + 1) * PAGE_BYTES] = bytes(PAGE_BYTES)
        (folder / DATA_FILE).write_bytes(damaged)
        try:
            seen = walk(folder)
        except CatalogDamage:
            continue
        unseen += 1
        assert seen.records.tobytes() == content.records.tobytes()
        change = Change(puts=list(seen.records), tombstones=list(seen.tombstones))
        catalog = CatalogFolder(folder, 64).open(IDENTITY, change)
        for sequence in range(6, 10):
            catalog.commit(Change(puts=list(records_of(CELLS, sequence))))
        catalog.close()
        after = read_catalog(folder)
        assert set(after.records["sequence"].tolist()) == {9}
        assert after.tombstones.tobytes() == content.tombstones.tobytes()
    assert unseen
    assert [file.name for file in folder.iterdir()] == [DATA_FILE]


READS_ON_A_FULL_DISK = """
import sys
from pathlib import Path

def full(event, arguments):
    path, *rest = map(str, arguments)
    makes = event == "os.mkdir" or (event == "open" and any(c in rest[0] for c in "wax+"))
    if makes and path.startswith(sys.argv[1]):
        raise OSError(28, "no space left on device")

from kvstore.tiers.nvme.catalog import read_catalog
sys.addaudithook(full)
print(len(read_catalog(Path(sys.argv[1])).records))
"""


def test_a_catalog_is_read_on_a_full_disk_and_leaves_nothing_there(folder: Path) -> None:
    """A copy beside it would say "damaged" for want of room, and stay if its reader is killed."""
    done = subprocess.run(
        [sys.executable, "-c", READS_ON_A_FULL_DISK, str(folder)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout.strip()) == (0, str(CELLS)), done.stderr
    assert [file.name for file in folder.iterdir()] == [DATA_FILE]


FLIPS = """
import os, random, sys
from pathlib import Path
from kvstore.tiers.nvme.catalog import CatalogDamage, read_catalog
folder, seed, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
data = folder / "data.mdb"
good, content = data.read_bytes(), read_catalog(folder)
rng = random.Random(seed)
outcomes = []
os.close(2)  # a fork that aborts says so there
for _ in range(count):
    bit = rng.randrange(len(good) * 8)
    bad = bytearray(good)
    bad[bit // 8] ^= 1 << bit % 8
    data.write_bytes(bad)
    child = os.fork()
    if not child:
        try:
            seen = read_catalog(folder)
        except CatalogDamage:
            os._exit(3)
        same = seen.records.tobytes() == content.records.tobytes()
        os._exit(0 if same and seen.tombstones.tobytes() == content.tombstones.tobytes() else 4)
    status = os.waitpid(child, 0)[1]
    outcomes.append(("signal" if os.WIFSIGNALED(status) else
                     {0: "same", 3: "damage", 4: "another"}.get(os.WEXITSTATUS(status), "crash")))
data.write_bytes(good)
print({name: outcomes.count(name) for name in sorted(set(outcomes))})
"""


@pytest.mark.parametrize(
    ("seed", "count"), [(1, 150), pytest.param(2, 3000, marks=pytest.mark.slow)]
)
def test_hold_a_flipped_bit_is_never_another_content(folder: Path, seed: int, count: int) -> None:
    """Same content, damage, or the end of the process that looks; see ``walk`` for the last."""
    command = [sys.executable, "-c", FLIPS, str(folder), str(seed), str(count)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "another" not in done.stdout, done.stdout
    assert "crash" not in done.stdout, done.stdout
    assert "damage" in done.stdout, done.stdout


def test_an_older_state_of_lmdb_is_damage(folder: Path) -> None:
    """A flipped bit in the newer root's number: LMDB shows what was there before."""
    data = folder / "data.mdb"
    image = bytearray(data.read_bytes())
    at = max((144, 4096 + 144), key=lambda start: image[start])
    image[at] ^= 1 << (image[at].bit_length() - 1)
    data.write_bytes(image)
    with pytest.raises(CatalogDamage, match=r"roots|older"):
        read_catalog(folder)
