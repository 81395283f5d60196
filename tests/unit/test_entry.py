"""How a client gets in, and that it goes by its settings: a real node, on a real port.

Sources of settings in general are in `test_config.py`; here they end in a client that works.
"""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from kvstore.client import Samovar
from kvstore.clock import Deadline, ManualClock
from kvstore.cluster_map import ClusterMap
from kvstore.config import ClientConfig, resolve
from kvstore.entry import Entry, entries
from kvstore.errors import ConfigError, UnavailableError, UsageError
from kvstore.state import Remains, TierFolder, TierRecord
from tests.one_prompt import BLOCK, NAMESPACE, PROMPT, Rows
from tests.served import Served, two_nodes
from tests.worlds import shared_folder

NOBODY = "127.0.0.1:9"  # the discard service: nothing of ours listens there
NODE_TTL_S = 60


@pytest.fixture
def served() -> Iterator[Served]:
    with shared_folder() as folder:
        node = Served(folder, default_ttl_s=NODE_TTL_S)
        node.call(lambda: node.bulletin.post_map(replace(two_nodes(1), block_tokens=BLOCK)))
        yield node
        node.stop()


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No setting of this machine, and a state folder of our own."""
    for name in [name for name in os.environ if name.startswith("SAMOVAR_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SAMOVAR_STATE_FOLDER", str(tmp_path / "state"))
    return monkeypatch


def local_tier(state: Path, cluster_map: ClusterMap, name: str = "samovar") -> TierFolder:
    """What `samovar up` records."""
    folder = TierFolder.of(state, name)
    remains = Remains("0123456789ab", "boot", (), ())
    with folder.claim():
        folder.write(TierRecord(name, 2, 1 << 20, 6379, "/r", (), remains))
        if cluster_map.epoch:
            folder.write_map(cluster_map)
    return folder


def test_an_argument_goes_before_a_variable_before_the_file(
    served: Served, tmp_path: Path, environment: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "samovar.toml"
    environment.setenv("SAMOVAR_CONFIG", str(file))
    file.write_text(f'address = "{served.address}"\n')
    with Samovar.connect() as tier:
        assert tier.block_tokens == BLOCK
    environment.setenv("SAMOVAR_ADDRESS", NOBODY)
    with pytest.raises(UnavailableError, match=NOBODY):
        Samovar.connect()
    with Samovar.connect(served.address) as tier:
        assert tier.block_tokens == BLOCK


def test_the_first_address_that_answers_is_taken(served: Served) -> None:
    with Samovar.connect(f"{NOBODY}, {served.address}") as tier:
        assert tier.block_tokens == BLOCK


def test_the_token_file_is_a_setting(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    environment.setenv("SAMOVAR_ADDRESS", NOBODY)
    environment.setenv("SAMOVAR_TOKEN_FILE", str(tmp_path / "absent"))
    with pytest.raises(ConfigError, match="cannot read the token file"):
        Samovar.connect()


def test_without_an_address_it_is_the_tier_on_this_machine(
    served: Served, tmp_path: Path, environment: pytest.MonkeyPatch
) -> None:
    first, other = two_nodes(1, served.address).nodes
    local_tier(tmp_path / "state", ClusterMap(1, (replace(other, index=0), first)), "mine")
    environment.setenv("SAMOVAR_NAME", "mine")
    with Samovar.connect() as tier:  # the one of the two that answers
        # For good, because the node's clock stands still and ours does not.
        assert tier.put(NAMESPACE, PROMPT, Rows(100, seed=1), ttl_s=0).complete
        rows = Rows(100)
        fetched = tier.get_into(tier.longest_prefix(NAMESPACE, PROMPT), rows)
    assert fetched.by_source == {"local": 96, "remote": 0, "nvme": 0}, "its arena is mapped"
    assert np.array_equal(rows.kv[:, :, :96], Rows(100, seed=1).kv[:, :, :96])


def test_a_worker_of_one_host_tries_the_node_of_that_host_first(tmp_path: Path) -> None:
    first, other = two_nodes(1).nodes
    local_tier(tmp_path, ClusterMap(1, (first, other)))
    config = ClientConfig(state_folder=tmp_path)
    assert entries(config) == [Entry(n.control, n.host_id) for n in (first, other)]
    config = config.model_copy(update={"host_id": other.host_id})
    assert entries(config) == [Entry(n.control, other.host_id) for n in (other, first)]


def test_no_tier_says_what_to_do(tmp_path: Path) -> None:
    todo = r"`samovar up --name mine`, or set SAMOVAR_ADDRESS"
    config = ClientConfig(state_folder=tmp_path, name="mine")
    with pytest.raises(UsageError, match=f"no tier called mine runs on this machine: .*{todo}"):
        Samovar.from_config(config)
    local_tier(tmp_path, ClusterMap(0, ()), "mine")
    with pytest.raises(UsageError, match=f"has no node yet: .*{todo}"):
        Samovar.from_config(config)
    with pytest.raises(UsageError, match="no state folder"):
        Samovar.from_config(ClientConfig())


def test_another_tier_at_the_recorded_address_is_not_taken(served: Served, tmp_path: Path) -> None:
    theirs = replace(two_nodes(2), tier_id="theirs")
    served.call(lambda: served.bulletin.post_map(theirs))
    gone = ClusterMap(1, two_nodes(1, served.address).nodes[:1], tier_id="gone")
    local_tier(tmp_path, gone)
    with pytest.raises(UnavailableError, match=f"at {served.address} is another tier"):
        Samovar.from_config(ClientConfig(state_folder=tmp_path))
    local_tier(tmp_path, replace(gone, tier_id="theirs"))
    Samovar.from_config(ClientConfig(state_folder=tmp_path)).close()


def test_a_tier_that_is_down_is_named(tmp_path: Path) -> None:
    local_tier(tmp_path, two_nodes(1, NOBODY))
    with pytest.raises(UnavailableError, match="tier samovar: see `samovar status`"):
        Samovar.from_config(ClientConfig(state_folder=tmp_path))


def test_a_node_without_a_map_does_not_say_how_large_blocks_are() -> None:
    with shared_folder() as folder:
        node = Served(folder)
        with Samovar.connect(node.address) as tier:
            with pytest.raises(UnavailableError, match="no cluster map yet"):
                _ = tier.block_tokens
            assert tier.longest_prefix(NAMESPACE, PROMPT).tokens == 0
        node.stop()


def test_a_grid_of_other_blocks_than_the_clusters_is_refused(served: Served) -> None:
    other = replace(NAMESPACE, grid=replace(NAMESPACE.grid, block_tokens=64))
    with (
        Samovar.connect(served.address) as tier,
        pytest.raises(UsageError, match="blocks of 64 tokens, this tier 16"),
    ):
        tier.longest_prefix(other, PROMPT)


def test_every_wait_is_a_setting(served: Served) -> None:
    clock = ManualClock()
    waits = {"call_deadline_s": 0.5, "get_deadline_s": 7.0, "put_deadline_s": 11.0}
    config = resolve(ClientConfig, waits | {"address": served.address}, {}, None)
    seen: list[float] = []

    def note(*arguments: object) -> list[object]:
        seen.extend(each.remaining_s() for each in arguments if isinstance(each, Deadline))
        return []

    with (
        Samovar.from_config(config.model_copy(update={"host_id": "host-1"}), clock) as tier,
        mock.patch("kvstore.reading.read", note),
        mock.patch("kvstore.writing.write", note),
        mock.patch("kvstore.client.merged", list),
    ):
        tier.get_into(tier.longest_prefix(NAMESPACE, PROMPT), Rows(100))
        tier.put(NAMESPACE, PROMPT, Rows(100))
        tier.get_into(tier.longest_prefix(NAMESPACE, PROMPT), Rows(100), deadline_s=1.0)
    assert seen == [7.0, 11.0, 1.0]


def test_one_calls_wait_is_a_setting() -> None:
    config = ClientConfig(address=(NOBODY,), call_deadline_s=0.5)
    with mock.patch("kvstore.cluster_routes.ControlClient") as control:
        control.return_value.hello.side_effect = UnavailableError("nobody")
        with pytest.raises(UnavailableError, match="nobody"):
            Samovar.from_config(config)
    control.assert_called_once_with(NOBODY, None, 0.5, clock=mock.ANY)


@pytest.mark.parametrize(
    ("said", "clients", "lives"),
    [(None, None, NODE_TTL_S), (None, 30, 30), (5, 30, 5), (0, 30, 0), (None, 0, 0)],
)
def test_who_says_how_long_blocks_live(
    served: Served, said: int | None, clients: int | None, lives: int
) -> None:
    config = ClientConfig(address=(served.address,), host_id="host-1", default_ttl_s=clients)
    with Samovar.from_config(config) as tier:
        assert tier.put(NAMESPACE, PROMPT, Rows(100, seed=1), ttl_s=said).stored == 6
        held = served.call(lambda: served.node.tier.held_slots())
        assert set(served.node.tier.table.slots["ttl_s"][held].tolist()) == {lives}
