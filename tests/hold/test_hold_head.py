"""Ray's head dies and stays away for minutes: nodes and clients go on, and `up` brings it back.

Real Ray, real signals. What Ray does by itself when its head is away is end everything after a
minute; the tier's settings say otherwise.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from kvstore.clock import Deadline, SystemClock
from kvstore.cluster import processes
from kvstore.cluster.ray_local import HEAD_ROLE, LASTING_ROLES
from tests.hold.processes import Client
from tests.ray_tier import RayTier, eventually, ray_tier
from tests.source_tree import ROOT

pytestmark = pytest.mark.cluster

TOKENS = 160
AWAY_S = 120.0
AWAY_VARIABLE = "RAY_gcs_rpc_server_reconnect_timeout_s"
COORDINATOR_ROLE = "ray::CoordinatorActor"
STORAGE_ROLE = "ray::StorageNode"
ROUND_S = 1.0


@pytest.fixture
def tier(tmp_path: Path) -> Iterator[RayTier]:
    """A tier that must be gone afterwards, whatever of it has died."""
    with ray_tier(tmp_path) as up:
        remains = up.remains
        yield up
        remains = up.remains
    assert not processes.find(remains.tier_id, remains.processes)
    assert [folder for folder in remains.folders if Path(folder).exists()] == []


@pytest.fixture
def clients(tier: RayTier) -> Iterator[list[Client]]:
    """A worker on the host of each node."""
    with ExitStack() as stack:
        made = [Client(node) for node in tier.nodes]
        for client in made:
            stack.callback(client.close)
        yield made


def samovar(tier: RayTier, command: str) -> tuple[int, dict[str, Any]]:
    """Exit code and JSON of a command that looks at the tier."""
    folder = tier.tier.folder.path
    words = [command, "--json", "--state-folder", str(folder.parent), "--name", folder.name]
    answer = subprocess.run(
        [sys.executable, "-m", "kvstore.cli", *words], cwd=ROOT, capture_output=True, text=True
    )
    return answer.returncode, json.loads(answer.stdout.splitlines()[-1])


def each_serves_the_other(clients: list[Client], prompt: int) -> int:
    """Each stores a prompt and reads the other's; answers the next number."""
    for offset, writer in enumerate(clients):
        writer.stores(prompt + offset, TOKENS)
        for reader in clients:
            reader.finds(prompt + offset, TOKENS)
    return prompt + len(clients)


def serves_for(clients: list[Client], duration_s: float, prompt: int) -> int:
    """The same round after round; answers the next number."""
    deadline = Deadline.after(SystemClock(), duration_s)
    pause = threading.Event()
    while not deadline.passed():
        prompt = each_serves_the_other(clients, prompt)
        pause.wait(min(ROUND_S, deadline.remaining_s()))
    return prompt


def test_hold_without_its_head_the_tier_serves_and_up_brings_the_head_back(
    tier: RayTier, clients: list[Client]
) -> None:
    prompt = each_serves_the_other(clients, 1)
    before = tier.living()
    waiting = {
        pid: processes.variable(pid, AWAY_VARIABLE)
        for pid, role in before.items()
        if role in LASTING_ROLES
    }
    assert len(waiting) == 3
    assert all(float(away_s or 0) > 2 * AWAY_S for away_s in waiting.values()), waiting

    dead = {tier.kill(HEAD_ROLE), tier.kill(COORDINATOR_ROLE)}
    prompt = serves_for(clients, 2 * ROUND_S, prompt)
    assert before.keys() - tier.living().keys() == dead
    code, status = samovar(tier, "status")
    assert (code, [node["answers"] for node in status["nodes"]]) == (1, [True, True])
    assert "`samovar up` starts the head again" in status["complaint"]
    code, found = samovar(tier, "doctor")
    assert code == 1
    assert status["complaint"] in [finding["sentence"] for finding in found["findings"]]

    # A node that dies now stays away, and the others pass it over.
    os.kill(tier.storage_pid(1), signal.SIGKILL)
    eventually(lambda: clients[0].fetch(prompt - 1, TOKENS)["tokens"] == 0)
    clients[0].stores(prompt, TOKENS)
    clients[0].finds(1, TOKENS)
    assert [node["answers"] for node in samovar(tier, "status")[1]["nodes"]] == [True, False]

    assert not tier.tier.up().fresh, "what lives on was left alone"
    again = tier.living()
    survivors = [pid for pid, role in before.items() if role in (STORAGE_ROLE, "raylet")]
    assert len(again.keys() & set(survivors)) == len(survivors) - 1
    eventually(lambda: COORDINATOR_ROLE in tier.living().values())
    eventually(lambda: [n.incarnation for n in tier.map_of(0).nodes] == [1, 2])
    eventually(lambda: clients[1].put(prompt, TOKENS)["failed"] == 0)
    clients[1].finds(2, TOKENS)
    each_serves_the_other(clients, prompt + 1)
    assert samovar(tier, "status")[0] == 0


@pytest.mark.slow
def test_hold_two_minutes_without_a_head_end_nobody(tier: RayTier, clients: list[Client]) -> None:
    before, epochs = tier.living(), [tier.map_of(index).epoch for index in (0, 1)]
    dead = tier.kill(HEAD_ROLE)
    prompt = serves_for(clients, AWAY_S, 1)
    assert before.keys() - tier.living().keys() == {dead}
    assert [tier.map_of(index).epoch for index in (0, 1)] == epochs
    assert not tier.tier.up().fresh
    each_serves_the_other(clients, prompt)
    assert samovar(tier, "status")[0] == 0
