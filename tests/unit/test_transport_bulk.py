"""The bulk process as a real child: how it starts, dies, and what its death costs a reader."""

import os
import select
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from kvstore.clock import Deadline, SystemClock
from kvstore.errors import StateError
from kvstore.transport.base import ReadOutcome
from kvstore.transport.bulk_process import BulkProcess
from kvstore.transport.tcp import TcpTransport
from tests.unit.transport_world import World, same, soon

HOST = "127.0.0.1"


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World.make(tmp_path / "node", capacity_bytes=32 << 20)


@pytest.fixture
def bulk(world: World) -> Iterator[BulkProcess]:
    process = BulkProcess.start(world.folder, HOST, 0, None, soon())
    yield process
    process.stop()


def kill(pid: int) -> None:
    """Kill a process, and wait for its end."""
    end = os.pidfd_open(pid)
    os.kill(pid, signal.SIGKILL)
    select.select([end], [], [])
    os.close(end)


def relay(listener: socket.socket, bulk: BulkProcess, enough_bytes: int) -> None:
    """Pass one connection on, and kill the process when it has sent so much."""
    host, _, port = bulk.address.rpartition(":")
    client, _ = listener.accept()
    with client, socket.create_connection((host, int(port))) as server:
        passed = 0
        # A process that is killed leaves nothing, or an error, behind what it had sent.
        with suppress(ConnectionError):
            while True:
                for source in select.select([client, server], [], [])[0]:
                    piece = source.recv(1 << 16)
                    if not piece:
                        return
                    (server if source is client else client).sendall(piece)
                    passed += len(piece) if source is server else 0
                if passed > enough_bytes and bulk.is_alive():
                    kill(bulk.pid)


def test_cells_come_from_another_process(world: World, bulk: BulkProcess) -> None:
    content = [world.leaves() for _ in range(3)]
    reads = [world.stored(leaves) for leaves in content]
    transport = TcpTransport(bulk.address)
    assert transport.read(reads, soon()) == [ReadOutcome.VERIFIED] * 3
    assert all(same(read.leaves, leaves) for read, leaves in zip(reads, content, strict=True))
    transport.close()


def test_hold_a_node_killed_in_the_middle_of_a_read_costs_the_rest_of_it(
    world: World, bulk: BulkProcess
) -> None:
    # More than the sockets' buffers hold, so that the last cells can only come from a live child.
    shapes = ((4, 16, 8192),) * 4
    content = [world.leaves(shapes) for _ in range(12)]
    reads = [world.stored(leaves) for leaves in content]
    with socket.create_server((HOST, 0)) as listener:
        relaying = threading.Thread(target=relay, args=(listener, bulk, 2 * reads[0].length))
        relaying.start()
        transport = TcpTransport(f"{HOST}:{listener.getsockname()[1]}", connections=1)
        outcomes = transport.read(reads, soon())
        transport.close()
        relaying.join()
    assert outcomes[0] is ReadOutcome.VERIFIED
    assert outcomes[-1] is ReadOutcome.FAILED
    assert outcomes == sorted(outcomes)
    for outcome, read, leaves in zip(outcomes, reads, content, strict=True):
        assert outcome is ReadOutcome.FAILED or same(read.leaves, leaves)
    assert not bulk.is_alive()


def test_hold_a_node_that_stands_still_costs_the_deadline(world: World, bulk: BulkProcess) -> None:
    read = world.stored(world.leaves())
    transport = TcpTransport(bulk.address)
    assert transport.read([read], soon()) == [ReadOutcome.VERIFIED]
    os.kill(bulk.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, bulk.pid, os.WSTOPPED)
    assert transport.read([read], Deadline.after(SystemClock(), 0.2)) == [ReadOutcome.FAILED]
    os.kill(bulk.pid, signal.SIGCONT)
    assert transport.read([read], soon()) == [ReadOutcome.VERIFIED]
    transport.close()


def test_a_token_file_guards_the_port(world: World, tmp_path: Path) -> None:
    token_file = tmp_path / "token"
    token_file.write_bytes(b"hush\n")
    token_file.chmod(0o600)
    read = world.stored(world.leaves())
    bulk = BulkProcess.start(world.folder, HOST, 0, token_file, soon())
    for token, outcome in ((b"hush", ReadOutcome.VERIFIED), (b"loud", ReadOutcome.FAILED)):
        transport = TcpTransport(bulk.address, token)
        assert transport.read([read], soon()) == [outcome]
        transport.close()
    bulk.stop()


def test_a_folder_without_a_node_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StateError, match=r"exit code 2"):
        BulkProcess.start(tmp_path, HOST, 0, None, soon())


def test_a_port_in_use_is_refused(world: World, bulk: BulkProcess) -> None:
    with pytest.raises(StateError, match=str(bulk.port)):
        BulkProcess.start(world.folder, HOST, bulk.port, None, soon())
