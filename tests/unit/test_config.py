"""Settings: their sources, their limits, and the page that lists them."""

import re
from pathlib import Path

import pytest

from kvstore.config import (
    ROLES,
    ClientConfig,
    ClusterConfig,
    NodeConfig,
    is_loopback,
    page,
    resolve,
)
from kvstore.errors import ConfigError
from kvstore.settings import MAX_FILE_BYTES, Knob, knobs
from tests.source_tree import ROOT

HOME = {"HOME": "/home/somebody"}


def toml(folder: Path, text: str) -> Path:
    path = folder / "samovar.toml"
    path.write_text(text)
    return path


def test_defaults() -> None:
    node = resolve(NodeConfig, {}, HOME, None)
    assert node.state_folder == Path("/home/somebody/.local/state/samovar")
    assert (node.bind_host, node.arena_bytes, node.log_level) == ("127.0.0.1", None, "info")


def test_flag_goes_before_variable_before_file(tmp_path: Path) -> None:
    file = toml(tmp_path, "control_port = 1\nbulk_port = 1\ninsecure = true\n")
    environ = HOME | {"SAMOVAR_CONTROL_PORT": "2", "SAMOVAR_BULK_PORT": "2"}
    node = resolve(NodeConfig, {"control_port": 3, "bulk_port": None}, environ, file)
    assert (node.control_port, node.bulk_port, node.insecure) == (3, 2, True)


def test_variable_names_the_file_unless_an_argument_does(tmp_path: Path) -> None:
    named = toml(tmp_path, "nodes = 3\n")
    environ = HOME | {"SAMOVAR_CONFIG": str(named)}
    assert resolve(ClusterConfig, {}, environ, None).nodes == 3
    other = tmp_path / "other.toml"
    other.write_text("nodes = 4\n")
    assert resolve(ClusterConfig, {}, environ, other).nodes == 4


def test_one_file_serves_all_roles(tmp_path: Path) -> None:
    file = toml(tmp_path, 'nodes = 2\narena_bytes = "512MiB"\n')
    assert resolve(ClusterConfig, {}, HOME, file).nodes == 2
    assert resolve(NodeConfig, {}, HOME, file).arena_bytes == 512 << 20


def test_state_folder_is_that_of_the_xdg_specification() -> None:
    environ = HOME | {"XDG_STATE_HOME": "/var/state"}
    assert resolve(ClusterConfig, {}, environ, None).state_folder == Path("/var/state/samovar")
    with pytest.raises(ConfigError, match="give --state-folder or set SAMOVAR_STATE_FOLDER"):
        resolve(ClusterConfig, {}, {}, None)


def test_empty_variable_is_not_set() -> None:
    assert resolve(NodeConfig, {}, HOME | {"SAMOVAR_TOKEN_FILE": ""}, None).token_file is None


def test_settings_never_change() -> None:
    node = resolve(NodeConfig, {}, HOME, None)
    with pytest.raises(ValueError, match="frozen"):
        node.control_port = 5


@pytest.mark.parametrize("name", ["arena_byte", "arenabytes"])
def test_unknown_names_are_errors_and_say_what_was_meant(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="did you mean arena_bytes"):
        resolve(NodeConfig, {name: 1}, HOME, None)
    with pytest.raises(ConfigError, match=f"SAMOVAR_{name.upper()}; did you mean arena_bytes"):
        resolve(ClusterConfig, {}, HOME | {f"SAMOVAR_{name.upper()}": "1"}, None)
    with pytest.raises(ConfigError, match=r"samovar\.toml; did you mean arena_bytes"):
        resolve(NodeConfig, {}, HOME, toml(tmp_path, f"{name} = 1\n"))


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("SAMOVAR_ARENA_BYTES", "much"),
        ("SAMOVAR_ARENA_BYTES", "1000"),
        ("SAMOVAR_CONTROL_PORT", "65536"),
        ("SAMOVAR_BULK_PORT", "-1"),
        ("SAMOVAR_LOG_LEVEL", "loud"),
        ("SAMOVAR_TOKEN_FILE", "~/token"),
    ],
)
def test_bad_value_names_its_source(variable: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"^{variable} = '{value}': "):
        resolve(NodeConfig, {}, HOME | {variable: value}, None)


def test_all_bad_values_are_named_at_once() -> None:
    with pytest.raises(ConfigError, match=r"--name = 'A': .*; --nodes = 0: "):
        resolve(ClusterConfig, {"nodes": 0, "name": "A"}, HOME, None)


def test_unusable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the settings file"):
        resolve(NodeConfig, {}, HOME, tmp_path / "absent.toml")
    with pytest.raises(ConfigError, match="not valid TOML"):
        resolve(NodeConfig, {}, HOME, toml(tmp_path, "control_port ="))
    with pytest.raises(ConfigError, match="larger than"):
        resolve(NodeConfig, {}, HOME, toml(tmp_path, "#" * (MAX_FILE_BYTES + 1)))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "some-name"])
def test_strangers_need_a_token(host: str, tmp_path: Path) -> None:
    assert not is_loopback(host)
    with pytest.raises(ConfigError, match="set token_file, or insecure"):
        resolve(NodeConfig, {"bind_host": host}, HOME, None)
    found = {"bind_host": host, "advertise_host": "192.0.2.1"}
    resolve(NodeConfig, found | {"token_file": tmp_path / "token"}, HOME, None)
    resolve(NodeConfig, found | {"insecure": True}, HOME, None)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "[::]"])
def test_every_address_is_none_to_connect_to(host: str) -> None:
    everywhere = {"bind_host": host, "insecure": True}
    with pytest.raises(ConfigError, match="set advertise_host"):
        resolve(NodeConfig, everywhere, HOME, None)
    with pytest.raises(ConfigError, match=f"nobody can connect to {re.escape(host)}"):
        resolve(NodeConfig, {"advertise_host": host}, HOME, None)
    node = resolve(NodeConfig, everywhere | {"advertise_host": "192.0.2.1"}, HOME, None)
    assert (node.bind_host, node.advertise_host) == (host, "192.0.2.1")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "[::1]", "localhost"])
def test_loopback_needs_none(host: str) -> None:
    assert resolve(NodeConfig, {"bind_host": host}, HOME, None).token_file is None


def test_page_is_current() -> None:
    current = (ROOT / "docs" / "config.md").read_text()
    assert current == page(), "docs/config.md is stale: run `make docs`"


def test_every_setting_is_described_and_there_are_few() -> None:
    every = knobs(ROLES)
    assert len(every) <= 25
    assert [knob.name for knob in every if not knob.description] == []


def test_shared_settings_are_the_same_in_all_roles() -> None:
    for knob in knobs(ROLES):
        for role in ROLES:
            if knob.name in role.model_fields:
                here = Knob(knob.name, role.model_fields[knob.name], knob.roles)
                assert (here.description, here.default) == (knob.description, knob.default)


def test_a_client_needs_no_state_folder() -> None:
    client = resolve(ClientConfig, {"address": "a:1"}, {}, None)
    assert (client.address, client.state_folder) == (("a:1",), None)
    assert resolve(ClientConfig, {}, HOME, None).state_folder is not None


def test_addresses_may_be_several(tmp_path: Path) -> None:
    environ = HOME | {"SAMOVAR_ADDRESS": "a:1, [::1]:2"}
    assert resolve(ClientConfig, {}, environ, None).address == ("a:1", "[::1]:2")
    file = toml(tmp_path, 'address = ["a:1", "b:2"]\n')
    assert resolve(ClientConfig, {}, HOME, file).address == ("a:1", "b:2")


@pytest.mark.parametrize(
    ("variable", "value", "sentence"),
    [
        ("SAMOVAR_ADDRESS", "a", "is not host:port"),
        ("SAMOVAR_ADDRESS", "a:1,", "is not host:port"),
        ("SAMOVAR_ADDRESS", "a:65536", "is not host:port"),
        ("SAMOVAR_GET_DEADLINE_S", "0", "greater than 0"),
        ("SAMOVAR_PUT_DEADLINE_S", "nan", "finite"),
        ("SAMOVAR_CALL_DEADLINE_S", "3601", "less than or equal to 3600"),
        ("SAMOVAR_DEFAULT_TTL_S", "-1", "greater than or equal to 0"),
        ("SAMOVAR_DEFAULT_TTL_S", str(1 << 32), "less than or equal to"),
    ],
)
def test_bad_values_of_a_client_are_named(variable: str, value: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=f"^{variable} = .*{sentence}"):
        resolve(ClientConfig, {}, HOME | {variable: value}, None)


@pytest.mark.parametrize("block_tokens", ["48", "8", "8192", "many"])
def test_blocks_have_a_power_of_two_of_tokens(block_tokens: str) -> None:
    with pytest.raises(ConfigError, match=f"^--block-tokens = '{block_tokens}': "):
        resolve(ClusterConfig, {"block_tokens": block_tokens}, HOME, None)
    assert resolve(ClusterConfig, {"block_tokens": "16"}, HOME, None).block_tokens == 16


def test_every_setting_is_read_somewhere() -> None:
    source = "".join(path.read_text() for path in (ROOT / "kvstore").rglob("*.py"))
    for role in ROLES:
        for name in role.model_fields:
            assert f".{name}" in source, f"{name} is documented, and nothing goes by it"
