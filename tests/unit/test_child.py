"""The children of a storage node end with it, however it ends, and whatever they are about."""

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.source_tree import ROOT
from tests.worlds import shared_folder

ENDED_S = 30

BEGIN = """
import asyncio, sys
from pathlib import Path
from threading import Thread
import numpy as np
from kvstore.copier_process import CopierProcess
from kvstore.errand import Errand
from kvstore.transport.bulk_process import BulkProcess
from tests.disk_node import Node
from tests.served import some_keys
from tests.unit.transport_world import World, soon

shared, disk = map(Path, sys.argv[1:])
"""
BULK = """
world = World.make(shared / "node")
def start():
    bulk = BulkProcess.start(world.folder, "127.0.0.1", 0, None, soon())
    print(bulk.pid, flush=True)
# The thread that started it ends: that alone is no reason to end.
thread = Thread(target=start)
thread.start()
thread.join()
sys.stdin.read()
"""
DISK = """
node = Node(shared, disk)
node.start()
print(node.process.pid, flush=True)
sys.stdin.read()
"""
COPIER = """
world = World.make(shared / "node")
nobody = "127.0.0.1:9"
copier = CopierProcess(nobody, world.folder, None)
errand = Errand(nobody, nobody, some_keys(1), np.zeros(1, np.uint8), np.zeros(1, np.uint64))
async def serve():
    await copier.run(errand)
    print(copier.pid, flush=True)
    await asyncio.to_thread(sys.stdin.read)
asyncio.run(serve())
"""


@pytest.mark.parametrize("is_stopped", [False, True])
@pytest.mark.parametrize("serve", [BULK, DISK, COPIER], ids=["bulk", "disk", "copier"])
def test_hold_a_child_ends_with_its_parent(tmp_path: Path, serve: str, is_stopped: bool) -> None:
    with (
        shared_folder() as folder,
        subprocess.Popen(
            [sys.executable, "-c", BEGIN + serve, str(folder), str(tmp_path)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as parent,
    ):
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        end = os.pidfd_open(child)
        assert not select.select([end], [], [], 0)[0]
        if is_stopped:
            os.kill(child, signal.SIGSTOP)
        parent.kill()
        assert select.select([end], [], [], ENDED_S)[0], "the child outlives its parent"
        os.close(end)
