"""Every setting of the tier: what it is called, what it may be, and what it is when nobody says.

Covers: one frozen class per role, and the page `docs/config.md`, which `python -m kvstore.config`
prints. Does not cover: the order of sources and unknown names (`kvstore/settings.py`), how a
command line is parsed (`kvstore/cli.py`), sizes that follow from the machine
(`kvstore/machine.py`).

All roles share one flat set of names, so that one file and one environment serve a whole machine:
a role takes the settings that it has, and a name that no role has is an error. No other module
reads the environment.
"""

import ipaddress
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BeforeValidator, ByteSize, Field, model_validator

from kvstore import settings
from kvstore.cell import (
    BLOCK_TOKENS_DEFAULT,
    BLOCK_TOKENS_MAX,
    BLOCK_TOKENS_MIN,
    check_block_tokens,
)
from kvstore.machine import SHM_FOLDER
from kvstore.retention import TTL_S_MAX, parse_retention
from kvstore.settings import FILE_VARIABLE, PREFIX, Role, Settings, Unset, knobs


def _whole_path(path: Path) -> Path:
    """Node processes have working folders of their own, so no relative path may reach them."""
    if path.parts[:1] and path.parts[0].startswith("~"):
        raise ValueError("'~' is not expanded here; write the whole path")
    return path.absolute()


def _addresses(value: object) -> object:
    """One text with commas, as flags and variables have it, or a list of them."""
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list | tuple):
        return parts
    found = tuple(str(part).strip() for part in parts)
    for each in found:
        host, _, port = each.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
            raise ValueError(f"{each!r} is not host:port, such as 127.0.0.1:50051")
    return found


def _retention(value: object) -> object:
    """A name such as "1h" for a number of seconds."""
    is_name = isinstance(value, str) and not value.lstrip("-").isdecimal()
    return parse_retention(str(value)) if is_name else value


WholePath = Annotated[Path, AfterValidator(_whole_path)]
Port = Annotated[int, Field(ge=0, le=65535)]
Seconds = Annotated[float, Field(gt=0.0, le=3600.0)]

Name = Annotated[
    str,
    Field(
        pattern=r"^[a-z][a-z0-9-]{0,31}$",
        description="Name of the tier: lower-case letters, digits and dashes. Two tiers on one "
        "machine differ in it.",
    ),
]
_STATE_FOLDER = "Where a tier keeps its records, tokens and logs."
_STATE_FOLDER_UNSET = Unset("`$XDG_STATE_HOME/samovar`, or `~/.local/state/samovar`")
StateFolder = Annotated[WholePath, Field(description=_STATE_FOLDER), _STATE_FOLDER_UNSET]
#: For a client that is given an address, and may be anywhere.
StateFolderIfAny = Annotated[
    WholePath | None, Field(description=_STATE_FOLDER), _STATE_FOLDER_UNSET
]
TokenFile = Annotated[
    WholePath | None,
    Field(
        description="File with the secret that every caller must show, on the control and on the "
        "bulk port. Only its owner and group may read it."
    ),
    Unset("no secret asked"),
]
HostId = Annotated[
    str | None,
    Field(
        min_length=1,
        max_length=96,
        description="Which host this process is on. A client maps the arenas of nodes with its own "
        "host identity and reaches the others over sockets.",
    ),
    Unset("this machine's own"),
]
DefaultTtl = Annotated[
    Annotated[int, Field(ge=0, le=TTL_S_MAX)] | None,
    BeforeValidator(_retention),
    Field(
        description="Seconds that a block lives after its last use where the put does not say, "
        "also as 5m, 1h or 24h; 0, or none, is no limit. A client's own goes before the node's.",
    ),
    Unset("no limit"),
]
LogLevel = Annotated[
    Literal["debug", "info", "warning", "error"],
    Field(description="Least severe messages that are logged: debug, info, warning or error."),
]


class ClusterConfig(Settings):
    """One tier as a whole: what `up`, `status` and `down` and its coordinator go by."""

    name: Name = "samovar"
    nodes: Annotated[
        int, Field(ge=1, le=64, description="Storage nodes that `up` starts on this machine.")
    ] = 1
    block_tokens: Annotated[
        int,
        AfterValidator(check_block_tokens),
        Field(
            description="Tokens in a full block, for every model: a power of two from "
            f"{BLOCK_TOKENS_MIN} to {BLOCK_TOKENS_MAX}. Small blocks find more of a prompt, large "
            "ones cost less."
        ),
    ] = BLOCK_TOKENS_DEFAULT
    state_folder: StateFolder
    log_level: LogLevel = "info"


class NodeConfig(Settings):
    """One storage node."""

    state_folder: StateFolder
    shm_folder: Annotated[
        WholePath, Field(description="Folder on a tmpfs, in which the node makes its arena.")
    ] = SHM_FOLDER
    arena_bytes: Annotated[
        ByteSize | None,
        Field(ge=1 << 20, description="Shared memory for blocks, such as `8GiB`."),
        Unset("the smaller of 25 % of the memory limit and 80 % of the free shared memory"),
    ] = None
    nvme_bytes: Annotated[
        ByteSize | None,
        Field(
            ge=0,
            description="Room on a disk for blocks that the shared memory has none for, such as "
            "`20GiB`; 0 is no NVMe tier. All of it is allocated at the start.",
        ),
        Unset(
            "the smaller of 20 GiB and 10 % of the free disk, which all nodes of a machine share; "
            "0 below 64 MiB"
        ),
    ] = None
    nvme_folder: Annotated[
        WholePath | None,
        Field(
            description="Folder on a local disk in which the node makes its NVMe tier, best on a "
            "file system that takes O_DIRECT."
        ),
        Unset("a folder in the node's own, below `state_folder`"),
    ] = None
    nvme_daily_bytes: Annotated[
        ByteSize,
        Field(
            ge=0,
            description="How much a node writes to its NVMe tier in a day at most; 0 is no limit.",
        ),
    ] = ByteSize(0)
    hold_bytes: Annotated[
        ByteSize | None,
        Field(
            ge=0,
            description="How many bytes of blocks a node promises to keep for one tenant at most; "
            "all tenants together get half of its shared memory. 0 is no promises.",
        ),
        Unset("25 % of the shared memory for blocks"),
    ] = None
    replication_bytes_per_s: Annotated[
        ByteSize,
        Field(
            ge=0,
            description="How many bytes a second a node sends at most so that other nodes have "
            "copies of what it has promised; 0 is no limit.",
        ),
    ] = ByteSize(64 << 20)
    bind_host: Annotated[
        str,
        Field(
            min_length=1,
            description="Address on which both ports listen. Another than a loopback address needs "
            "`token_file` or `insecure`.",
        ),
    ] = "127.0.0.1"
    advertise_host: Annotated[
        str | None,
        Field(
            min_length=1,
            description="Address under which clients and other nodes find both ports. Must be "
            "given where `bind_host` stands for every address, as 0.0.0.0 does.",
        ),
        Unset("`bind_host`"),
    ] = None
    control_port: Annotated[Port, Field(description="Port for gRPC; 0 takes any free one.")] = 0
    bulk_port: Annotated[Port, Field(description="Port for bytes; 0 takes any free one.")] = 0
    token_file: TokenFile = None
    insecure: Annotated[
        bool,
        Field(
            description="Allow an address that is not loopback without a secret: whoever reaches "
            "it reads and writes everything."
        ),
    ] = False
    host_id: HostId = None
    default_ttl_s: DefaultTtl = None
    log_level: LogLevel = "info"

    @model_validator(mode="after")
    def _strangers_need_a_token(self) -> Self:
        if is_loopback(self.bind_host) or self.token_file is not None or self.insecure:
            return self
        raise ValueError(
            f"bind_host {self.bind_host} can be reached from other machines; set token_file, or "
            "insecure to let everybody in"
        )

    @model_validator(mode="after")
    def _others_need_an_address(self) -> Self:
        if not is_wildcard(self.advertise_host or self.bind_host):
            return self
        raise ValueError(
            f"nobody can connect to {self.advertise_host or self.bind_host}; set advertise_host to "
            "the address under which other machines reach this one"
        )


class ClientConfig(Settings):
    """A client, wherever it runs: how it gets in, and how long it waits."""

    address: Annotated[
        tuple[str, ...],
        BeforeValidator(_addresses),
        Field(
            description="Where a client gets in: `host:port`, the control address of a storage "
            "node, or several with commas, of which the first that answers is taken."
        ),
        Unset("the tier `name` that runs on this machine"),
    ] = ()
    name: Name = "samovar"
    state_folder: StateFolderIfAny = None
    token_file: TokenFile = None
    host_id: HostId = None
    call_deadline_s: Annotated[
        Seconds, Field(description="How long a client waits for a node's answer to one call.")
    ] = 2.0
    get_deadline_s: Annotated[
        Seconds,
        Field(description="How long a client reads; what has come by then is a shorter prefix."),
    ] = 5.0
    put_deadline_s: Annotated[
        Seconds, Field(description="How long a client writes; the rest is not stored.")
    ] = 30.0
    default_ttl_s: DefaultTtl = None


ROLES: tuple[type[Settings], ...] = (ClusterConfig, NodeConfig, ClientConfig)


def name_flag(name: str) -> str:
    """What a command about this tier needs besides its own words."""
    return "" if name == ClusterConfig.model_fields["name"].default else f" --name {name}"


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`; a name other than localhost is taken as not."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def is_wildcard(host: str) -> bool:
    """Whether `host` stands for all addresses of a machine, so that it leads to none."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_unspecified
    except ValueError:
        return False


def load(role: type[Role], flags: Mapping[str, object], file: Path | None = None) -> Role:
    """The role's settings in this process; raises ConfigError with one sentence."""
    return resolve(role, flags, os.environ, file)


def resolve(
    role: type[Role], flags: Mapping[str, object], environ: Mapping[str, str], file: Path | None
) -> Role:
    """`load` with a given environment."""
    derived: dict[str, object] = {}
    if base := environ.get("XDG_STATE_HOME"):
        derived["state_folder"] = Path(base) / "samovar"
    elif home := environ.get("HOME"):
        derived["state_folder"] = Path(home) / ".local/state/samovar"
    return settings.resolve(role, ROLES, flags, environ, file, derived)


def page() -> str:
    """The text of `docs/config.md`."""
    rows = [
        f"| `{knob.name}` | {knob.default} | {', '.join(knob.roles)} | {knob.description} |"
        for knob in knobs(ROLES)
    ]
    return "\n".join([_PAGE_HEAD, *rows, ""])


_PAGE_HEAD = f"""\
# Settings

This page is printed by `python -m kvstore.config`; a test fails when it is not current.

A setting `arena_bytes` is given, strongest first, by the flag `--arena-bytes`, by the variable
`{PREFIX}ARENA_BYTES`, or by a line `arena_bytes = "8GiB"` in a TOML file, which `--config` or the
variable `{FILE_VARIABLE}` names. Names are flat and shared by all roles; a role takes those that
it has. A name that no role has is an error, and so is a variable `{PREFIX}...` that names none. An
empty variable counts as not set. Byte sizes may have a unit (`512MiB`, `8GiB`); times are in
seconds; relative paths start at the working folder of the command.

The roles: *cluster* is a tier as a whole, *node* each of its storage nodes; `samovar up` takes the
settings of both. *client* is whoever asks the tier: `Samovar.connect()` goes by variables and file,
its arguments go before them, and `Samovar.from_config(ClientConfig(...))` takes neither.

| setting | default | role | meaning |
| --- | --- | --- | --- |"""


if __name__ == "__main__":
    print(page(), end="")
