"""Retention classes: names for how long blocks live."""

import pytest

from kvstore.config import NodeConfig, resolve
from kvstore.errors import UsageError
from kvstore.retention import TTL_S_MAX, parse_retention


@pytest.mark.parametrize(
    ("name", "ttl_s"),
    [("5m", 300), ("1h", 3600), ("24h", 86400), ("none", 0), ("90s", 90), ("7d", 604800)],
)
def test_names(name: str, ttl_s: int) -> None:
    assert parse_retention(name) == ttl_s


def test_the_longest() -> None:
    assert parse_retention(f"{TTL_S_MAX}s") == TTL_S_MAX
    with pytest.raises(UsageError, match="such as"):
        parse_retention(f"{TTL_S_MAX + 1}s")


@pytest.mark.parametrize(
    ("written", "ttl_s"), [("1h", 3600), ("none", 0), ("90", 90), (90, 90), (None, None)]
)
def test_a_setting_may_name_its_class(written: str | int | None, ttl_s: int | None) -> None:
    flags = {"default_ttl_s": written}
    assert resolve(NodeConfig, flags, {"HOME": "/home/somebody"}, None).default_ttl_s == ttl_s


@pytest.mark.parametrize(
    "name",
    ["", "5", "m", "0m", "-5m", "5 m", "1.5h", "05m", "5M", "forever", "99999d", "5m\n"],
)
def test_what_says_not_how_long(name: str) -> None:
    with pytest.raises(UsageError, match="such as 5m"):
        parse_retention(name)
