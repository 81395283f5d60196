"""The demo's outcome, as a table for people and as one line of JSON for programs."""

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from worker.demo.story import BETWEEN_S, QUIET_S, Story
from worker.demo.worker_process import WorkerAnswer
from worker.engines.answer import Report


def as_json(story: Story) -> dict[str, Any]:
    """Everything that was measured, by name."""
    warm, killed, restarted = (
        answer.report for answer in (story.warm, story.after_kill, story.after_restart)
    )
    return {
        "prompt_tokens": story.prompt_tokens,
        "cold_ttft_s": round(story.cold.report.ttft_s, 4),
        "own_hit_ttft_s": round(story.own_hit.report.ttft_s, 4),
        "warm_ttft_s": round(warm.ttft_s, 4),
        "ttft_ratio": round(story.cold.report.ttft_s / warm.ttft_s, 2),
        "samples": {
            "own_hit_ttft_s": _ttfts_s(story.own_hits),
            "warm_ttft_s": _ttfts_s(story.warms),
            "warm_beside_disk_writes_ttft_s": _ttfts_s([story.first_warm]),
        },
        "cached_by_source": _by_source(warm),
        "warm_prefilled_tokens": warm.prefilled_tokens,
        "outputs_identical": story.outputs_identical,
        "after_kill": {
            "cached_tokens": killed.cached_tokens,
            "prefilled_tokens": killed.prefilled_tokens,
            "outputs_identical": story.is_like_cold(story.after_kill),
        },
        "after_restart": {
            "cached_tokens": restarted.cached_tokens,
            "cached_by_source": _by_source(restarted),
            "prefilled_tokens": restarted.prefilled_tokens,
            "outputs_identical": story.is_like_cold(story.after_restart),
            "ttft_s": round(restarted.ttft_s, 4),
        },
        "worker_pids": story.worker_pids,
        "storage_nodes": list(story.storage_nodes),
    }


def show(story: Story, console: Console) -> None:
    """Print the table, and what it says in a sentence."""
    title = f"{story.prompt_tokens} prompt tokens: the time to the first, and whence they came"
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("request")
    for heading in ("TTFT", "own", "local", "remote", "nvme", "prefilled", "same"):
        table.add_column(heading, justify="right")
    whole, begun = story.is_like_cold, story.begins_like_cold
    table.add_row("A: first question, cold", *_figures(story.first), "")
    for name, answer, is_same in (
        ("C: cold, no tier", story.cold, whole),
        (f"A: own cache, median of {len(story.own_hits)}", story.own_hit, begun),
        ("B: warm, the first time", story.first_warm, whole),
        (f"B: warm, median of {len(story.warms)}", story.warm, begun),
        ("B: after node 1's death", story.after_kill, whole),
        ("D: after the restart", story.after_restart, whole),
    ):
        table.add_row(name, *_figures(answer), "yes" if is_same(answer) else "NO")
    console.print(table)
    warm, restarted = story.warm.report, story.after_restart.report
    cold_s = story.cold.report.ttft_s
    console.print(
        f"Worker B's first token came {cold_s / warm.ttft_s:.1f} times sooner than without the "
        f"tier: {warm.cached_tokens} tokens were fetched, {warm.prefilled_tokens} were computed. "
        f"It took {warm.ttft_s / story.own_hit.report.ttft_s:.2f} times as long as an own hit."
    )
    console.print(
        "The samples behind the medians were taken in turns, once no node had written a block to "
        f"its disk for {QUIET_S:g} s, and each {BETWEEN_S:g} s behind an answer to the first "
        "question; each is of one token. B's first answer was not and has all: it is what made "
        "node 1 write the contract."
    )
    console.print(
        f"After the restart the first token came {cold_s / restarted.ttft_s:.1f} times sooner, "
        f"with {restarted.nvme_tokens} tokens from node 1's disk."
    )


def _ttfts_s(answers: Sequence[WorkerAnswer]) -> list[float]:
    return [round(answer.report.ttft_s, 4) for answer in answers]


def _by_source(report: Report) -> dict[str, int]:
    return {
        "local": report.local_tokens,
        "remote": report.remote_tokens,
        "nvme": report.nvme_tokens,
    }


def _figures(answer: WorkerAnswer) -> list[str]:
    report = answer.report
    cached = (report.own_tokens, report.local_tokens, report.remote_tokens, report.nvme_tokens)
    return [f"{report.ttft_s:.3f} s", *map(str, cached), str(report.prefilled_tokens)]
