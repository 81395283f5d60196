"""The benchmark command: it says which rows there are, and its cheap rows run.

Does not cover: what they measure. A smoke test's sizes are no measurement, so no figure is
compared with anything here.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks import catalog
from benchmarks.__main__ import main
from benchmarks.figure import Budget, Figure, Sense, Skip, beside_limit
from benchmarks.measure import Pairs, Run, paired

CHEAP = (
    "same_node_get",
    "same_node_put",
    "lookup_100k",
    "arena_fill",
    "node_metadata_bytes",
    "directory_bytes",
)
DISK = ("nvme_put", "nvme_get_cold", "restart_100k_blocks_s")
ENGINE = ("ttft_warm_vs_cold", "ttft_vs_own_cache", "connector_cold_cost", "cuda_ttft")
PROMISED = {*CHEAP, *DISK, *ENGINE, "cross_node_get", "node_death_detection_s"}


def test_every_promised_row_is_listed() -> None:
    done = CliRunner().invoke(main, ["--list"])
    assert done.exit_code == 0
    assert {row.name for row in catalog.ROWS} == PROMISED
    assert all(name in done.output for name in PROMISED)


def test_every_row_has_its_module() -> None:
    folder = Path(catalog.__file__).parent
    assert all((folder / f"{row.name}.py").is_file() for row in catalog.ROWS)


def test_an_unknown_row_is_refused() -> None:
    done = CliRunner().invoke(main, ["no_such_row"])
    assert done.exit_code == 2
    assert "--list" in done.output


def test_cheap_rows_run_quickly(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    done = CliRunner().invoke(main, [*CHEAP, "--quick", "--json", str(out)])
    assert done.exit_code == 0, done.output
    told = json.loads(out.read_text())
    assert {figure["row"] for figure in told["figures"]} == set(CHEAP)
    assert all(figure["value"] > 0 and figure["beside"] for figure in told["figures"])
    assert told["conditions"]["cores"] >= 1


@pytest.mark.slow
def test_disk_rows_run_or_say_why_not(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    done = CliRunner().invoke(main, [*DISK, "--quick", "--json", str(out)])
    assert done.exit_code == 0, done.output
    told = json.loads(out.read_text())
    assert {one["row"] for one in [*told["figures"], *told["skipped"]]} == set(DISK)
    assert all(one["value"] > 0 for one in told["figures"])
    assert all("O_DIRECT" in one["why"] for one in told["skipped"])


def test_a_row_without_its_library_is_skipped() -> None:
    done = CliRunner().invoke(main, [ENGINE[0], "--quick"])
    assert done.exit_code == 0
    assert "skipped: needs" in done.output


@pytest.mark.engine
def test_the_row_of_a_gpu_says_that_it_needs_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    done = CliRunner().invoke(main, ["cuda_ttft", "--quick"])
    assert done.exit_code == 0
    assert "skipped: needs a GPU" in done.output


def test_a_row_that_can_not_be_measured_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(run: Run) -> None:
        raise Skip("the moon is not full")

    monkeypatch.setattr("benchmarks.lookup_100k.measure", measure)
    done = CliRunner().invoke(main, ["lookup_100k"])
    assert done.exit_code == 0
    assert "the moon" in done.output


def test_sides_of_a_pair_take_turns_in_going_first() -> None:
    order = []

    def side(name: str, seconds: float) -> float:
        order.append(name)
        return seconds

    pairs = paired(lambda: side("ours", 2.0), lambda: side("limit", 1.0), range(2))
    assert order == ["limit", "ours", "limit", "ours", "ours", "limit"]
    assert pairs.costs == [2.0, 2.0]
    assert pairs.speeds == [0.5, 0.5]


def test_the_interval_of_a_median_leaves_out_what_is_rare() -> None:
    """Of 60 samples the 23rd and the 38th, by the binomial distribution."""
    costs = tuple(float(cost) for cost in np.random.default_rng(1).permutation(60))
    pairs = Pairs(ours_s=costs, limit_s=(1.0,) * 60, cpu_cost=1.0, others_cores=0.0)
    assert pairs.cost_interval == (22.0, 37.0)
    few = Pairs(ours_s=(3.0, 1.0, 2.0), limit_s=(1.0,) * 3, cpu_cost=1.0, others_cores=0.0)
    assert few.cost_interval == (1.0, 3.0), "too few to leave any out"


@pytest.mark.parametrize(
    ("sense", "value", "within"),
    [(Sense.AT_LEAST, 0.5, False), (Sense.AT_MOST, 2.0, True)],
)
def test_a_budget_decides_whether_much_or_little_is_good(
    sense: Sense, value: float, within: bool
) -> None:
    pairs = Pairs(ours_s=(4.0, 4.0), limit_s=(2.0, 2.0), cpu_cost=1.0, others_cores=0.0)
    figure: Figure = beside_limit("row", "variant", pairs, Budget(sense, 2.0), "x", "the limit")
    assert figure.value == value
    assert figure.within is within
