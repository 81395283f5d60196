"""The weights revision: a digest of what determines a model's KV, the same on every machine.

    tensor files ── BLAKE3 each (remembered by device, inode, size and times) ─┐
    configuration as the engine runs it (RoPE, quantisation, overrides) ───────┴─ BLAKE3 ─> revision

Two paths to one model get one revision; one path whose weights were swapped gets another. File
names, the tokenizer, and settings that do not reach KV (such as special token ids) don't count.
An adapter is digested by content in the same way. A ``model_id`` replaces the tensor files by a
name, for who knows that two different sets of files are one model; the log says so.

Does not cover: KV's shape and form (see ``worker.geometry``).
"""

import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from kvstore.errors import UsageError

Progress = Callable[[str, int, int], None]
"""Called with a file's name, the bytes digested so far, and its size in bytes."""

READ_BYTES = 16 << 20
REMEMBERED_FILES_MAX = 4096
_TENSOR_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_TENSOR_SUFFIXES = (".safetensors", ".bin", ".gguf")
_NOT_KV = frozenset(
    {
        "_name_or_path",
        "_attn_implementation",
        "_attn_implementation_internal",
        "architectures",
        "attention_dropout",
        "base_model_name_or_path",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token_id",
        "id2label",
        "initializer_range",
        "is_decoder",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "problem_type",
        "return_dict",
        "revision",
        "torch_dtype",
        "transformers_version",
        "unk_token_id",
        "use_cache",
    }
)
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _FileIdentity:
    """What changes when a file's content does."""

    device: int
    inode: int
    size_bytes: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, path: Path) -> "_FileIdentity":
        stat = path.stat()
        return cls(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)

    @property
    def text(self) -> str:
        return f"{self.device}:{self.inode}:{self.size_bytes}:{self.mtime_ns}:{self.ctime_ns}"


class DigestMemory:
    """File digests remembered in one JSON file; losing it costs only time.

    Several processes may share the file: each write replaces it whole, and what another wrote
    between is digested again.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._digests = self._read()

    def digest(self, path: Path, progress: Progress) -> str:
        """The BLAKE3 of a file's content, hex; reads it only if it is not remembered."""
        identity = _FileIdentity.of(path)
        known = self._digests.get(identity.text)
        if known is not None:
            return known
        value = _digest_file(path, identity.size_bytes, progress)
        if _FileIdentity.of(path) != identity:
            raise UsageError(f"{path} changed while it was read: start again once it is whole")
        self._digests[identity.text] = value
        self._write()
        return value

    def _read(self) -> dict[str, str]:
        try:
            digests = json.loads(self._path.read_bytes())
        except (OSError, ValueError):
            return {}
        if not isinstance(digests, dict):
            return {}
        return {name: value for name, value in digests.items() if isinstance(value, str)}

    def _write(self) -> None:
        newest = list(self._digests.items())[-REMEMBERED_FILES_MAX:]
        whole = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            whole.touch(mode=0o600)
            whole.write_text(json.dumps(dict(newest)))
            whole.replace(self._path)
        except OSError as error:
            _log.warning("weights digests can't be remembered in %s: %s", self._path, error)


def _no_progress(name: str, done_bytes: int, size_bytes: int) -> None:
    """Says nothing."""


def weights_revision(
    model_path: Path,
    config: Mapping[str, Any],
    memory: DigestMemory,
    *,
    model_id: str = "",
    progress: Progress = _no_progress,
) -> str:
    """The revision of the model at ``model_path`` as an engine with ``config`` runs it, hex."""
    if model_id:
        _log.warning("weights revision from model id %r: %s not read", model_id, model_path)
        sources = [f"model-id:{model_id}"]
    else:
        sources = sorted(memory.digest(path, progress) for path in tensor_files(model_path))
    return _combined("samovar 2026 weights v1", sources, config)


def adapter_digest(
    adapter_path: Path, memory: DigestMemory, progress: Progress = _no_progress
) -> str:
    """The digest of an adapter's tensors and configuration, hex."""
    config_path = adapter_path / "adapter_config.json"
    if not config_path.is_file():
        raise UsageError(f"{adapter_path} holds no adapter: adapter_config.json is missing")
    config = json.loads(config_path.read_bytes())
    digests = sorted(memory.digest(path, progress) for path in tensor_files(adapter_path))
    return _combined("samovar 2026 adapter v1", digests, config)


def tensor_files(model_path: Path) -> list[Path]:
    """The files that an engine loads tensors from, links resolved by the file system."""
    if model_path.is_file() and model_path.suffix in _TENSOR_SUFFIXES:
        return [model_path]
    if not model_path.is_dir():
        raise UsageError(f"no model at {model_path}: give a folder with config and tensor files")
    for name in _TENSOR_FILES:
        path = model_path / name
        if path.is_file():
            return _shards(path) if name.endswith(".json") else [path]
    for suffix in _TENSOR_SUFFIXES:
        found = sorted(model_path.glob(f"*{suffix}"))
        if found:
            return found
    raise UsageError(f"{model_path} holds no tensor files ({', '.join(_TENSOR_SUFFIXES)})")


def _shards(index_path: Path) -> list[Path]:
    names = set(json.loads(index_path.read_bytes())["weight_map"].values())
    shards = [index_path.parent / name for name in sorted(names)]
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise UsageError(f"{index_path.parent} lacks tensor files: {', '.join(missing)}")
    return shards


def _digest_file(path: Path, size_bytes: int, progress: Progress) -> str:
    hasher = blake3(max_threads=blake3.AUTO)
    buffer = memoryview(bytearray(min(READ_BYTES, max(size_bytes, 1))))
    done_bytes = 0
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            hasher.update(buffer[:count])
            done_bytes += count
            progress(path.name, done_bytes, size_bytes)
    return hasher.hexdigest()


def _combined(context: str, sources: list[str], config: Mapping[str, Any]) -> str:
    relevant = {name: value for name, value in config.items() if name not in _NOT_KV}
    text = json.dumps([sources, relevant], sort_keys=True, default=str)
    return blake3(text.encode(), derive_key_context=context).hexdigest()
