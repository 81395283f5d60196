"""The weights revision: shared by copies, changed by swapped weights or configuration."""

import json
import logging
import os
from pathlib import Path

import pytest

from kvstore.errors import UsageError
from worker.weights import DigestMemory, adapter_digest, tensor_files, weights_revision

CONFIG = {"rope_theta": 10_000.0, "num_hidden_layers": 2}


def no_progress(name: str, done_bytes: int, size_bytes: int) -> None:
    """Says nothing."""


def model(folder: Path, **files: bytes) -> Path:
    """A model folder whose files are ``name=content``, with ``.safetensors`` behind each name."""
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / f"{name}.safetensors").write_bytes(content)
    return folder


@pytest.fixture
def memory(tmp_path: Path) -> DigestMemory:
    return DigestMemory(tmp_path / "state" / "weights.json")


def test_two_paths_to_one_model_share(tmp_path: Path, memory: DigestMemory) -> None:
    one = model(tmp_path / "one", model=b"weights")
    other = model(tmp_path / "other", renamed=b"weights")
    (other / "tokenizer.json").write_text("{}")
    linked = tmp_path / "linked"
    linked.symlink_to(one)
    revisions = {weights_revision(path, CONFIG, memory) for path in (one, other, linked)}
    assert len(revisions) == 1


def test_swapped_weights_do_not_share(tmp_path: Path, memory: DigestMemory) -> None:
    path = model(tmp_path / "m", model=b"weights")
    before = weights_revision(path, CONFIG, memory)
    (path / "new").write_bytes(b"WEIGHTS")
    (path / "new").replace(path / "model.safetensors")
    assert weights_revision(path, CONFIG, memory) != before


def test_weights_swapped_in_place_with_their_old_times_do_not_share(
    tmp_path: Path, memory: DigestMemory
) -> None:
    path = model(tmp_path / "m", model=b"weights")
    file = path / "model.safetensors"
    stat = file.stat()
    before = weights_revision(path, CONFIG, memory)
    file.write_bytes(b"WEIGHTS")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert weights_revision(path, CONFIG, memory) != before


def test_configuration_that_reaches_kv_counts(tmp_path: Path, memory: DigestMemory) -> None:
    path = model(tmp_path / "m", model=b"weights")
    plain = weights_revision(path, CONFIG, memory)
    assert weights_revision(path, CONFIG | {"rope_theta": 5.0}, memory) != plain
    assert weights_revision(path, CONFIG | {"quantization_config": {"bits": 4}}, memory) != plain
    harmless = {"_name_or_path": "/x", "transformers_version": "9", "eos_token_id": 7}
    assert weights_revision(path, CONFIG | harmless, memory) == plain


def test_unchanged_files_are_read_once(tmp_path: Path) -> None:
    path = model(tmp_path / "m", model=b"weights")
    state = tmp_path / "weights.json"
    read: list[tuple[str, int, int]] = []

    def progress(name: str, done_bytes: int, size_bytes: int) -> None:
        read.append((name, done_bytes, size_bytes))

    first = weights_revision(path, CONFIG, DigestMemory(state), progress=progress)
    assert read == [("model.safetensors", 7, 7)]
    assert weights_revision(path, CONFIG, DigestMemory(state), progress=progress) == first
    assert len(read) == 1
    assert state.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("content", [b"", b"not json", b"[1]", b'{"a": 1}'])
def test_a_torn_memory_costs_only_time(tmp_path: Path, content: bytes) -> None:
    path = model(tmp_path / "m", model=b"weights")
    state = tmp_path / "weights.json"
    expected = weights_revision(path, CONFIG, DigestMemory(state))
    state.write_bytes(content)
    assert weights_revision(path, CONFIG, DigestMemory(state)) == expected


def test_a_memory_that_cannot_be_written_warns(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    path = model(tmp_path / "m", model=b"weights")
    weights_revision(path, CONFIG, DigestMemory(tmp_path / "file" / "weights.json"))
    assert "can't be remembered" in caplog.text


def test_shards_are_those_of_the_index(tmp_path: Path, memory: DigestMemory) -> None:
    path = model(tmp_path / "m", a=b"1", b=b"2", unused=b"3")
    index = {"weight_map": {"x": "b.safetensors", "y": "a.safetensors", "z": "a.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert [file.name for file in tensor_files(path)] == ["a.safetensors", "b.safetensors"]
    (path / "a.safetensors").unlink()
    with pytest.raises(UsageError, match=r"lacks tensor files: a\.safetensors"):
        weights_revision(path, CONFIG, memory)


def test_a_model_id_replaces_the_files_and_says_so(
    tmp_path: Path, memory: DigestMemory, caplog: pytest.LogCaptureFixture
) -> None:
    one = model(tmp_path / "one", model=b"weights")
    other = model(tmp_path / "other", model=b"other weights")
    with caplog.at_level(logging.WARNING):
        revisions = {
            weights_revision(path, CONFIG, memory, model_id="m-1") for path in (one, other)
        }
    assert len(revisions) == 1
    assert "m-1" in caplog.text
    assert weights_revision(one, CONFIG, memory) not in revisions


def test_adapters_are_told_apart_by_content(tmp_path: Path, memory: DigestMemory) -> None:
    digests = []
    for name, content in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        path = model(tmp_path / name, adapter_model=content)
        config = {"r": 8, "base_model_name_or_path": f"/models/{name}"}
        (path / "adapter_config.json").write_text(json.dumps(config))
        digests.append(adapter_digest(path, memory, no_progress))
    assert digests[0] == digests[1] != digests[2]
    with pytest.raises(UsageError, match=r"adapter_config\.json is missing"):
        adapter_digest(model(tmp_path / "d", adapter_model=b"1"), memory)


@pytest.mark.parametrize("name", ["missing", "empty"])
def test_refuses_a_path_without_a_model(tmp_path: Path, memory: DigestMemory, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=name):
        weights_revision(tmp_path / name, CONFIG, memory)
