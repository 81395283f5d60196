"""Many worlds at once: a child process for each processor, which stays on it.

``python -m tests.sim.many FIRST STOP [PROCESSES]`` runs the seeds from FIRST on and prints which of
them fail. A child that stays on one processor hands over between its threads, of which only one
runs at a time, at a third less cost.
"""

import gc
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.sim.scheduler import SimulationFailure
from tests.sim.world import World

ROOT = Path(__file__).parents[2]
MARK = "WORLD FAILED, SEED "
WORLDS_KEPT = 8
"""So many are in memory before they are collected: within a world it is wasted time."""


@dataclass(frozen=True)
class Failed:
    """A world that did not keep its promises, with the last events before that."""

    seed: int
    report: str


def run_many(seeds: range, processes: int = 0) -> list[Failed]:
    """Run these worlds, side by side; those that failed."""
    processors = sorted(os.sched_getaffinity(0))
    count = processes or len(processors)
    children = []
    try:
        for number in range(count):
            share = seeds[number::count]
            command = [
                sys.executable, "-W", "error", "-m", "tests.sim.many", "--on",
                str(processors[number % len(processors)]),
                str(share.start), str(share.stop), str(share.step),
            ]  # fmt: skip
            children.append(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True))
        return [failed for child in children for failed in _failed(child)]
    finally:
        for child in children:
            child.kill()
            child.wait()


def _failed(child: "subprocess.Popen[str]") -> list[Failed]:
    output, _ = child.communicate()
    _, *reports = output.split(MARK)
    found = [Failed(int(seed), text) for seed, _, text in (r.partition("\n") for r in reports)]
    if child.returncode and not found:
        raise RuntimeError(f"a child ended with status {child.returncode}: {output}")
    return found


def _share(processor: int, seeds: range) -> int:
    os.sched_setaffinity(0, {processor})
    failures = 0
    gc.disable()
    gc.freeze()  # what was imported stays
    for number, seed in enumerate(seeds):
        if number % WORLDS_KEPT == 0:
            gc.collect()
        try:
            World(seed).run()
        except SimulationFailure as failure:
            failures += 1
            print(f"{MARK}{seed}\n{failure}", flush=True)
    return 1 if failures else 0


def main(arguments: list[str]) -> int:
    """A child's share, or what was asked for by hand."""
    if arguments[0] == "--on":
        processor, *seeds = map(int, arguments[1:])
        return _share(processor, range(*seeds))
    first, stop, *processes = map(int, arguments)
    failed = run_many(range(first, stop), *processes)
    for one in failed:
        print(f"{MARK}{one.seed}\n{one.report}")
    print(f"{stop - first} worlds, {len(failed)} failed: {[one.seed for one in failed]}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
