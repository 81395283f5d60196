"""The whole demo, with a tiny model: real workers, a real tier, killed and started again."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.tiny import tiny_model
from tests.source_tree import ROOT

pytestmark = [pytest.mark.engine, pytest.mark.cluster, pytest.mark.slow]

PATIENCE_S = 600.0


def save_model(folder: Path) -> None:
    """A random model whose tokens are the contract's words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    from worker.demo.prompt import CONTRACT_PATH

    whole = Tokenizer(WordLevel({"?": 0}, unk_token="?"))
    whole.pre_tokenizer = Whitespace()
    words = [word for word, _ in whole.pre_tokenizer.pre_tokenize_str(CONTRACT_PATH.read_text())]
    names = {name: number for number, name in enumerate(dict.fromkeys(["?", *words]))}
    whole.model = WordLevel(names, unk_token="?")
    PreTrainedTokenizerFast(tokenizer_object=whole, unk_token="?").save_pretrained(folder)
    model: Any = tiny_model(
        torch.float32, vocab_size=len(names), max_position_embeddings=8192, num_hidden_layers=2
    )
    model.save_pretrained(folder)


def test_everything_is_killed_and_the_answer_is_warm_from_nvme(tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    command = [sys.executable, "-m", "worker.demo", "--json", "--new-tokens", "4"]
    folders = ["--model", str(tmp_path / "model"), "--cache-folder", str(tmp_path / "cache")]
    done = subprocess.run(
        [*command, *folders], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["outputs_identical"]
    assert told["cached_by_source"]["remote"] > 0.9 * told["prompt_tokens"]
    assert told["after_kill"] == {
        "cached_tokens": 0,
        "prefilled_tokens": told["prompt_tokens"],
        "outputs_identical": True,
    }
    restarted = told["after_restart"]
    assert restarted["outputs_identical"]
    assert restarted["cached_by_source"]["nvme"] == restarted["cached_tokens"]
    # What was deleted before each warm answer, the question, was stored again by the last one.
    assert restarted["cached_tokens"] >= sum(told["cached_by_source"].values())
    assert restarted["prefilled_tokens"] == told["prompt_tokens"] - restarted["cached_tokens"]
    assert not list((tmp_path / "cache").iterdir())
