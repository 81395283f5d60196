"""`constraints-oldest.txt` names the lower end of every range that `make test-oldest` installs."""

import re
import tomllib

import pytest

from tests.source_tree import ROOT

_PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
_RANGE = re.compile(r"(?P<name>[\w.-]+)>=(?P<lowest>[\d.]+)")
_NAMED_BY_MAKE = "torch"


def lower_ends() -> dict[str, str]:
    """The oldest version of each dependency that the package, or its engine, says it runs with."""
    ranges = [*_PROJECT["dependencies"], *_PROJECT["optional-dependencies"]["engine"]]
    found = [_RANGE.match(each) for each in ranges]
    assert all(found), "a range without a lower end"
    return {each["name"]: each["lowest"] for each in found if each is not None}


def oldest() -> dict[str, str]:
    """What the oldest environment is made of."""
    lines = (ROOT / "constraints-oldest.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def test_every_dependency_is_there_and_nothing_else() -> None:
    assert oldest().keys() == lower_ends().keys() - {_NAMED_BY_MAKE}


@pytest.mark.parametrize("name", sorted(oldest()))
def test_it_has_the_lower_end_of(name: str) -> None:
    # 1.4 stands for any 1.4.x: the very first of them need not have a wheel.
    assert f"{oldest()[name]}.".startswith(f"{lower_ends()[name]}.")
