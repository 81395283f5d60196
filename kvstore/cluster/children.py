"""The short-lived child processes of `samovar up`: `ray start`, and the bootstrap.

Each is in a session of its own: a Ctrl-C at the terminal reaches the command, which ends what it
started, and not Ray. Does not cover: what is started (`kvstore.cluster.ray_local`).
"""

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from kvstore.clock import Deadline
from kvstore.cluster.plan import TierPlan
from kvstore.errors import StateError
from kvstore.fs import FILE_MODE

_TAIL_BYTES = 400


def run_all(
    commands: Sequence[Sequence[str]],
    environment: Mapping[str, str],
    log_file: Path,
    deadline: Deadline,
) -> None:
    """Run the commands side by side until all have ended; raises StateError if one failed."""
    descriptor = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, FILE_MODE)
    children: list[subprocess.Popen[bytes]] = []
    try:
        # One by one into the list: an interrupt in between must find those that were started.
        children.extend(
            subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=descriptor,
                stderr=descriptor,
                start_new_session=True,
            )
            for command in commands
        )
        codes = [child.wait(deadline.remaining_s()) for child in children]
    except subprocess.TimeoutExpired:
        raise StateError(f"Ray did not start in time; see {log_file}") from None
    finally:
        os.close(descriptor)
        _kill(children)
    if any(codes):
        tail = log_file.read_text(errors="replace")[-_TAIL_BYTES:].strip().splitlines()
        raise StateError(f"Ray did not start: {tail[-1] if tail else 'no word'}; see {log_file}")


def bootstrap(
    address: str,
    plan: TierPlan,
    environment: Mapping[str, str],
    deadline: Deadline,
    tell: Callable[[str], None],
) -> None:
    """Make the tier in the Ray at `address`; raises StateError with the reason if that failed."""
    log_file = plan.folder.log_folder / "bootstrap.log"
    descriptor = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, FILE_MODE)
    try:
        child = subprocess.Popen(
            [sys.executable, "-m", "kvstore.cluster.bootstrap"],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=descriptor,
            start_new_session=True,
        )
    finally:
        os.close(descriptor)
    reason = f"the bootstrap broke off; see {log_file}"
    with child:
        try:
            assert child.stdin is not None
            assert child.stdout is not None
            child.stdin.write(pickle.dumps((address, plan, deadline.remaining_s())))
            child.stdin.close()
            for line in child.stdout:
                word = json.loads(line)
                if "error" in word:
                    reason = word["error"]
                else:
                    tell(f"{word['ready']} of {len(plan.storage)} storage nodes are ready")
        finally:
            _kill([child])
    if child.returncode != 0:
        raise StateError(f"the tier did not start: {reason}")


def _kill(children: Sequence[subprocess.Popen[bytes]]) -> None:
    """End those that still run, so that none is left behind as a zombie either."""
    for child in children:
        if child.poll() is None:
            child.kill()
            child.wait()
