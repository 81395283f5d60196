"""Many worlds at once: a process for each processor of ours, and a new one for every few worlds.

``python -m tests.sim.many FIRST STOP [PROCESSES]`` runs the seeds from FIRST on and prints which of
them fail. What worlds leave behind is never collected: with the process that ran them it is gone at
once, which costs a tenth of it.
"""

import gc
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from tests.sim.scheduler import SimulationFailure
from tests.sim.world import World

ROOT = Path(__file__).parents[2]
MARK = "WORLD FAILED, SEED "
WORLDS_EACH = 20
"""So many are in memory before their process ends."""


@dataclass(frozen=True)
class Failed:
    """A world that did not keep its promises, with the last events before that."""

    seed: int
    report: str


def run_many(seeds: range) -> list[Failed]:
    """Run these worlds, in a process that has nothing else to do; those that failed."""
    command = [
        sys.executable, "-W", "error", "-m", "tests.sim.many", str(seeds.start), str(seeds.stop)
    ]  # fmt: skip
    alone = {
        **os.environ,
        "OPENBLAS_NUM_THREADS": "1",
    }  # a process with threads had better not fork
    done = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True, check=False)
    _, *reports = done.stdout.split(MARK)
    found = [Failed(int(seed), text) for seed, _, text in (r.partition("\n") for r in reports)]
    if done.returncode and not found:
        raise RuntimeError(f"the worlds ended with status {done.returncode}: {done.stderr}")
    return found


def our_processors() -> int:
    """How many there are, or this process's part of them when several share a run of the tests."""
    every = len(os.sched_getaffinity(0))
    return max(1, every // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))


def _reports(seeds: range, processes: int, folder: Path) -> Iterator[str]:
    """Fork a process for every few worlds, so many at a time; what they have to say."""
    gc.disable()
    gc.freeze()  # else all that was imported is copied, page by page, as it is looked at
    parent = os.getpid()
    shares = [seeds[at : at + WORLDS_EACH] for at in range(0, len(seeds), WORLDS_EACH)]
    running: dict[int, Path] = {}
    while shares or running:
        while shares and len(running) < processes:
            share = shares.pop(0)
            report = folder / str(share.start)
            child = os.fork()
            if not child:
                _run(share, parent, report)
            running[child] = report
        child, status = os.wait()
        if status:
            raise RuntimeError(f"a process ended with status {status}")
        yield running.pop(child).read_text()


def _run(seeds: range, parent: int, report: Path) -> NoReturn:
    """A child's share; it ends with its parent, and never returns to what that was doing."""
    failed = []
    for seed in seeds:
        if os.getppid() != parent:
            os._exit(1)
        try:
            World(seed).run()
        except SimulationFailure as failure:
            failed.append(f"{MARK}{seed}\n{failure}\n")
        except BaseException:
            failed.append(f"{MARK}{seed}\n{traceback.format_exc()}\n")
    report.write_text("".join(failed))
    os._exit(0)


def main(arguments: list[str]) -> int:
    """Prints what failed."""
    first, stop, *processes = map(int, arguments)
    count = processes[0] if processes else our_processors()
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for report in _reports(range(first, stop), count, Path(folder)):
            failed += report.count(MARK)
            print(report, end="", flush=True)
    print(f"{stop - first} worlds, {failed} failed", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
