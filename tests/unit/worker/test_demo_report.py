"""The demo's outcome: medians that are real samples, every promised field, and a readable table."""

import io

import pytest
from rich.console import Console

from tests.unit.worker.worker_answers import TOKENS, answered
from worker.demo.report import as_json, show
from worker.demo.story import Story, median_of
from worker.demo.worker_process import WorkerAnswer

FIRST_TOKEN = TOKENS[:1]


def begun(ttft_s: float, tokens: tuple[int, ...] = FIRST_TOKEN) -> WorkerAnswer:
    """A warm answer that was cut short."""
    return answered(ttft_s, remote=90, tokens=tokens)


def told(last_warm: WorkerAnswer, first_warm: WorkerAnswer | None = None) -> Story:
    own_hits = (answered(ttft_s, own=90, tokens=FIRST_TOKEN) for ttft_s in (0.2, 0.1, 5.0))
    return Story(
        prompt_tokens=100,
        first=answered(11, tokens=(1,)),
        first_warm=first_warm or answered(0.9, remote=90),
        own_hits=tuple(own_hits),
        warms=(begun(0.5), begun(0.3), last_warm),
        cold=answered(10),
        after_kill=answered(9),
        after_restart=answered(0.4, nvme=90),
        worker_pids={"A": 1},
        storage_nodes=("node-0", "node-1"),
    )


def test_a_median_is_one_of_the_answers() -> None:
    answers = [answered(ttft_s) for ttft_s in (3, 1, 2)]
    assert median_of(answers) is answers[2]
    assert median_of(answers[:2]) is answers[1]


def test_the_json_has_medians_samples_and_sources() -> None:
    got = as_json(told(begun(0.4)))
    assert got["cold_ttft_s"] == 10
    assert got["own_hit_ttft_s"] == 0.2
    assert got["warm_ttft_s"] == 0.4
    assert got["ttft_ratio"] == 25
    assert got["samples"] == {
        "own_hit_ttft_s": [0.2, 0.1, 5.0],
        "warm_ttft_s": [0.5, 0.3, 0.4],
        "warm_beside_disk_writes_ttft_s": [0.9],
    }
    assert got["cached_by_source"] == {"local": 0, "remote": 90, "nvme": 0}
    assert got["warm_prefilled_tokens"] == 10
    assert got["outputs_identical"]
    assert got["after_kill"] == {
        "cached_tokens": 0,
        "prefilled_tokens": 100,
        "outputs_identical": True,
    }
    assert got["after_restart"] == {
        "cached_tokens": 90,
        "cached_by_source": {"local": 0, "remote": 0, "nvme": 90},
        "prefilled_tokens": 10,
        "outputs_identical": True,
        "ttft_s": 0.4,
    }


def test_one_warm_answer_with_other_tokens_is_told() -> None:
    other_token, other_end = begun(0.4, tokens=(6,)), answered(0.9, remote=90, tokens=(5, 6, 8))
    for story in (told(other_token), told(begun(0.4), first_warm=other_end)):
        got = as_json(story)
        assert not got["outputs_identical"]
        assert got["after_restart"]["outputs_identical"]


@pytest.mark.parametrize("width", [80, 200])
def test_the_table_names_every_request_in_one_line(width: int) -> None:
    out = io.StringIO()
    show(told(begun(0.4)), Console(file=out, width=width))
    lines = out.getvalue().splitlines()
    for words in ("C: cold, no tier", "A: own cache, median of 3", "D: after the restart"):
        assert sum(words in line for line in lines) == 1
    assert sum(" yes" in line for line in lines) == 6
    assert "25.0 times sooner" in " ".join(lines)
    assert "90 tokens from node 1's disk" in " ".join(" ".join(lines).split())
