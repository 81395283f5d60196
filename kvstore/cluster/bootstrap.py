"""What `samovar up` runs in a process of its own once Ray is there: `python -m` this module.

A process of its own, because Ray reads the environment when it is loaded, and because whoever
called `up` may use another Ray. Takes a pickled `(address, TierPlan, patience_s)` on its standard
input and writes a line of JSON per change to its standard output; a last line with `error` says
why it did not work. Does not cover: who starts it (`kvstore.cluster.launch`).
"""

import json
import pickle
import sys

from kvstore.clock import SystemClock
from kvstore.cluster.coordinator import Progress
from kvstore.cluster.plan import TierPlan
from kvstore.cluster.ray_tier import bring_up
from kvstore.errors import SamovarError


def main() -> int:
    """Bring the tier up; answers the exit code."""
    address, plan, patience_s = _order()
    told = -1

    def tell(progress: Progress) -> None:
        nonlocal told
        if len(progress.current) != told:
            told = len(progress.current)
            print(json.dumps({"ready": told}), flush=True)

    try:
        bring_up(address, plan, SystemClock(), patience_s, tell)
    except SamovarError as error:
        print(json.dumps({"error": str(error)}), flush=True)
        return 1
    return 0


def _order() -> tuple[str, TierPlan, float]:
    address, plan, patience_s = pickle.load(sys.stdin.buffer)
    assert isinstance(plan, TierPlan)
    return str(address), plan, float(patience_s)


if __name__ == "__main__":
    sys.exit(main())
