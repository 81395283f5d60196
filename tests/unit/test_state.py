"""The state folder: what is written, who may read it, what is refused."""

import json
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from kvstore.cluster_map import ClusterMap, NodeInfo
from kvstore.errors import StateError, UsageError
from kvstore.state import ProcessRecord, Remains, TierFolder, TierRecord

REMAINS = Remains("0123456789ab", "boot", ("/dev/shm/x",), (ProcessRecord("raylet", 7, 99),))
RECORD = TierRecord("a", 2, 1 << 20, 6379, "/r", ("/dev/shm/x",), REMAINS)
NODE = NodeInfo(0, "a-0", "boot:a:0", 3, "127.0.0.1:1", "127.0.0.1:2", "/dev/shm/x")


@pytest.fixture
def folder(tmp_path: Path) -> TierFolder:
    made = TierFolder.of(tmp_path, "a")
    with made.claim():
        pass
    return made


def test_record_comes_back(folder: TierFolder) -> None:
    assert folder.read() is None
    assert folder.remains() is None
    folder.write(RECORD)
    assert folder.read() == RECORD
    assert folder.remains() == REMAINS
    folder.forget()
    assert folder.read() is None


def test_map_comes_back(folder: TierFolder) -> None:
    assert folder.read_map() == ClusterMap(0, ())
    written = ClusterMap(7, (NODE,), block_tokens=128, tier_id="0123456789ab")
    folder.write_map(written)
    folder.forget()
    assert folder.read_map() == written


def test_token_is_made_once(folder: TierFolder) -> None:
    assert folder.token(b"\x01" * 32) == "01" * 32
    assert folder.token(b"\x02" * 32) == "01" * 32


def test_only_the_owner_reads(folder: TierFolder) -> None:
    folder.write(RECORD)
    folder.write_map(ClusterMap(1, (NODE,)))
    folder.token(b"\x01" * 32)
    for path in (folder.path, *folder.path.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


def test_one_command_at_a_time(folder: TierFolder) -> None:
    refused = pytest.raises(StateError, match="another samovar command")
    with folder.claim(), refused, folder.claim():
        pass
    with folder.claim():
        pass


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="--state-folder"), TierFolder(tmp_path / "file/a").claim():
        pass


@pytest.mark.parametrize("name", ["state_version", "format_version"])
def test_another_version_is_refused_by_name(folder: TierFolder, name: str) -> None:
    folder.write(RECORD)
    file = folder.path / "tier.json"
    content = json.loads(file.read_text())
    # A later version may know things that this one does not.
    file.write_text(json.dumps(content | {name: 77, "novelty": [1]}))
    with pytest.raises(StateError, match=r"77.*this samovar has 1 and 1.*down --purge"):
        folder.read()
    assert folder.remains() == REMAINS


@pytest.mark.parametrize("text", ["", "{", "[]", '{"state_version": 1, "format_version": 1}'])
def test_damaged_record_is_refused(folder: TierFolder, text: str) -> None:
    (folder.path / "tier.json").write_text(text)
    with pytest.raises(StateError, match="damaged"):
        folder.read()
    with pytest.raises(StateError, match="damaged"):
        folder.remains()


@pytest.mark.parametrize("text", ["", "[]", '{"epoch": 1, "nodes": [{}]}'])
def test_damaged_map_is_refused(folder: TierFolder, text: str) -> None:
    (folder.path / "map.json").write_text(text)
    with pytest.raises(StateError, match="damaged"):
        folder.read_map()


def test_record_is_replaced_whole(folder: TierFolder) -> None:
    folder.write(RECORD)
    (folder.path / ".tier.json.new").write_text("{half a rec")  # what a crash leaves
    assert folder.read() == RECORD
    folder.write(replace(RECORD, nodes=3))
    assert not (folder.path / ".tier.json.new").exists()


def test_purge_leaves_nothing(folder: TierFolder) -> None:
    folder.write(RECORD)
    with folder.claim():
        folder.purge()
    assert not folder.path.exists()


def test_disks_are_remembered_until_the_purge(folder: TierFolder) -> None:
    assert folder.disks() == ()
    for disk in ("/disk/one", "/disk/two", "/disk/one"):
        folder.note_disk(Path(disk))
    folder.write(RECORD)
    folder.forget()
    assert folder.disks() == (Path("/disk/one"), Path("/disk/two"))
    (folder.path / "disks.json").write_text("{")
    with pytest.raises(StateError, match="damaged"):
        folder.disks()
    folder.purge()
    assert folder.disks() == ()


def test_a_record_without_a_disk_is_read(folder: TierFolder) -> None:
    folder.write(replace(RECORD, nvme_bytes=64 << 20))
    assert folder.read() == replace(RECORD, nvme_bytes=64 << 20)
    file = folder.path / "tier.json"
    content = json.loads(file.read_text())
    del content["nvme_bytes"]
    file.write_text(json.dumps(content))
    assert folder.read() == RECORD
