"""The process that sends copies of a node's cells to other nodes: ``python -m kvstore.copier``.

A process of its own, and niced, so that look-ups of the node keep their latency. It is a client of
its own node and of those that it sends to, does one errand after the other, and ends with its
parent, however that ends. Killed, it loses nothing: leases and reservations end with its sessions.

Does not cover: the parent's side (``copier_process``), the copying itself (``copying``).
"""

import argparse
import itertools
import os
import select
import socket
import sys
import threading
from pathlib import Path

from kvstore import child
from kvstore.clock import Clock, Deadline, SystemClock
from kvstore.copier_process import ERRAND_S
from kvstore.copying import Source, Target, copy
from kvstore.errand import Done, Errand
from kvstore.errors import SamovarError
from kvstore.fs import LinuxFileSystem
from kvstore.leaf_sizes import LeafSizes
from kvstore.rpc.client import ControlClient
from kvstore.secret import read_secret
from kvstore.table import KeyTable
from kvstore.transport.mapped import MappedNode
from kvstore.transport.tcp import TcpTransport

NICENESS = 5
TARGETS_MAX = 4
"""Nodes that it stays connected to."""


class Copier:
    """Does errands for the node at ``control``, whose arena is in ``folder``."""

    def __init__(self, control: str, folder: Path, token: str | None, clock: Clock) -> None:
        fs = LinuxFileSystem()
        own = ControlClient(control, token, clock=clock)
        mapped, table = MappedNode.map(fs, folder), KeyTable.map(fs, folder)
        self._source = Source(own, mapped, table, LeafSizes())
        self._targets: dict[tuple[str, str], Target] = {}
        self._operations = itertools.count(1)
        self._token = token
        self._clock = clock

    def run(self, errand: Errand) -> Done:
        """Do one; a node that does not answer is a reason, and no exception."""
        deadline = Deadline.after(self._clock, ERRAND_S)
        name = errand.control, errand.bulk
        try:
            arrived = copy(
                errand.keys, errand.cells, errand.burials, self._source, self._target(*name),
                deadline, next(self._operations),
            )  # fmt: skip
        except SamovarError as fault:
            self._hang_up(name)
            return Done(0, str(fault))
        return Done(arrived)

    def _target(self, control: str, bulk: str) -> Target:
        name = control, bulk
        target = self._targets.pop(name, None)
        if target is None:
            token = None if self._token is None else self._token.encode()
            access = ControlClient(control, self._token, clock=self._clock)
            target = Target(access, TcpTransport(bulk, token))
        self._targets[name] = target  # the last one used is the last one
        if len(self._targets) > TARGETS_MAX:
            self._hang_up(next(iter(self._targets)))
        return target

    def _hang_up(self, name: tuple[str, str]) -> None:
        target = self._targets.pop(name, None)
        if target is not None:
            target.access.close()
            target.transport.close()


def main() -> int:
    """Serve until the parent ends or hangs up."""
    arguments = _parse()
    parent = child.follow(arguments.parent)
    if parent is None:
        return 1
    os.nice(NICENESS)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    try:
        token = read_secret(arguments.token_file)
        copier = Copier(arguments.control, arguments.folder, token, SystemClock())
    except (SamovarError, OSError) as fault:
        print(f"copying process: {fault}", file=sys.stderr)
        return 2
    with socket.socket(fileno=arguments.socket) as connected:
        for line in connected.makefile("rb"):
            connected.sendall(copier.run(Errand.unpack(line)).pack())
    # Sessions would be ended one by one: nobody waits for that.
    os._exit(0)


def _end_with(parent: int) -> None:
    """In the middle of whatever it is: nothing of it is lost."""
    select.select([parent], [], [])
    os._exit(0)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="kvstore.copier")
    parser.add_argument("--control", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--token-file", type=Path)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--socket", type=int, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
