"""Options that several commands of `samovar` have, and how they write sizes and times."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import click

from kvstore.errors import UsageError
from kvstore.retention import parse_retention
from kvstore.settings import Settings, knobs

Command = TypeVar("Command", bound=Callable[..., object])


def settings_of(*roles: type[Settings], only: Sequence[str] = ()) -> Callable[[Command], Command]:
    """A flag for every setting of these roles, or `only` some, and `--config` for a file."""

    def decorate(command: Command) -> Command:
        for knob in reversed(knobs(roles)):
            if only and knob.name not in only:
                continue
            shown = f"{knob.description} [{knob.variable}, default {knob.default.replace('`', '')}]"
            if knob.field.annotation is bool:
                command = click.option(knob.flag, is_flag=True, default=None, help=shown)(command)
            else:
                command = click.option(knob.flag, metavar="VALUE", help=shown)(command)
        file = click.Path(dir_okay=False, path_type=Path)
        return click.option("--config", type=file, help="TOML file with settings.")(command)

    return decorate


json_option = click.option("--json", "as_json", is_flag=True, help="End with one line of JSON.")


def seconds_of(ctx: click.Context, param: click.Parameter, text: str) -> int:
    """An option's callback: seconds, written as in settings: `90s`, `5m`, `1h`, `7d`."""
    with suppress(UsageError):
        if seconds := parse_retention(text):
            return seconds
    raise click.BadParameter(f"{text!r} is no time such as 90s, 5m, 1h or 7d", ctx, param)


def mebibytes(size_bytes: int) -> str:
    """A size for people."""
    return f"{size_bytes / (1 << 20):,.0f} MiB"


def used(used_bytes: int, size_bytes: int) -> str:
    """How much of a room is taken, for people."""
    return f"{used_bytes >> 20:,} of {mebibytes(size_bytes)}" if size_bytes else "none"


def duration(milliseconds: int) -> str:
    """A time for people: the two largest units that matter."""
    seconds = milliseconds // 1000
    if seconds < 60:
        return f"{milliseconds / 1000:.1f}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02}s"
    if seconds < 48 * 3600:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02}m"
    return f"{seconds // (24 * 3600)}d{seconds % (24 * 3600) // 3600:02}h"
