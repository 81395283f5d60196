"""A tier's own Ray: nothing of another one gets in, nothing of it is open to others."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from kvstore.cluster import ray_local
from kvstore.cluster.processes import MARKS
from kvstore.errors import UsageError

TOKEN = Path("/state/token")


def test_environment_knows_no_other_ray_and_no_settings() -> None:
    theirs = {
        "PATH": "/bin",
        "RAY_ADDRESS": "10.0.0.1:6379",
        "RAY_AUTH_TOKEN": "theirs",
        "RAY_TMPDIR": "/theirs",
        "SAMOVAR_NODES": "3",
    }
    found = ray_local.environment(theirs, "0123456789ab", TOKEN, Path("/checkout"))
    assert theirs.keys() & found.keys() == {"PATH"}
    assert found["RAY_AUTH_MODE"] == "token"
    assert found["RAY_AUTH_TOKEN_PATH"] == "/state/token"
    assert found["RAY_USAGE_STATS_ENABLED"] == "0"
    assert int(found["RAY_gcs_rpc_server_reconnect_timeout_s"]) > 120
    assert {found[name] for name in MARKS} == {"0123456789ab"}


@pytest.mark.parametrize(
    ("source", "before", "after"),
    [
        ("/checkout", {}, "/checkout"),
        ("/checkout", {"PYTHONPATH": "/other"}, "/checkout:/other"),
        ("/v/lib/site-packages", {"PYTHONPATH": "/other"}, "/other"),
        ("/v/lib/site-packages", {}, None),
    ],
)
def test_children_find_the_same_package(
    source: str, before: dict[str, str], after: str | None
) -> None:
    found = ray_local.environment(before, "0123456789ab", TOKEN, Path(source))
    assert found.get("PYTHONPATH") == after


def test_long_folder_is_refused() -> None:
    ray_local.check_folder(Path("/tmp/samovar-0123456789ab"))
    with pytest.raises(UsageError, match="TMPDIR"):
        ray_local.check_folder(Path("/tmp") / ("long" * 25))


@dataclass
class Parameters:
    """What Ray's start hook is given, as far as it is touched."""

    node_ip_address: str = "192.0.2.1"
    node_name: str = "192.0.2.1"
    ray_client_server_port: int | None = 10001
    plasma_store_socket_name: str | None = None
    raylet_socket_name: str | None = None


def narrowed(command: list[str], monkeypatch: pytest.MonkeyPatch, pid: int) -> Parameters:
    """What the hook makes of it in the process of this command."""
    parameters = Parameters()
    with monkeypatch.context() as process:
        process.setattr("sys.argv", command)
        process.setattr("os.getpid", lambda: pid)
        ray_local.narrow(parameters, head="--head" in command)
    return parameters


def test_hook_narrows_to_loopback_and_drops_the_client_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    head = narrowed(ray_local.head_command(Path("/r"), 6000, 6001, "one"), monkeypatch, 4)
    other = narrowed(ray_local.node_command(Path("/r"), 6000, "two"), monkeypatch, 5)
    assert {head.node_ip_address, head.node_name} == {"127.0.0.1"}
    assert head.ray_client_server_port is None
    assert other.node_ip_address == "127.0.0.1"


def test_nodes_that_start_at_once_have_sockets_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = Path("/tmp/samovar-0123456789ab")
    command = ray_local.node_command(folder, 6000, "two")
    found = [narrowed(command, monkeypatch, pid) for pid in (4, 5)]
    sockets = [
        name for each in found for name in (each.plasma_store_socket_name, each.raylet_socket_name)
    ]
    assert len(set(sockets)) == 4
    assert {Path(name or "").parent for name in sockets} == {folder}


def test_commands_share_all_but_their_place_in_the_cluster() -> None:
    head = ray_local.head_command(Path("/r"), 6000, 6001, "one")
    other = ray_local.node_command(Path("/r"), 6000, "two")
    assert {"--head", "--port=6000", "--include-dashboard=false"} <= set(head)
    assert "--address=[::ffff:127.0.0.1]:6000" in other
    assert '--resources={"one": 1}' in head
    assert '--resources={"two": 1}' in other
