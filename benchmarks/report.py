"""How figures are shown: one rich table with the conditions above it, and a JSON document.

A figure without its conditions says nothing, so both carry the machine, its load and the versions
of everything that moves or hashes bytes.
"""

import json
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.figure import Figure, Skipped

VERSIONS = ("samovar", "numpy", "blake3", "xxhash", "grpcio", "torch", "transformers", "ray")


def conditions() -> dict[str, str | int | float]:
    """The machine as it is now, and the versions that matter."""
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_1min": round(os.getloadavg()[0], 2),
        **{name: version for name in VERSIONS if (version := _version(name))},
    }


def show_conditions(console: Console, found: dict[str, str | int | float]) -> None:
    """One paragraph of what was measured on."""
    words = ", ".join(f"{name} {value}" for name, value in found.items())
    console.print(Text(words, style="dim"))


def one_line(outcome: Figure | Skipped) -> Text:
    """A figure in a few words, for a run that is still going on."""
    name = f"{outcome.row} {outcome.variant}".rstrip()
    if isinstance(outcome, Skipped):
        return Text(f"{name}: skipped: {outcome.why}", "dim")
    return Text.assemble(f"{name}: {outcome.value:.3g} {outcome.unit} ", _verdict(outcome, " "))


def show(console: Console, outcomes: Sequence[Figure | Skipped]) -> None:
    """The table: what was measured, whether it keeps its budget, and beside what."""
    table = Table("row", "figure", "budget", "measured beside", show_lines=True)
    for one in outcomes:
        name = Text.assemble(one.row, "\n", (one.variant, "dim"))
        if isinstance(one, Skipped):
            table.add_row(name, Text("-"), Text(""), Text(f"skipped: {one.why}"))
        else:
            table.add_row(name, _value(one), _verdict(one), _beside(one))
    console.print(table)
    console.print(Text("A figure is the median of its rounds, the extremes below it.", "dim"))


def as_json(found: dict[str, str | int | float], outcomes: Iterable[Figure | Skipped]) -> str:
    """The same as a document: conditions, figures, and what was skipped and why."""
    figures, skipped = [], []
    for one in outcomes:
        if isinstance(one, Skipped):
            skipped.append(asdict(one))
            continue
        budget = None if one.budget is None else str(one.budget)
        figures.append({**asdict(one), "budget": budget, "within": one.within})
    return json.dumps({"conditions": found, "figures": figures, "skipped": skipped}, indent=2)


def _value(figure: Figure) -> Text:
    extremes = f"\n{figure.low:.3g} to {figure.high:.3g}" if figure.rounds > 1 else ""
    return Text.assemble(f"{figure.value:.3g} {figure.unit}", (extremes, "dim"))


def _verdict(figure: Figure, between: str = "\n") -> Text:
    if figure.budget is None:
        return Text("")
    kept = ("ok", "green") if figure.within else ("MISSED", "bold red")
    return Text.assemble(f"{figure.budget}{between}", kept)


def _beside(figure: Figure) -> Text:
    rounds = f"{figure.rounds} rounds, others kept {figure.others_cores:.1f} cores busy"
    if figure.best:
        rounds += f"; fastest beside fastest {figure.best:.3g}"
    return Text.assemble(figure.beside, "\n", (rounds, "dim"))


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""
