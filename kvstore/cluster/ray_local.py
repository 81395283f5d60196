"""A tier's own Ray on one machine: the commands and the environment of its processes.

    ray start --head      gcs_server, API server without a face, raylet of node 0 and its two agents
    ray start --address   a raylet and its two agents, for each further node

Everything listens on loopback only and asks for the tier's token. Ray's command line would turn
127.0.0.1 into an address that other machines reach; the start hook (`narrow`) turns it back, and
drops the Ray client server, which nobody here speaks to. An IPv4-mapped address connects to a
loopback port without being turned. Raylets start side by side: each gets sockets of its own, where
Ray would give those that start at once the same, and all but one would die of it. Measured with
Ray 2.60.

Pure but for `narrow`; nothing here imports Ray, so that the hook costs nothing.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvstore.cluster.processes import MARKS
from kvstore.errors import UsageError

OBJECT_STORE_BYTES = 75 << 20
"""The smallest that Ray accepts; no payload ever goes through it."""
HEAD_AWAY_S = 24 * 3600
"""How long raylets and actors go on without a head; Ray's own 60 s would end the tier with it."""
SOCKET_PATH_BYTES_MAX = 107
_LONGEST_SOCKET = "plasma_store.4194304"
_FOLDER_FLAG = "--temp-dir="
TOKEN_VARIABLE = "RAY_AUTH_TOKEN_PATH"
HEAD_ROLE, NODE_ROLE = "gcs_server", "raylet"
LASTING_ROLES = (HEAD_ROLE, NODE_ROLE)
"""What these processes call themselves; nobody restarts them."""
HOOK = "kvstore.cluster.ray_local.narrow"
LOOPBACK = "127.0.0.1"


def address(port: int) -> str:
    """Where the tier's Ray is reached, for Ray's own clients."""
    return f"[::ffff:{LOOPBACK}]:{port}"


def check_folder(folder: Path) -> None:
    """Raises UsageError where Ray's sockets would have too long a path."""
    if len(f"{folder}/{_LONGEST_SOCKET}".encode()) > SOCKET_PATH_BYTES_MAX:
        raise UsageError(f"{folder} is too long a path for Ray's sockets: set TMPDIR to a shorter")


def environment(
    inherited: Mapping[str, str], tier_id: str, token_file: Path, source: Path
) -> dict[str, str]:
    """For all processes of the tier: nothing of another Ray, and nothing of our own settings.

    `source` is where the package `kvstore` is found.
    """
    kept = {
        name: value
        for name, value in inherited.items()
        if not name.startswith(("RAY_", "SAMOVAR_"))
    }
    ours = dict.fromkeys(MARKS, tier_id) | {
        "RAY_AUTH_MODE": "token",
        TOKEN_VARIABLE: str(token_file),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_START_HOOK": HOOK,
        "RAY_gcs_rpc_server_reconnect_timeout_s": str(HEAD_AWAY_S),
        # A starved machine is slow, not dead; the tier's own heartbeats are the quick ones.
        "RAY_health_check_timeout_ms": "30000",
        "RAY_health_check_failure_threshold": "10",
        # An arena looks like memory pressure: Ray would kill the nodes that hold it.
        "RAY_memory_monitor_refresh_ms": "0",
        "RAY_enable_worker_prestart": "0",
        "RAY_worker_niceness": "0",  # storage nodes answer engines; Ray would nice them to 15
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    }
    if source.name not in ("site-packages", "dist-packages"):
        paths = [str(source), *filter(None, [kept.get("PYTHONPATH")])]
        ours["PYTHONPATH"] = ":".join(paths)
    return kept | ours


def head_command(folder: Path, port: int, unused_port: int, resource: str) -> list[str]:
    """Starts the head with the first node's raylet. Ray wants a client port, though none opens."""
    return [
        *_command(folder, resource),
        "--head",
        f"--port={port}",
        f"--ray-client-server-port={unused_port}",
        "--include-dashboard=false",
        "--no-monitor",
    ]


def node_command(folder: Path, port: int, resource: str) -> list[str]:
    """Starts a further node's raylet; it waits for the head."""
    return [*_command(folder, resource), f"--address={address(port)}"]


def _command(folder: Path, resource: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "start",
        f"--node-ip-address={LOOPBACK}",
        f"{_FOLDER_FLAG}{folder}",
        f"--object-store-memory={OBJECT_STORE_BYTES}",
        f'--resources={{"{resource}": 1}}',
        "--num-cpus=0",
        "--num-gpus=0",
        "--include-log-monitor=false",
        "--disable-usage-stats",
        "--min-worker-port=0",
        "--max-worker-port=0",
        "--dashboard-agent-listen-port=0",
        "--log-style=record",
    ]


def narrow(parameters: Any, head: bool) -> None:
    """Ray's start hook: called in `ray start` with what it is about to start."""
    parameters.node_ip_address = LOOPBACK
    parameters.node_name = LOOPBACK
    # Of the command, as Ray 2.52 takes the folder of a further node from the head.
    flag = next(word for word in sys.argv if word.startswith(_FOLDER_FLAG))
    folder = flag.removeprefix(_FOLDER_FLAG)
    parameters.plasma_store_socket_name = f"{folder}/plasma_store.{os.getpid()}"
    parameters.raylet_socket_name = f"{folder}/raylet.{os.getpid()}"
    if head:
        parameters.ray_client_server_port = None
