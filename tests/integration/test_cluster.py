"""A tier of two nodes on a real Ray, through the command line; the tests run in order.

One tier serves all tests but the last two: starting one takes seconds. Nothing here imports Ray,
as no command does.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from kvstore.client import Samovar
from kvstore.cluster import processes
from kvstore.cluster.ray_local import HEAD_ROLE, NODE_ROLE
from kvstore.config import ClientConfig
from kvstore.node_folder import holder_of
from kvstore.rpc.client import ControlClient
from kvstore.state import Remains, TierFolder
from tests.served import eventually
from tests.source_tree import ROOT

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

NAME = "under-test"


class Command:
    """`samovar` as a child process, with one state folder for all."""

    def __init__(self, state: Path) -> None:
        self.folder = TierFolder.of(state, NAME)
        kept = {name: value for name, value in os.environ.items() if "SAMOVAR" not in name}
        # Another Ray that the commands must neither reach nor mind.
        self.environment = kept | {
            "PYTHONPATH": str(ROOT),
            "SAMOVAR_STATE_FOLDER": str(state),
            "SAMOVAR_NAME": NAME,
            "SAMOVAR_ARENA_BYTES": "16MiB",
            "SAMOVAR_NVME_BYTES": "64MiB",
            "RAY_ADDRESS": "127.0.0.1:1",
            "HOME": "/nowhere",
        }

    def start(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "kvstore.cli", *words],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __call__(self, *words: str, code: int = 0) -> dict[str, Any]:
        """Run it to its end; answers the JSON of its last line."""
        with self.start(*words, "--json") as child:
            output, complaints = child.communicate()
        assert child.returncode == code, complaints
        answer: dict[str, Any] = json.loads(output.splitlines()[-1])
        return answer

    def remains(self) -> Remains:
        found = self.folder.remains()
        assert found is not None
        return found

    def living(self) -> dict[int, str]:
        """The tier's processes: roles by number."""
        remains = self.remains()
        found = processes.find(remains.tier_id, remains.processes)
        return {each.pid: each.role for each in found}

    def node_pid(self, index: int) -> int:
        """The process that holds a node's folder."""
        holder = holder_of(self.folder.node_folder(index))
        assert holder is not None
        return holder.pid

    def is_gone(self, remains: Remains) -> bool:
        """Whether nothing of a tier is left outside its state folder."""
        folders = [folder for folder in remains.folders if Path(folder).exists()]
        return not folders and not processes.find(remains.tier_id, remains.processes)


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    made = Command(tmp_path_factory.mktemp("state"))
    yield made
    made("down", "--purge")


@pytest.fixture(scope="module")
def tier(command: Command) -> dict[str, Any]:
    """What `up` answered."""
    return command("up", "--nodes", "2", "--block-tokens", "32")


def map_of(control: str) -> tuple[int, list[int]]:
    """Epoch and incarnations in the map that a node goes by."""
    with closing(ControlClient(control)) as client:
        cluster_map = client.hello().map
    return cluster_map.epoch, [node.incarnation for node in cluster_map.nodes]


def test_nodes_serve_one_map(command: Command, tier: dict[str, Any]) -> None:
    nodes = tier["nodes"]
    assert tier["fresh"]
    assert [node["node_id"] for node in nodes] == [f"{NAME}-0", f"{NAME}-1"]
    assert len({node["host_id"] for node in nodes}) == 2
    assert {map_of(node["control"])[0] for node in nodes} == {tier["map_epoch"]}
    assert all((Path(node["arena_folder"]) / "arena").exists() for node in nodes)
    roles = list(command.living().values())
    assert roles.count("raylet") == 2
    assert roles.count("kvstore.transport.bulk") == 2
    assert roles.count("kvstore.tiers.nvme.worker") == 2
    assert len(roles) <= 15


def test_a_client_without_an_address_finds_the_tier(command: Command, tier: dict[str, Any]) -> None:
    config = ClientConfig(name=NAME, state_folder=command.folder.path.parent)
    with Samovar.from_config(config) as client:
        assert client.block_tokens == 32
        assert client.stats().host.capacity_bytes == 16 << 20
        eventually(lambda: client.stats().nvme.capacity_bytes > 0)
    assert tier["nvme_bytes"] == 64 << 20


def test_a_tier_that_runs_is_not_given_other_blocks(command: Command, tier: dict[str, Any]) -> None:
    assert not command("up", "--block-tokens", "32")["fresh"]
    with command.start("up", "--block-tokens", "64") as child:
        _, complaints = child.communicate()
    assert child.returncode == 2
    assert "blocks of 32 tokens" in complaints


def test_nothing_listens_beyond_loopback(command: Command, tier: dict[str, Any]) -> None:
    sockets = {
        os.readlink(file)
        for pid in command.living()
        for file in Path(f"/proc/{pid}/fd").iterdir()
        if file.is_symlink()
    }
    listening = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                listening.append(fields[1].split(":")[0])
    assert len(listening) >= 4
    assert {address[-8:] for address in listening} == {"0100007F"}


def test_up_again_says_so(command: Command, tier: dict[str, Any]) -> None:
    again = command("up", "--nodes", "2")
    assert again == tier | {"fresh": False}
    with command.start("up", "--nodes", "3") as child:
        assert "samovar down" in child.communicate()[1]
    assert child.returncode == 2


def test_status_asks_every_node(command: Command, tier: dict[str, Any]) -> None:
    status = command("status")
    assert [node["answers"] for node in status["nodes"]] == [True, True]
    assert {node["host"]["capacity_bytes"] for node in status["nodes"]} == {16 << 20}


def test_killed_node_is_back_with_the_next_incarnation(
    command: Command, tier: dict[str, Any]
) -> None:
    os.kill(command.node_pid(0), signal.SIGKILL)
    other = tier["nodes"][1]["control"]
    eventually(lambda: map_of(other)[1] == [2, 1])
    assert map_of(other)[0] > tier["map_epoch"]
    assert command("up", "--nodes", "2")["nodes"][0]["incarnation"] == 2


def test_coordinator_goes_on_from_its_last_number(command: Command, tier: dict[str, Any]) -> None:
    other = tier["nodes"][1]["control"]
    epoch, _ = map_of(other)
    (coordinator,) = (pid for pid, role in command.living().items() if "Coordinator" in role)
    os.kill(coordinator, signal.SIGKILL)
    os.kill(command.node_pid(0), signal.SIGKILL)
    eventually(lambda: map_of(other)[1] == [3, 1])
    assert map_of(other)[0] > epoch


def test_nodes_outlive_the_head_and_up_restarts_what_has_lost_more(
    command: Command, tier: dict[str, Any]
) -> None:
    living = command.living()
    (head,) = (pid for pid, role in living.items() if role == HEAD_ROLE)
    os.kill(head, signal.SIGKILL)
    assert all(node["answers"] for node in command("status", code=1)["nodes"])
    os.kill(next(pid for pid, role in living.items() if role == NODE_ROLE), signal.SIGKILL)
    complaint = command("status", code=1)["complaint"]
    assert "raylet" in complaint
    assert "restarts the tier" in complaint
    before = command.remains()
    again = command("up", "--nodes", "2")
    assert again["fresh"]
    assert again["map_epoch"] > tier["map_epoch"]
    assert [node["incarnation"] for node in again["nodes"]] == [4, 2]
    folders = [node["arena_folder"] for node in again["nodes"]]
    assert folders == [node["arena_folder"] for node in tier["nodes"]]
    assert not any(processes.is_alive(process) for process in before.processes)


def test_down_leaves_nothing(command: Command, tier: dict[str, Any]) -> None:
    remains = command.remains()
    assert command("down")["processes"] >= 13
    assert command.is_gone(remains)
    assert command.folder.read() is None
    assert command("status", code=1)["nodes"] == []


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_up_leaves_nothing(command: Command, sign: signal.Signals) -> None:
    with command.start("up") as child:
        eventually(lambda: command.folder.remains() is not None)
        remains = command.remains()
        eventually(lambda: HEAD_ROLE in command.living().values())
        child.send_signal(sign)
        _, complaints = child.communicate()
    assert child.returncode == 130
    assert "interrupted" in complaints
    assert command.is_gone(remains)
    assert command.folder.read() is None


def test_down_finds_what_a_killed_up_left(command: Command) -> None:
    with command.start("up") as child:
        eventually(lambda: command.folder.remains() is not None)
        remains = command.remains()
        eventually(lambda: HEAD_ROLE in command.living().values())
        child.kill()
        child.communicate()
    assert command("down")["processes"] >= 1
    assert command.is_gone(remains)
