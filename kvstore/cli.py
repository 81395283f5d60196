"""The command `samovar`: a tier on this machine, from the shell.

Covers: flags, what is printed, exit codes: 0 done, 1 not so (no tier runs, a check failed), 2 the
caller can put it right, 130 interrupted. Does not cover: what the commands do
(`kvstore.cluster.launch`, `kvstore.doctor`).

What a command found goes to standard output, its progress to standard error. With `--json` the
last line of standard output is one JSON object.
"""

import importlib.metadata
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from types import FrameType

import click
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from kvstore import cli_blocks
from kvstore import doctor as checks
from kvstore.block import FORMAT_VERSION
from kvstore.calls import NodeStats
from kvstore.cli_options import json_option, mebibytes, settings_of, used
from kvstore.clock import SystemClock
from kvstore.cluster import head
from kvstore.cluster.launch import LocalTier, Standing
from kvstore.cluster_map import NodeInfo
from kvstore.config import ClientConfig, ClusterConfig, NodeConfig, load, name_flag
from kvstore.errors import SamovarError, UnavailableError
from kvstore.machine import SMALL_ARENA_BYTES
from kvstore.rpc.client import ControlClient
from kvstore.rpc.wire import WIRE_VERSION
from kvstore.secret import read_secret
from kvstore.state import STATE_VERSION, TierFolder, TierRecord


def version_text() -> str:
    """The package's version, and those of what it writes and speaks."""
    try:
        version = importlib.metadata.version("samovar")
    except importlib.metadata.PackageNotFoundError:
        version = "(not installed)"
    return (
        f"samovar {version}, block format {FORMAT_VERSION}, wire {WIRE_VERSION}, "
        f"state {STATE_VERSION}"
    )


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(message=version_text(), version="")
def cli() -> None:
    """Samovar keeps prompts warm: what one worker has prefilled, any other fetches.

    `samovar up` starts a tier on this machine, with a Ray of its own; in Python,
    Samovar.connect() of kvstore.client is then a client of it.

    A setting is a flag, a variable SAMOVAR_..., or a line in a TOML file, in this order;
    docs/config.md lists them all.
    """


@cli.command(short_help="Start a tier on this machine.")
@settings_of(ClusterConfig, NodeConfig)
@json_option
def up(config: Path | None, as_json: bool, **flags: object) -> None:
    """Start a tier on this machine, and return when its nodes serve.

    \b
    samovar up                          one node
    samovar up --arena-bytes 8GiB       with this much shared memory for blocks
    samovar up --nodes 2                two, each as if on a host of its own
    samovar up --name other             a second tier beside the first

    How much memory? A token's KV takes 2 x layers x KV heads x head size x bytes per number:
    128 KiB for an 8B model with 8 KV heads in bf16, so that 8GiB hold 65,536 tokens.

    It goes on running when the command ends: Samovar.connect() in Python is then a client of it,
    `samovar status` shows it, `samovar down` ends it. Where it runs already, `up` says so and mends
    what has died. It touches only what it started itself, never another Ray. Ctrl-C while it starts
    leaves nothing behind.
    """
    cluster, node = load(ClusterConfig, flags, config), load(NodeConfig, flags, config)
    # A service manager ends commands with SIGTERM: clear up as after Ctrl-C.
    signal.signal(signal.SIGTERM, _interrupted)
    with progress() as tell:
        tier = LocalTier(cluster, node, SystemClock(), os.urandom, tell)
        standing = tier.up()
    _show_standing(standing, tier.folder)
    if node.nvme_bytes is None and not standing.record.nvme_bytes:
        click.echo(f"No NVMe tier: {checks.SMALL_DISK}.")
    if as_json:
        click.echo(json.dumps(_standing_fields(standing, tier.folder)))


@cli.command(short_help="End the tier and free its memory.")
@settings_of(ClusterConfig, NodeConfig, only=("name", "state_folder", "log_level"))
@click.option("--purge", is_flag=True, help="Discard its state and logs too, of any version.")
@json_option
def down(config: Path | None, purge: bool, as_json: bool, **flags: object) -> None:
    """End the tier: its processes, its Ray, its arenas with all blocks.

    What others run is not touched. State, logs and what is on disk, in the --nvme-folder that `up`
    was given too, stay unless you --purge them.
    """
    cluster, node = load(ClusterConfig, flags, config), load(NodeConfig, flags, config)
    with progress() as tell:
        tell(f"Ending tier {cluster.name}")
        ended = LocalTier(cluster, node, SystemClock(), os.urandom, tell).down(purge)
    if ended.processes or ended.folders:
        count = f"{ended.processes} processes and {ended.folders} folders"
        click.echo(f"Ended tier {cluster.name}: {count} are gone.")
    else:
        click.echo(f"Nothing was left of a tier called {cluster.name}.")
    if as_json:
        click.echo(json.dumps({"processes": ended.processes, "folders": ended.folders}))


@cli.command(short_help="Show the tier's nodes, and what they hold.")
@settings_of(ClientConfig, only=("name", "state_folder", "token_file", "call_deadline_s"))
@json_option
def status(config: Path | None, as_json: bool, **flags: object) -> None:
    """Show the nodes of the tier, what they hold, and what becomes of it.

    Promised is how many promises there are, and of what may be promised how much is. Deleted,
    evicted, lost (evicted before it was on the disk, where it was to be), expired and damaged are
    counted since the node's start. Shown: a node that was away shows nothing before it has heard
    from the others what was deleted meanwhile.

    Exit code 1 if one does not answer, or if what would restart it has ended.
    """
    shared = {name: flags[name] for name in ("name", "state_folder")}
    cluster, client = load(ClusterConfig, shared, config), load(ClientConfig, flags, config)
    token = read_secret(client.token_file)
    folder = TierFolder.of(cluster.state_folder, cluster.name)
    record = folder.read()
    if record is None:
        start = f"samovar up{name_flag(cluster.name)}"
        click.echo(f"No tier called {cluster.name} runs; start it with `{start}`.")
        if as_json:
            click.echo(json.dumps({"name": cluster.name, "map_epoch": 0, "nodes": []}))
        raise click.exceptions.Exit(1)
    cluster_map = folder.read_map()
    found = [(info, _ask(info, token, client.call_deadline_s)) for info in cluster_map.nodes]
    if found:
        _show_nodes(cluster.name, cluster_map.epoch, found)
    answering = sum(stats is not None for _, stats in found)
    complaint = _complaint(record, answering, folder.log_folder)
    if complaint is not None:
        click.echo(f"{complaint}.")
    if as_json:
        nodes = [_node_fields(info, stats) for info, stats in found]
        fields = {"name": cluster.name, "map_epoch": cluster_map.epoch, "nodes": nodes}
        click.echo(json.dumps(fields | {"complaint": complaint}))
    if complaint is not None:
        raise click.exceptions.Exit(1)


for command in cli_blocks.COMMANDS:
    cli.add_command(command)


@cli.command(short_help="Say what on this machine is in the way, and what to do.")
@settings_of(ClusterConfig, NodeConfig)
@json_option
def doctor(config: Path | None, as_json: bool, **flags: object) -> None:
    """Look at this machine: what is in the way of a tier, what an old one left, what to do.

    Exit code 1 if something makes a tier impossible.
    """
    cluster, node = load(ClusterConfig, flags, config), load(NodeConfig, flags, config)
    findings = checks.examine(cluster, node)
    for finding in findings:
        mark = click.style(f"{finding.level.value:4}", fg=_COLOURS[finding.level])
        click.echo(f"{mark}  {finding.subject}: {finding.sentence}")
    if as_json:
        fields = [{**asdict(finding), "level": finding.level.value} for finding in findings]
        click.echo(json.dumps({"findings": fields}))
    if any(finding.level is checks.Level.FAIL for finding in findings):
        raise click.exceptions.Exit(1)


_COLOURS = {checks.Level.OK: "green", checks.Level.WARN: "yellow", checks.Level.FAIL: "red"}


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """What to tell a person who waits: a spinner on a terminal, lines anywhere else."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda text: click.echo(f"{text} ...", err=True)
        return
    with console.status("") as spinner:
        yield spinner.update


def main() -> int:
    """The command; answers its exit code."""
    try:
        return int(cli.main(prog_name="samovar", standalone_mode=False) or 0)
    except SamovarError as error:
        click.echo(f"samovar: {error}", err=True)
        return 2
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("samovar: interrupted; nothing was left running", err=True)
        return 130


def _interrupted(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _complaint(record: TierRecord, answering: int, log_folder: Path) -> str | None:
    """What of the tier is not as it should be, and what to do; None where all is well."""
    up = f"`samovar up{name_flag(record.name)}`"
    if record.ray_port == 0:
        return f"Tier {record.name} is being started, or its start was cut short: {up} starts it"
    complaint = head.complaint(record.remains)
    if complaint is not None or answering == record.nodes:
        return complaint
    return (
        f"{record.nodes - answering} of {record.nodes} nodes gave no answer: one that died is "
        f"back within seconds; if it is not, see {log_folder}, then {up}"
    )


def _ask(info: NodeInfo, token: str | None, deadline_s: float) -> NodeStats | None:
    """What the node says of itself, None if it does not answer."""
    with (
        closing(ControlClient(info.control, token, deadline_s)) as client,
        suppress(UnavailableError),
    ):
        return client.stats()
    return None


def _show_standing(standing: Standing, folder: TierFolder) -> None:
    record = standing.record
    verb = "is up" if standing.fresh else "runs already"
    count = "1 node" if record.nodes == 1 else f"{record.nodes} nodes"
    click.echo(f"Tier {record.name} {verb}: {count} of {mebibytes(record.arena_bytes)} each.")
    for info in standing.cluster_map.nodes:
        click.echo(f"  {info.node_id}  control {info.control}  bulk {info.bulk}")
        click.echo(f"      arena {info.arena_folder}  host {info.host_id}")
    if record.nvme_bytes:
        disk = mebibytes(record.nvme_bytes)
        click.echo(f"Each has {disk} of disk for what its arena has no room for.")
    click.echo(f"State {folder.path}, logs {folder.log_folder}")
    if record.arena_bytes < SMALL_ARENA_BYTES:
        click.echo(
            f"An arena below {mebibytes(SMALL_ARENA_BYTES)} holds little more than one long "
            "prompt: raise it with --arena-bytes, or give the machine more shared memory."
        )
    name = name_flag(record.name)
    variable = f", with SAMOVAR_NAME={record.name}" if name else ""
    click.echo(f"Next: samovar status{name}; in Python, Samovar.connect(){variable};")
    click.echo(f"in the end, samovar down{name}")


def _show_nodes(name: str, epoch: int, found: Sequence[tuple[NodeInfo, NodeStats | None]]) -> None:
    holding = _table(
        f"Tier {name}, map {epoch}",
        ("node", "control"),
        ("start", "arena", "disk", "cells", "sessions"),
    )
    living = _table(
        "What becomes of blocks", ("node",),
        ("promised", "deleted", "evicted", "lost", "expired", "damaged", "shown"),
    )  # fmt: skip
    for info, stats in found:
        row = [info.node_id, info.control, str(info.incarnation)]
        if stats is None:
            holding.add_row(*row, "silent")
            continue
        host, nvme = stats.host, stats.nvme
        sizes = [used(tier.held_bytes, tier.capacity_bytes) for tier in (host, nvme)]
        holding.add_row(*row, *sizes, str(host.held_cells), str(stats.sessions))
        counts = [
            host.deleted + nvme.deleted, host.evicted, host.dropped_unspilled,
            host.expired + nvme.expired, host.damaged + nvme.damaged,
        ]  # fmt: skip
        promised = f"{stats.holds}: {used(stats.promised_bytes, stats.promisable_bytes)}"
        promised += f", {stats.short_holds} short of copies" if stats.short_holds else ""
        shown = "not yet" if stats.is_sealed else "yes"
        living.add_row(info.node_id, promised, *map(str, counts), shown)
    for table in (holding, living):
        if table.row_count:
            Console().print(table)


def _table(title: str, names: Sequence[str], numbers: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE, pad_edge=False)
    for name in names:
        table.add_column(name, no_wrap=True)
    for number in numbers:
        table.add_column(number, justify="right")
    return table


def _standing_fields(standing: Standing, folder: TierFolder) -> dict[str, object]:
    return {
        "name": standing.record.name,
        "fresh": standing.fresh,
        "map_epoch": standing.cluster_map.epoch,
        "arena_bytes": standing.record.arena_bytes,
        "nvme_bytes": standing.record.nvme_bytes,
        "state_folder": str(folder.path),
        "log_folder": str(folder.log_folder),
        "nodes": [asdict(info) for info in standing.cluster_map.nodes],
    }


def _node_fields(info: NodeInfo, stats: NodeStats | None) -> dict[str, object]:
    answer: dict[str, object] = {} if stats is None else asdict(stats)
    return {**asdict(info), "answers": stats is not None, **answer}


if __name__ == "__main__":
    sys.exit(main())
