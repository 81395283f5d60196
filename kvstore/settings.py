"""Where a setting's value comes from: flag, environment variable, TOML file, default.

Covers: the order of these sources, unknown names, and one sentence for whatever is wrong. Does not
cover: which settings there are (see `kvstore/config.py`); everything here takes the roles, and the
environment, as arguments.

    flag --arena-bytes  >  variable SAMOVAR_ARENA_BYTES  >  arena_bytes in the file  >  default
"""

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict
from pydantic import ValidationError as PydanticError
from pydantic.fields import FieldInfo

from kvstore.errors import ConfigError

PREFIX = "SAMOVAR_"
#: Names the TOML file; the only variable that is no knob.
FILE_VARIABLE = "SAMOVAR_CONFIG"
MAX_FILE_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Unset:
    """In a knob's annotation: what happens when nobody sets it, in words for the page."""

    meaning: str


class Settings(BaseModel):
    """What all roles have in common: values never change, and nothing unknown gets in."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


Role = TypeVar("Role", bound=Settings)


@dataclass(frozen=True, slots=True)
class Knob:
    """One name, for command lines and for the page."""

    name: str
    field: FieldInfo
    roles: tuple[str, ...]

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return PREFIX + self.name.upper()

    @property
    def description(self) -> str:
        return self.field.description or ""

    @property
    def default(self) -> str:
        """The default as a person would write it, or what being unset means."""
        for note in self.field.metadata:
            if isinstance(note, Unset):
                return note.meaning
        value = self.field.default
        if isinstance(value, bool):
            return f"`{str(value).lower()}`"
        return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def knobs(roles: Sequence[type[Settings]]) -> list[Knob]:
    """The knobs of these roles, each once, in the order of their definition."""
    fields: dict[str, FieldInfo] = {}
    owners: dict[str, list[str]] = {}
    for role in roles:
        for name, field in role.model_fields.items():
            fields.setdefault(name, field)
            owners.setdefault(name, []).append(role.__name__.removesuffix("Config").lower())
    return [Knob(name, field, tuple(owners[name])) for name, field in fields.items()]


@dataclass(frozen=True, slots=True)
class Setting:
    """A value as found, with where it was found, for messages."""

    value: object
    source: str


def resolve(
    role: type[Role],
    roles: Sequence[type[Settings]],
    flags: Mapping[str, object],
    environ: Mapping[str, str],
    file: Path | None,
    derived: Mapping[str, object],
) -> Role:
    """The settings of `role`, one of `roles`; raises ConfigError that names the bad one's source.

    A flag that is None and a variable that is empty are not set. `file` goes before the file that
    the variable SAMOVAR_CONFIG names. `derived` are defaults that depend on the environment.
    """
    every = {knob.name: knob for knob in knobs(roles)}
    if file is None and environ.get(FILE_VARIABLE):
        file = Path(environ[FILE_VARIABLE])
    found = {name: Setting(value, f"default {name}") for name, value in derived.items()}
    if file is not None:
        found |= _from_file(file, every)
    found |= _from_environment(environ, every)
    for name, value in flags.items():
        if value is not None:
            found[name] = Setting(value, every[_known(name, name, every)].flag)
    settings = {name: found[name] for name in role.model_fields if name in found}
    try:
        return role(**{name: setting.value for name, setting in settings.items()})
    except PydanticError as error:
        raise ConfigError(_sentence(error, settings, every)) from None


def _from_file(file: Path, every: Mapping[str, Knob]) -> dict[str, Setting]:
    try:
        with file.open("rb") as stream:
            content = stream.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read the settings file {file}: {error.strerror}") from None
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError(f"{file} is larger than {MAX_FILE_BYTES} bytes; is it the right file?")
    try:
        table = tomllib.loads(content.decode())
    except ValueError as error:  # of both: not UTF-8, not TOML; its text says where
        raise ConfigError(f"the settings file {file} is not valid TOML: {error}") from None
    return {
        _known(name, f"{name} in {file}", every): Setting(value, f"{name} in {file}")
        for name, value in table.items()
    }


def _from_environment(environ: Mapping[str, str], every: Mapping[str, Knob]) -> dict[str, Setting]:
    return {
        _known(variable.removeprefix(PREFIX).lower(), variable, every): Setting(value, variable)
        for variable, value in environ.items()
        if variable.startswith(PREFIX) and variable != FILE_VARIABLE and value != ""
    }


def _known(name: str, source: str, every: Mapping[str, Knob]) -> str:
    """`name` itself, or a ConfigError with the name that was probably meant."""
    if name in every:
        return name
    close = difflib.get_close_matches(name, every, n=1)
    hint = f"did you mean {close[0]}?" if close else "docs/config.md lists all settings"
    raise ConfigError(f"unknown setting {source}; {hint}")


def _sentence(
    error: PydanticError, settings: Mapping[str, Setting], every: Mapping[str, Knob]
) -> str:
    """All that was wrong, in one line that names each value's source."""
    parts = []
    for detail in error.errors(include_url=False, include_context=False):
        message = detail["msg"].removeprefix("Value error, ")
        name = str(detail["loc"][0]) if detail["loc"] else ""
        if name in settings:
            setting = settings[name]
            parts.append(f"{setting.source} = {setting.value!r}: {message}")
        elif name:
            knob = every[name]
            parts.append(f"{name} is needed: give {knob.flag} or set {knob.variable}")
        else:
            parts.append(message)
    return "; ".join(parts)
