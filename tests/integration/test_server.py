"""Storage nodes as they run: real ports, real bulk processes, real signals."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from kvstore.arena import Arena
from kvstore.calls import CellOutcome
from kvstore.cluster_map import ClusterMap, NodeInfo
from kvstore.config import NodeConfig
from kvstore.errors import ConfigError, StateError
from kvstore.fs import LinuxFileSystem
from kvstore.holders import Located
from kvstore.owed import OWED_FILE
from kvstore.placement import homes
from kvstore.rpc.client import ControlClient
from kvstore.server import NodePlace, NodeServer
from kvstore.tiers.nvme.slab import SLAB_FILE
from tests.integration import node_process
from tests.served import eventually, put, reserve_request, some_keys
from tests.source_tree import ROOT
from tests.worlds import shared_folder

EVERYWHERE = ("0.0.0.0", "::") if socket.has_dualstack_ipv6() else ("0.0.0.0",)
SPAN = 99  # of all cells that these tests write


@pytest.fixture
def folder() -> Iterator[Path]:
    with shared_folder() as path:
        yield path


def server_in(
    folder: Path, index: int = 0, state: str = "state", arena: str = "arena", **more: Any
) -> NodeServer:
    config = NodeConfig(
        state_folder=folder,
        shm_folder=folder,
        arena_bytes=node_process.ARENA_BYTES,
        nvme_bytes=node_process.NO_DISK,
        host_id=f"host-{index}",
        **more,
    )
    place = NodePlace(
        index, f"node-{index}", folder / f"{state}-{index}", folder / f"{arena}-{index}"
    )
    return NodeServer(config, place, patience_s=0.0)


@contextmanager
def running(server: NodeServer) -> Iterator[NodeInfo]:
    info = server.start()
    try:
        yield info
    finally:
        server.stop()


@contextmanager
def node_in_child(folder: Path, index: int) -> Iterator[tuple[subprocess.Popen[str], NodeInfo]]:
    """A node process; killed at the end if the test has not ended it."""
    state, arena = folder / f"state-{index}", folder / f"arena-{index}"
    command = [sys.executable, "-m", node_process.__name__, str(index), f"node-{index}"]
    with subprocess.Popen(
        [*command, str(state), str(arena), f"host-{index}"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout is not None
        try:
            yield child, NodeInfo(**json.loads(child.stdout.readline()))
        finally:
            child.kill()


def client_of(info: NodeInfo) -> AbstractContextManager[ControlClient]:
    return closing(ControlClient(info.control))


def arena_of(info: NodeInfo) -> Arena:
    return Arena.map(LinuxFileSystem(), Path(info.arena_folder))


def bulk_processes() -> list[psutil.Process]:
    """Children of this process that move bytes; other tests may have left children of their own."""
    return [child for child in psutil.Process().children() if is_bulk(child)]


def is_bulk(process: psutil.Process) -> bool:
    try:
        return "kvstore.transport.bulk" in process.cmdline()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return False


def bulk_answers(info: NodeInfo) -> bool:
    host, _, port = info.bulk.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except ConnectionRefusedError:
        return False
    return True


def test_starts_serves_and_leaves_nothing_running(folder: Path) -> None:
    threads = {thread.name for thread in threading.enumerate()}
    process = psutil.Process()
    server = server_in(folder)
    with running(server) as info:
        assert (info.index, info.node_id, info.host_id, info.incarnation) == (
            0,
            "node-0",
            "host-0",
            1,
        )
        assert bulk_answers(info)
        with client_of(info) as client:
            assert client.hello().bulk == info.bulk
            put(client, arena_of(info), some_keys(3))
            assert client.lookup(some_keys(4), 1) == 3
        assert server.info == info
    assert not bulk_answers(info)
    left = {thread.name for thread in threading.enumerate()} - threads
    assert not {name for name in left if "_poll_wrapper" not in name}, "gRPC keeps one poller"
    assert not bulk_processes()
    listening = [c for c in process.net_connections() if c.status == psutil.CONN_LISTEN]
    assert not listening


def test_a_restart_goes_on_with_what_was_held(folder: Path) -> None:
    for incarnation, held in ((1, 0), (2, 3)):
        with running(server_in(folder)) as info, client_of(info) as client:
            assert info.incarnation == incarnation
            assert client.lookup(some_keys(4), 1) == held
            if not held:
                put(client, arena_of(info), some_keys(3))


@pytest.mark.parametrize("is_left", [False, True])
def test_a_slab_that_is_configured_no_more_is_owed_what_is_deleted(
    folder: Path, tmp_path: Path, is_left: bool
) -> None:
    (tmp_path / "node-0").mkdir()
    if is_left:
        (tmp_path / "node-0" / SLAB_FILE).touch()
    with running(server_in(folder, nvme_folder=tmp_path)) as info, client_of(info) as client:
        assert client.life.delete(some_keys(1)).durable
    assert (folder / "state-0" / OWED_FILE).exists() == is_left


@pytest.mark.parametrize("names", [("state", "another"), ("another", "arena")])
def test_a_folder_in_use_is_refused_before_it_is_touched(
    folder: Path, names: tuple[str, str]
) -> None:
    with running(server_in(folder)) as info, client_of(info) as client:
        put(client, arena_of(info), some_keys(2))
        second = server_in(folder, 0, *names)
        with pytest.raises(StateError, match=f"in use by process {os.getpid()}"):
            second.start()
        assert client.lookup(some_keys(2), 1) == 2
        assert client.identity.incarnation == 1


def test_a_taken_port_is_refused_and_leaves_nothing(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        server = server_in(folder, control_port=taken.getsockname()[1])
        with pytest.raises(StateError, match="choose another control_port"):
            server.start()
    assert not bulk_processes()
    with running(server_in(folder)) as info:
        assert info.incarnation == 2


def test_a_token_file_that_cannot_be_used_leaves_nothing(folder: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the token file"):
        server_in(folder, token_file=folder / "absent").start()
    with running(server_in(folder)) as info:
        assert info.incarnation == 1


def test_a_dead_bulk_process_is_replaced_on_its_port(folder: Path) -> None:
    with running(server_in(folder)) as info:
        (bulk,) = bulk_processes()
        bulk.send_signal(signal.SIGKILL)
        eventually(lambda: bulk not in bulk_processes())
        eventually(lambda: bulk_answers(info))
        with client_of(info) as client:
            assert client.hello().bulk == info.bulk


def test_after_kill_9_a_successor_has_the_blocks(folder: Path) -> None:
    with ExitStack() as stack:
        child, first = stack.enter_context(node_in_child(folder, 0))
        client = stack.enter_context(client_of(first))
        put(client, arena_of(first), some_keys(3))
        unfinished = client.reserve(reserve_request(client.session, some_keys(1, first=9)))
        assert unfinished.outcomes.tolist() == [CellOutcome.RESERVED]
        child.kill()
        child.wait()
        server = server_in(folder)
        with running(server) as second, client_of(second) as later:
            assert (first.incarnation, second.incarnation) == (1, 2)
            assert later.lookup(some_keys(4), 1) == 3
            stats = later.stats().host
            assert (stats.adopted, stats.reserved_cells) == (3, 0)
            assert stats.retired_bytes > 0, "a slot that its writer may still write to is retired"
            again = later.reserve(reserve_request(later.session, some_keys(1, first=9)))
            assert again.outcomes.tolist() == [CellOutcome.RESERVED]
            assert again.offsets[0] != unfinished.offsets[0]


def located(client: ControlClient, epoch: int, count: int) -> list[tuple[int, int]]:
    """(holders, first holder) of each key, as this home knows it."""
    answer = client.locate(epoch, some_keys(count))
    if not isinstance(answer, Located):
        return []
    starts = np.cumsum(answer.counts) - answer.counts
    return [
        (int(held), int(answer.nodes[start]) if held else -1)
        for held, start in zip(answer.counts, starts, strict=True)
    ]


def test_two_nodes_tell_each_other_what_they_hold_and_who_is_gone(folder: Path) -> None:
    with ExitStack() as stack:
        near = server_in(folder, 0)
        one = stack.enter_context(running(near))
        child, two = stack.enter_context(node_in_child(folder, 1))
        cluster_map = ClusterMap.of(1, (one, two))
        assert set(homes(SPAN, cluster_map)) == {0, 1}
        here = stack.enter_context(client_of(one))
        there = stack.enter_context(client_of(two))
        put(there, arena_of(two), some_keys(2))  # before there is any map
        near.set_map(cluster_map)
        assert there.set_map(cluster_map) == cluster_map
        put(there, arena_of(two), some_keys(1, first=3))
        eventually(lambda: located(here, 1, 3) == [(1, 1)] * 3)
        eventually(lambda: located(there, 1, 3) == [(1, 1)] * 3)

        child.kill()
        child.wait()
        eventually(lambda: near.unreachable == {1})
        eventually(lambda: here.unreachable == {1})
        assert located(here, 1, 3) == [(1, 1)] * 3, "soft state stays: the node may be back"

        _, back = stack.enter_context(node_in_child(folder, 1))
        assert (back.node_id, back.incarnation) == ("node-1", 2)
        newer = ClusterMap.of(2, (one, back))
        near.set_map(newer)
        eventually(lambda: near.unreachable == frozenset())
        # Its neighbour hands the map on to it, and it announces what it adopted.
        eventually(lambda: located(here, 2, 3) == [(1, 1)] * 3)


def test_maps_travel_with_heartbeats(folder: Path) -> None:
    with ExitStack() as stack:
        servers = [server_in(folder, index) for index in (0, 1)]
        infos = [stack.enter_context(running(server)) for server in servers]
        for server in servers:
            server.set_map(ClusterMap.of(1, infos))
        servers[0].set_map(ClusterMap.of(2, infos))
        eventually(lambda: servers[1].map.epoch == 2)


def test_a_node_keeps_to_the_maps_of_its_tier(folder: Path) -> None:
    place = NodePlace(0, "node-0", folder / "state", folder / "arena", tier_id="ours")
    config = NodeConfig(
        state_folder=folder,
        shm_folder=folder,
        arena_bytes=node_process.ARENA_BYTES,
        nvme_bytes=node_process.NO_DISK,
    )
    server = NodeServer(config, place)
    with running(server) as info:
        for tier_id, epoch in (("theirs", 57), ("ours", 1), ("theirs", 58)):
            server.set_map(ClusterMap.of(epoch, [info], tier_id=tier_id))
        assert (server.map.tier_id, server.map.epoch) == ("ours", 1)


def test_a_successor_listens_where_its_clients_look(folder: Path) -> None:
    with running(server_in(folder)) as first, client_of(first) as client:
        assert client.hello().identity.incarnation == 1
        control = first.control
    with running(server_in(folder)) as second:
        assert second.control == control
    host, _, port = control.rpartition(":")
    with socket.create_server((host, int(port))), running(server_in(folder)) as third:
        assert third.control != control
    with running(server_in(folder)) as fourth:
        assert fourth.control == third.control


@pytest.mark.parametrize("everywhere", EVERYWHERE)
def test_a_node_that_listens_everywhere_is_found_where_it_says(
    folder: Path, everywhere: str
) -> None:
    how: dict[str, Any] = {"bind_host": everywhere, "insecure": True}
    how["advertise_host"] = "127.0.0.2"
    with running(server_in(folder, **how)) as info, client_of(info) as client:
        hosts = [where.rpartition(":")[0] for where in (info.control, info.bulk)]
        assert hosts == ["127.0.0.2"] * 2
        assert client.hello().bulk == info.bulk
        assert bulk_answers(info)
