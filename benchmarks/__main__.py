"""The benchmarks' command: ``python -m benchmarks [ROW ...]``.

Does not cover: what a row measures (the module of its name says), which rows there are
(``benchmarks.catalog``).
"""

import logging
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.catalog import ROWS, Row
from benchmarks.figure import Figure, Skipped
from benchmarks.measure import Run
from benchmarks.report import as_json, conditions, one_line, show, show_conditions


@click.command(
    epilog="""\b
Examples:
  python -m benchmarks                        every row, about 10 minutes
  python -m benchmarks same_node_get          one row
  python -m benchmarks --quick --json out.json  a smoke test of all, with small sizes
A figure is the median of pairs: ours and the limit in turns, in one process, so that a busy machine
slows both. On a shared one look at the ratios, not at the speeds.
"""
)
@click.argument("names", metavar="[ROW]...", nargs=-1)
@click.option("--list", "list_only", is_flag=True, help="Say which rows there are, and stop.")
@click.option("--quick", is_flag=True, help="Small sizes and few rounds: not for comparing.")
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False),
              help="Also write figures and conditions to this file.")  # fmt: skip
@click.option(
    "--model",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="A local model folder for the TTFT rows  [default: SmolLM2-135M, fetched once]",
)
@click.option("--strict", is_flag=True, help="Exit with 1 if a budget was missed.")
def main(
    names: tuple[str, ...],
    list_only: bool,
    quick: bool,
    json_file: Path | None,
    model: Path | None,
    strict: bool,
) -> None:
    """Measure what the project claims, each ROW beside its limit in the same run.

    Without a ROW all are measured. A row says "skipped" and why when it can't be measured here.
    """
    console = Console()
    if list_only:
        _list(console)
        return
    logging.basicConfig(level=logging.ERROR)
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # it tells of every child that is started
    # Ended from outside, leave no shared memory and no storage node behind.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    found = conditions()
    show_conditions(console, found)
    outcomes: list[Figure | Skipped] = []
    for outcome in _measure(console, _chosen(names), quick, model):
        outcomes.append(outcome)
        # At once: a run that is cut off has said what it found.
        if json_file is not None:
            json_file.write_text(as_json(found, outcomes) + "\n")
    show(console, outcomes)
    missed = [one for one in outcomes if isinstance(one, Figure) and not one.within]
    if strict and missed:
        raise click.exceptions.Exit(1)


def _chosen(names: Sequence[str]) -> list[Row]:
    """The rows with these names, in the order in which they are listed; all if none is named."""
    known = {row.name for row in ROWS}
    for name in names:
        if name not in known:
            raise click.UsageError(f"there is no row {name!r}: --list says which there are")
    return [row for row in ROWS if not names or row.name in names]


def _list(console: Console) -> None:
    table = Table("row", "claim", "takes")
    for row in ROWS:
        table.add_row(row.name, row.claim, row.takes)
    console.print(table)


def _measure(
    console: Console, rows: Sequence[Row], quick: bool, model: Path | None
) -> Iterator[Figure | Skipped]:
    """The outcomes as they come, each said in a line."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        overall = progress.add_task("rows", total=len(rows))

        def track(rounds: Iterable[int], label: str) -> Iterator[int]:
            numbers = list(rounds)
            task = progress.add_task(label, total=len(numbers))
            for number in numbers:
                yield number
                progress.advance(task)
            progress.remove_task(task)

        run = Run(quick, track, model)
        for row in rows:
            progress.update(overall, description=row.name)
            for outcome in row.measure(run):
                progress.console.print(one_line(outcome))
                yield outcome
            progress.advance(overall)


if __name__ == "__main__":
    main()
