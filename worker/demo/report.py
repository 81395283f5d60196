"""The demo's outcome, as a table for people and as one line of JSON for programs."""

from typing import Any

from rich.console import Console
from rich.table import Table

from worker.demo.story import Story
from worker.demo.worker_process import WorkerAnswer


def as_json(story: Story) -> dict[str, Any]:
    """Everything that was measured, by name."""
    warm, after = story.warm.report, story.after_kill.report
    return {
        "prompt_tokens": story.prompt_tokens,
        "cold_ttft_s": round(story.cold.report.ttft_s, 4),
        "own_hit_ttft_s": round(story.own_hit.report.ttft_s, 4),
        "warm_ttft_s": round(warm.ttft_s, 4),
        "ttft_ratio": round(story.cold.report.ttft_s / warm.ttft_s, 2),
        "cached_by_source": {
            "local": warm.local_tokens,
            "remote": warm.remote_tokens,
            "nvme": warm.nvme_tokens,
        },
        "warm_prefilled_tokens": warm.prefilled_tokens,
        "outputs_identical": story.outputs_identical,
        "after_kill": {
            "cached_tokens": after.cached_tokens,
            "prefilled_tokens": after.prefilled_tokens,
            "outputs_identical": story.after_kill.tokens == story.cold.tokens,
        },
        "worker_pids": story.worker_pids,
        "storage_nodes": list(story.storage_nodes),
    }


def show(story: Story, console: Console) -> None:
    """Print the table, and what it says in a sentence."""
    table = Table(title=f"{story.prompt_tokens} prompt tokens, time to the first token")
    for heading in (
        "request",
        "TTFT",
        "own",
        "local",
        "remote",
        "nvme",
        "prefilled",
        "same tokens",
    ):
        table.add_column(heading, justify="left" if heading == "request" else "right")
    rows = {
        "A: first question, cold": story.first,
        "C: second question, no tier": story.cold,
        "A: second question, own cache": story.own_hit,
        "B: second question, warm": story.warm,
        "B: after node 1 was killed": story.after_kill,
    }
    for name, answer in rows.items():
        same = "" if answer is story.first else _mark(answer.tokens == story.cold.tokens)
        table.add_row(name, *_figures(answer), same)
    console.print(table)
    ratio = story.cold.report.ttft_s / story.warm.report.ttft_s
    console.print(
        f"Worker B's first token came {ratio:.1f} times sooner than without the tier: "
        f"{story.warm.report.cached_tokens} tokens were fetched, "
        f"{story.warm.report.prefilled_tokens} were computed."
    )


def _figures(answer: WorkerAnswer) -> list[str]:
    report = answer.report
    cached = (report.own_tokens, report.local_tokens, report.remote_tokens, report.nvme_tokens)
    return [f"{report.ttft_s:.3f} s", *map(str, cached), str(report.prefilled_tokens)]


def _mark(same: bool) -> str:
    return "yes" if same else "NO"
