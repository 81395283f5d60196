"""Row ``node_death_detection_s``: how long a killed node passes for alive.

Three node processes in one map, their heartbeats running. One is killed with SIGKILL; measured is
until the later of the two others believes it unreachable, from when on clients pass it over. The
limit is the silence that makes a suspect: with less of it, a pause of a live node would look the
same.
"""

import time
from collections.abc import Iterator
from statistics import median

from benchmarks.figure import Budget, Figure, Sense
from benchmarks.measure import Others, Run
from benchmarks.storage_nodes import storage_nodes
from kvstore.membership import SUSPECT_AFTER_S

NODES = 3
ARENA_BYTES = 16 << 20
BUDGET = Budget(Sense.AT_MOST, 2.0)
SETTLE_S = 2.0
"""Until all have heard each other's heartbeats."""
TIMEOUT_S = 20.0


def measure(run: Run) -> Iterator[Figure]:
    """Another three nodes for every round."""
    others = Others()
    noticed = [_round(number) for number in run.track(range(run.of(5, 1)), "killing a node")]
    yield Figure(
        row="node_death_detection_s",
        variant=f"{NODES} nodes",
        value=max(noticed),
        unit="s",
        beside=f"the slowest round's last observer; median {median(noticed):.2f} s, silence that "
        f"makes a suspect {SUSPECT_AFTER_S:g} s",
        budget=BUDGET,
        low=min(noticed),
        high=max(noticed),
        rounds=len(noticed),
        others_cores=others.busy_cores(),
    )


def _round(number: int) -> float:
    with storage_nodes(*[ARENA_BYTES] * NODES) as nodes:
        # A different phase of the heartbeats each time.
        time.sleep(SETTLE_S + 0.1 * number)
        victim, *survivors = nodes
        for node in survivors:
            node.watch(victim.info.index)
        killed_s = victim.kill()
        return max(node.noticed_s(TIMEOUT_S) for node in survivors) - killed_s
