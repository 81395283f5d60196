"""``make demo``: a cold prompt on one worker, the warm answer on another, across two nodes.

Does not cover: what is run (``worker.demo.story``), what is shown of it (``worker.demo.report``).
"""

import json
import sys
import tempfile
from pathlib import Path

import click
from rich.console import Console
from transformers import AutoTokenizer

from kvstore.clock import SystemClock
from kvstore.errors import SamovarError, UsageError
from worker.demo import report, story
from worker.demo.model import ensure_model
from worker.demo.progress import Show
from worker.demo.prompt import CONTRACT_PATH, QUESTIONS, Prompt, prompt_of
from worker.demo.tier import DemoTier


@click.command()
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    help="Folder of a local causal LM; by default SmolLM2-135M is fetched and converted once.",
)
@click.option("--new-tokens", default=32, show_default=True, help="Greedy tokens per answer.")
@click.option("--json", "as_json", is_flag=True, help="Print one last line of JSON.")
@click.option(
    "--cache-folder",
    type=click.Path(path_type=Path),
    default=Path.home() / ".cache" / "samovar",
    show_default="~/.cache/samovar",
    help="Where the fetched model is kept, and the tier's NVMe files during the demo.",
)
def main(model: Path | None, new_tokens: int, as_json: bool, cache_folder: Path) -> None:
    """Read a contract on one worker, answer about it on another without reading it again.

    Starts a tier of two storage nodes on this machine, runs three inference workers against it,
    kills a node, then everything, starts the tier again and asks once more, warm from its disks;
    takes everything down at the end.
    """
    console = Console(stderr=as_json, log_path=False)
    try:
        told = _run(model, new_tokens, cache_folder, console)
    except SamovarError as fault:
        console.print(f"[red]{fault}")
        sys.exit(2 if isinstance(fault, UsageError) else 1)
    report.show(told, console)
    if as_json:
        print(json.dumps(report.as_json(told)))


def _run(model: Path | None, new_tokens: int, cache_folder: Path, console: Console) -> story.Story:
    cache_folder.mkdir(parents=True, exist_ok=True)
    with (
        Show(console, SystemClock()) as show,
        tempfile.TemporaryDirectory(prefix="samovar-demo-") as work_name,
        # Not there: temporary files may well be in memory.
        tempfile.TemporaryDirectory(prefix="demo-disk-", dir=cache_folder) as disk_name,
    ):
        path = model or ensure_model(cache_folder, show.step)
        prompts = _prompts(path)
        work, disk = Path(work_name), Path(disk_name)
        show.step("starting a tier of two storage nodes")
        with DemoTier(work, disk, nodes=2, tell=show.step) as tier:
            return story.tell(tier, path, prompts, new_tokens, work, show)


def _prompts(model: Path) -> tuple[Prompt, Prompt]:
    if not (model / "config.json").is_file():
        raise UsageError(f"no model at {model}: give a folder with config.json and tensor files")
    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    document = CONTRACT_PATH.read_text()
    first, second = (prompt_of(tokenizer, document, question) for question in QUESTIONS)
    return first, second


if __name__ == "__main__":
    main()
