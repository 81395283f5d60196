"""The process that reads and writes a node's slab: ``python -m kvstore.tiers.nvme.worker``.

    socket ──> request ──> the queue of its first stage ──> ... of its last stage ──> answer

Every stage has threads of its own, so a read never waits behind a write, and a write not behind
the wiping of a slot. It maps the node's arena, so that bytes go between arena and disk and nowhere
else, and ends with its parent, however that ends.

Does not cover: the parent's side (``disk_process``), the work itself (``drive``, ``recovery``).
"""

import argparse
import os
import secrets
import socket
import sys
import threading
import traceback
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue

from kvstore import child
from kvstore.arena import Arena
from kvstore.errors import StateError
from kvstore.fs import LinuxFileSystem
from kvstore.table import KeyTable
from kvstore.tiers.nvme.disk import LinuxDisk
from kvstore.tiers.nvme.drive import GROUPED, STAGES, Drive, Stage
from kvstore.tiers.nvme.folder import CATALOG_FOLDER, CatalogFolder
from kvstore.tiers.nvme.recovery import Recovered, Wanted, recover
from kvstore.tiers.nvme.requests import (
    ANSWER,
    REQUEST_BYTES,
    Opening,
    OpeningKind,
    Outcome,
    Request,
    no_opening,
    unpack_request,
)
from kvstore.tiers.nvme.slab import SLAB_FILE
from kvstore.transport.mapped import MappedNode
from kvstore.uses import Uses

THREADS = {Stage.READ: 4, Stage.WRITE: 4, Stage.COMMIT: 1, Stage.WIPE: 2, Stage.SYNC: 1}
GROUP_MAX = 256
"""Requests that are made durable together."""
_RECEIVE_BYTES = 1 << 16
_BROKEN = 3


class Worker:
    """Shares requests out among threads, and answers them."""

    def __init__(self, drive: Drive, connected: socket.socket) -> None:
        self._drive = drive
        self._socket = connected
        self._sending = threading.Lock()
        self._queues: dict[Stage, SimpleQueue[Request]] = {s: SimpleQueue() for s in THREADS}

    def start(self) -> None:
        """Start the threads."""
        for stage, count in THREADS.items():
            for _ in range(count):
                name = f"samovar-disk-{stage.name.lower()}"
                threading.Thread(target=self._run, args=(stage,), name=name, daemon=True).start()

    def take(self, request: Request) -> None:
        """Put a request where it belongs."""
        self._queues[STAGES[request.kind][0]].put(request)

    def _run(self, stage: Stage) -> None:
        """The life of a thread. Without it requests would wait for ever: they fail instead."""
        try:
            self._work(stage)
        except BaseException:
            traceback.print_exc()
            os._exit(_BROKEN)

    def _work(self, stage: Stage) -> None:
        queue = self._queues[stage]
        while True:
            group = [queue.get()]
            if stage in GROUPED:
                with suppress(Empty):
                    while len(group) < GROUP_MAX:
                        group.append(queue.get_nowait())
            for request, outcome in zip(group, self._drive.do(stage, group), strict=True):
                self._go_on(request, stage, outcome)
            if self._drive.is_broken:
                os._exit(_BROKEN)

    def _go_on(self, request: Request, stage: Stage, outcome: Outcome) -> None:
        """To the next stage, or back to who asked."""
        stages = STAGES[request.kind]
        if outcome is Outcome.DONE and stage is not stages[-1]:
            self._queues[stages[stages.index(stage) + 1]].put(request)
        else:
            self._answer(request, outcome)

    def _answer(self, request: Request, outcome: Outcome) -> None:
        try:
            with self._sending:
                self._socket.sendall(ANSWER.pack(request.ticket, outcome))
        except OSError:
            os._exit(0)  # nobody listens any more


def main() -> int:
    """Serve until the parent ends or hangs up."""
    arguments = _parse()
    parent = child.follow(arguments.parent)
    if parent is None:
        return 1
    with socket.socket(fileno=arguments.socket) as connected:
        try:
            recovered = _recover(arguments)
        except StateError as refusal:
            _say(connected, no_opening(OpeningKind.REFUSED, str(refusal)))
            return 0
        except OSError as fault:
            reason = f"the disk refuses the NVMe tier in {arguments.folder}: {fault}"
            _say(connected, no_opening(OpeningKind.FAILED, reason))
            return 0
        drive = Drive(recovered.slab, recovered.catalog, _arena(arguments.arena_folder).view)
        if _say(connected, _opening(recovered)):
            worker = Worker(drive, connected)
            worker.start()
            _serve(worker, connected, parent)
    # Threads are in the middle of transfers: what was not answered is not promised.
    os._exit(0)


def _say(connected: socket.socket, opening: Opening) -> bool:
    """The first word; whether somebody listens: a node may end while its disk is opened."""
    try:
        connected.sendall(opening.pack())
    except OSError:
        return False
    return True


def _recover(arguments: argparse.Namespace) -> Recovered:
    arguments.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    disk = LinuxDisk.open(arguments.folder / SLAB_FILE)
    place = CatalogFolder(arguments.folder / CATALOG_FOLDER, arguments.cells_max)
    wanted = Wanted(
        arguments.node_id,
        arguments.extent_bytes,
        arguments.extents,
        arguments.cells_max,
        secrets.token_bytes,
    )
    return recover(disk, place, wanted)


def _opening(recovered: Recovered) -> Opening:
    return Opening(
        OpeningKind.OPENED,
        recovered.note,
        recovered.slab.identity.pack(),
        recovered.records,
        recovered.tombstones,
    )


def _arena(folder: Path) -> Arena:
    fs = LinuxFileSystem()
    arena = Arena.map(fs, folder)
    MappedNode(arena, KeyTable.map(fs, folder), Uses.map(fs, folder)).populate_in_background()
    return arena


def _serve(worker: Worker, connected: socket.socket, parent: int) -> None:
    received = bytearray()
    for _ in child.until_end(parent, connected):
        try:
            piece = connected.recv(_RECEIVE_BYTES)
        except ConnectionResetError:
            return  # the parent ended with answers unread
        if not piece:
            return
        received += piece
        whole = len(received) - len(received) % REQUEST_BYTES
        for at in range(0, whole, REQUEST_BYTES):
            worker.take(unpack_request(bytes(received[at : at + REQUEST_BYTES])))
        del received[:whole]


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="kvstore.tiers.nvme.worker")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--arena-folder", type=Path, required=True)
    parser.add_argument("--node-id", required=True)
    parser.add_argument("--extent-bytes", type=int, required=True)
    parser.add_argument("--extents", type=int, required=True)
    parser.add_argument("--cells-max", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--socket", type=int, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
