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
        ray_local.check_folder(Path("/tmp") / ("long" * 10))


@dataclass
class Parameters:
    """What Ray's start hook is given, as far as it is touched."""

    node_ip_address: str = "192.0.2.1"
    node_name: str = "192.0.2.1"
    ray_client_server_port: int | None = 10001


def test_hook_narrows_to_loopback_and_drops_the_client_server() -> None:
    head, other = Parameters(), Parameters()
    ray_local.narrow(head, head=True)
    ray_local.narrow(other, head=False)
    assert head == Parameters("127.0.0.1", "127.0.0.1", None)
    assert other.node_ip_address == "127.0.0.1"


def test_commands_share_all_but_their_place_in_the_cluster() -> None:
    head = ray_local.head_command(Path("/r"), 6000, 6001, "one")
    other = ray_local.node_command(Path("/r"), 6000, "two")
    assert {"--head", "--port=6000", "--include-dashboard=false"} <= set(head)
    assert "--address=[::ffff:127.0.0.1]:6000" in other
    assert '--resources={"one": 1}' in head
    assert '--resources={"two": 1}' in other
