"""The commands of `samovar` about blocks: delete, hold, release, erase, inspect.

Each is a client of the tier that the settings name. Does not cover: what is printed where and which
exit code means what (`kvstore.cli`), what the tier does about it (`kvstore.keeping`).
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

import click
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from kvstore.answers import Inspected
from kvstore.calls import REPLICAS_MAX, CopyState, HoldMark, HoldOutcome, Inspection
from kvstore.cli_options import duration, json_option, seconds_of, settings_of
from kvstore.client import Samovar
from kvstore.config import ClientConfig, load
from kvstore.key import KEY_BYTES, Keys, as_keys

KEYS_MAX = 1 << 20
WIDTH = 120
"""Of a table in a file or a pipe."""
_SHOWN_DIGITS = 16

_DECLINED = {
    HoldOutcome.OVER_BUDGET: "it has promised as much as it may: release something, or raise "
    "hold_bytes",
    HoldOutcome.NOT_HELD: "a block is not there: store it first",
    HoldOutcome.TOO_MANY: "it has as many promises as it keeps track of: release some",
    HoldOutcome.FAILED: "it gave no answer, or could not write the promise down: try again",
}

_SHORT = {
    CopyState.UNDER_WAY: "the other is on its way",
    CopyState.ALONE: "no other node answers",
    CopyState.DECLINED: "no other node took it",
}

client_options = settings_of(
    ClientConfig, only=("address", "name", "state_folder", "token_file", "call_deadline_s")
)
tenant_option = click.option(
    "--tenant", default="", metavar="NAME", help="Whose promise it is. [default: nobody's]"
)
keys_argument = click.argument("keys", nargs=-1, metavar="[KEY]...")
chain_option = click.option(
    "--chain", type=click.File(), metavar="FILE", help="File of keys, one a line; - is the input."
)


@click.command(short_help="Delete blocks on every node.")
@keys_argument
@chain_option
@client_options
@json_option
def delete(
    keys: tuple[str, ...],
    chain: TextIO | None,
    config: Path | None,
    as_json: bool,
    **flags: object,
) -> None:
    """Delete blocks, by their keys (64 hex digits each), on every node of the tier.

    \b
    samovar delete 5f0c...           one block
    samovar delete --chain FILE      many, one key a line
    samovar delete --chain - <FILE   the same from standard input

    When it is done, nobody finds them, and no restart brings them back. A node that does not answer
    is named: it learns of the delete when it is back, before it shows anything. Such blocks may be
    stored again afterwards.

    Exit code 1 if a node has not confirmed.
    """
    wanted = _keys(keys, chain)
    with _client(flags, config) as tier:
        deleted = tier.delete_keys(wanted)
    click.echo(f"Deleted {_count(deleted.blocks)}.")
    _end(asdict(deleted), as_json, deleted.pending)


@click.command(short_help="Have blocks kept, whatever else is stored.")
@click.argument("handle")
@keys_argument
@chain_option
@click.option(
    "--ttl",
    "ttl_s",
    callback=seconds_of,
    required=True,
    metavar="TIME",
    help="For how long: 90s, 5m, 1h, 7d.",
)
@tenant_option
@click.option(
    "--replicas",
    type=click.IntRange(1, REPLICAS_MAX),
    default=1,
    show_default=True,
    help="On how many nodes each block is kept.",
)
@client_options
@json_option
def hold(
    handle: str,
    keys: tuple[str, ...],
    chain: TextIO | None,
    ttl_s: int,
    tenant: str,
    replicas: int,
    config: Path | None,
    as_json: bool,
    **flags: object,
) -> None:
    """Have blocks kept under a name of yours, HANDLE, until the time is up or it is released.

    \b
    samovar hold contract --chain FILE --ttl 1h
    samovar hold contract --chain FILE --ttl 1h --replicas 2
    samovar release contract

    All of them are promised, or none. A promise survives restarts; only a delete goes before it.
    Each node promises a tenant as much as its setting hold_bytes says, and declines the rest.

    With two replicas the nodes see to it, from then on, that another node has a copy, also when one
    of them dies; samovar inspect says whether one has, and if not, why.

    Exit code 1 if a node declined.
    """
    wanted = _keys(keys, chain)
    with _client(flags, config) as tier:
        held = tier.hold_keys(wanted, handle, ttl_s, tenant, replicas)
    fields = {**asdict(held), "outcome": held.outcome.name}
    if held.granted:
        left = duration(round(1000 * ttl_s))
        click.echo(f"{handle}: {_count(len(wanted))}, {held.bytes:,} bytes, kept for {left}.")
        if replicas > 1:
            click.echo("Another node gets a copy; samovar inspect says when it has it.")
    else:
        where = f" by {held.node}" if held.node else ""
        click.echo(f"{handle}: declined{where}: {_DECLINED[held.outcome]}.")
    _end(fields, as_json, failed=not held.granted)


@click.command(short_help="End a promise early.")
@click.argument("handle")
@tenant_option
@client_options
@json_option
def release(handle: str, tenant: str, config: Path | None, as_json: bool, **flags: object) -> None:
    """End what `samovar hold HANDLE` promised: its blocks are ordinary again, its budget is free.

    Exit code 1 if no node that answers had such a promise.
    """
    with _client(flags, config) as tier:
        released = tier.release(handle, tenant)
    if released.found:
        click.echo(f"Released {handle}.")
    else:
        click.echo(f"No node that answers had promised {handle}.")
    if released.silent:
        click.echo(f"No answer from {', '.join(released.silent)}: there it ends by itself.")
    _end(asdict(released), as_json, failed=not released.found)


@click.command(short_help="Put all that is stored for a tenant out of reach.")
@click.argument("tenant")
@client_options
@json_option
def erase(tenant: str, config: Path | None, as_json: bool, **flags: object) -> None:
    """Erase TENANT: what was stored for it is found by nobody any more, whichever node has it.

    Every tenant has an epoch that is part of all its keys; this begins the next one. When it is
    done, every client that lives goes by it. The old blocks take up room until they are evicted,
    and cannot be had again. There is no way back.

    Exit code 1 if a node, or a client of it, has not confirmed.
    """
    with _client(flags, config) as tier:
        erased = tier.erase(tenant)
    click.echo(f"Erased tenant {tenant}: it is in epoch {erased.epoch} now.")
    _end(asdict(erased), as_json, erased.pending)


@click.command(short_help="Say where blocks are, and how long they are kept.")
@keys_argument
@chain_option
@client_options
@json_option
def inspect(
    keys: tuple[str, ...],
    chain: TextIO | None,
    config: Path | None,
    as_json: bool,
    **flags: object,
) -> None:
    """Ask every node what it knows of blocks, by their keys (64 hex digits each).

    \b
    samovar inspect 5f0c...
    samovar inspect --chain FILE --json

    Shown are the cells in the arena and on the disk, the payload's size, when the block expires,
    which promises keep it, when it was last read and found whole, and when it was deleted. Asking
    touches nothing.

    Exit code 1 if a node gave no answer.
    """
    wanted = _keys(keys, chain)
    with _client(flags, config) as tier:
        found = tier.inspect(wanted)
    _show(wanted, found)
    nodes = {name: [_fields(block) for block in blocks] for name, blocks in found.nodes.items()}
    if found.silent:
        click.echo(f"No answer from {', '.join(found.silent)}.")
    _end({"nodes": nodes, "silent": found.silent}, as_json, failed=bool(found.silent))


COMMANDS = (delete, hold, release, erase, inspect)


def _client(flags: dict[str, object], config: Path | None) -> Samovar:
    return Samovar.from_config(load(ClientConfig, flags, config))


def _keys(words: Sequence[str], chain: TextIO | None) -> Keys:
    """Packed keys of arguments and file; at least one."""
    lines = [] if chain is None else [line.strip() for line in chain]
    texts = [*words, *filter(None, lines)]
    if not 0 < len(texts) <= KEYS_MAX:
        raise click.UsageError(
            f"{len(texts)} keys were named: name 1 to {KEYS_MAX}, here or with --chain"
        )
    return as_keys(b"".join(map(_key, texts)))


def _key(text: str) -> bytes:
    try:
        key = bytes.fromhex(text)
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise click.UsageError(f"{text!r} is no block key: {2 * KEY_BYTES} hex digits are one")
    return key


def _count(blocks: int) -> str:
    return "1 block" if blocks == 1 else f"{blocks:,} blocks"


def _end(
    fields: dict[str, object], as_json: bool, pending: Sequence[str] = (), failed: bool = False
) -> None:
    """Who is not done yet, the line of JSON, and the exit code."""
    if pending:
        click.echo(f"Pending: {', '.join(pending)} did not confirm; it is done when they answer.")
    if as_json:
        click.echo(json.dumps(fields))
    if pending or failed:
        raise click.exceptions.Exit(1)


def _show(keys: Keys, found: Inspected) -> None:
    table = Table(box=SIMPLE, pad_edge=False)
    for title in ("block", "node"):
        table.add_column(title, no_wrap=True)
    for title in ("arena", "disk", "bytes", "expires", "held", "verified", "deleted"):
        table.add_column(title, justify="right")
    for row, key in enumerate(keys):
        name = key.tobytes().hex()[:_SHOWN_DIGITS]
        known = {
            node: blocks[row] for node, blocks in found.nodes.items() if _is_known(blocks[row])
        }
        if not known:
            table.add_row(name, "nowhere")
        for node, block in known.items():
            table.add_row(name, node, *_columns(block))
    console = Console()
    (console if console.is_terminal else Console(width=WIDTH)).print(table)


def _is_known(block: Inspection) -> bool:
    return bool(block.arena_mask or block.disk_mask or block.buried_ms_ago is not None)


def _columns(block: Inspection) -> tuple[str, ...]:
    cells = [str(mask.bit_count()) if mask else "" for mask in (block.arena_mask, block.disk_mask)]
    here = block.arena_mask or block.disk_mask
    return (
        *cells,
        f"{block.size_bytes:,}" if here else "",
        ("never" if not block.ttl_s else f"in {duration(block.remaining_ms)}") if here else "",
        ", ".join(map(_held, block.holds)),
        _ago(block.verified_ms_ago),
        _ago(block.buried_ms_ago),
    )


def _held(mark: HoldMark) -> str:
    text = f"{mark.handle} {duration(mark.remaining_ms)}"
    if mark.replicas == 1:
        return text
    why = f": {_SHORT[mark.state]}" if mark.state in _SHORT else ""
    return f"{text} ({mark.copies} of {mark.replicas} copies{why})"


def _ago(milliseconds: int | None) -> str:
    return "" if milliseconds is None else f"{duration(milliseconds)} ago"


def _fields(block: Inspection) -> dict[str, object]:
    holds = [
        {**asdict(mark), "copies": mark.copies, "state": mark.state.name} for mark in block.holds
    ]
    return {**asdict(block), "key": block.key.hex(), "holds": holds}
