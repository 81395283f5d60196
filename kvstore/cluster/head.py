"""The head of a tier's Ray, started again where everything else has outlived it.

    up:        the head runs ──> how it was started is noted beside its database
    up again:  raylets live, the head does not ──> the same command, on the same port and database

Raylets and actors go on without a head for a day (`kvstore.cluster.ray_local`). The one that comes
back knows them, so that no storage node is touched but those that died meanwhile: Ray restarts
them. Its state is in Ray's folder and goes with it. Does not cover: noticing that the head is dead
(`kvstore.cluster.launch`).
"""

import importlib.metadata
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

from kvstore.cluster import processes
from kvstore.cluster.ray_local import HEAD_ROLE, LASTING_ROLES
from kvstore.fs import replace_file
from kvstore.state import Remains

KEEPS_STATE_SINCE = (2, 60)
"""An older Ray has no database for its head: there, `samovar up` restarts all of the tier."""
_DATABASE = "head"
_COMMAND_FILE = "head.json"


def variables(ray_folder: Path) -> dict[str, str]:
    """What makes the head keep its state in Ray's folder, where this Ray can."""
    if not _keeps_state():
        return {}
    return {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": str(ray_folder / _DATABASE)}


def note(remains: Remains, ray_folder: Path) -> None:
    """Write down how the head was started."""
    for process in remains.processes:
        if process.role == HEAD_ROLE and _keeps_state():
            command = json.dumps(processes.command(process.pid))
            replace_file(ray_folder / _COMMAND_FILE, command.encode())


def start_again(ray_folder: Path, environment: Mapping[str, str]) -> bool:
    """Start a head that has ended the way it was; whether there was a way."""
    try:
        command = json.loads((ray_folder / _COMMAND_FILE).read_text())
    except FileNotFoundError:
        return False
    silent = [
        (os.POSIX_SPAWN_OPEN, descriptor, os.devnull, os.O_RDWR, 0) for descriptor in range(3)
    ]
    # Not subprocess: nobody waits for it, and a Ctrl-C at this terminal is not for it.
    os.posix_spawn(command[0], command, environment, file_actions=silent, setsid=True)
    return True


def complaint(remains: Remains) -> str | None:
    """What has ended of a tier's Ray, what follows and what to do; None while it is whole."""
    # Ray restarts the other ones, so a record of those may be of a former life.
    lasting = [each for each in remains.processes if each.role in LASTING_ROLES]
    dead = [each for each in lasting if not processes.is_alive(each)]
    if lasting and not dead:
        return None
    gone = ", ".join(f"{each.role} ({each.pid})" for each in dead) or "Ray"
    if {each.role for each in dead} == {HEAD_ROLE}:
        return (
            f"Ray's head, {gone}, ended: the nodes go on, but those that die stay away until "
            "`samovar up` starts the head again"
        )
    return f"{gone} ended: `samovar up` restarts the tier on its arenas, `samovar down` ends it"


def _keeps_state() -> bool:
    try:
        version = importlib.metadata.version("ray")
    except importlib.metadata.PackageNotFoundError:
        return False
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2]) >= KEEPS_STATE_SINCE
