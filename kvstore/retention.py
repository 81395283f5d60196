"""Retention: how long blocks live after their last use, by name.

    5m, 1h, 24h    the classes that most traffic is in
    none           as long as there is room
    90s, 7d, ...   any other whole number of seconds, minutes, hours or days

Seconds are what tiers and the wire know; 0 is ``none``. Does not cover: how use slides an expiry
(``kvstore.tiers.life``), who expires (the tiers).
"""

import re

from kvstore.errors import UsageError

TTL_S_MAX = (1 << 32) - 1
NO_EXPIRY = "none"

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 24 * 3600}
_DURATION = re.compile(r"([1-9][0-9]{0,9})([smhd])")


def parse_retention(name: str) -> int:
    """How many seconds a class or duration stands for, 0 for ``none``."""
    if name == NO_EXPIRY:
        return 0
    found = _DURATION.fullmatch(name)
    ttl_s = int(found[1]) * _UNITS_S[found[2]] if found else 0
    if not 0 < ttl_s <= TTL_S_MAX:
        raise UsageError(
            f"{name!r} says not how long: give a number with s, m, h or d, such as 5m, 1h or 24h, "
            f"or {NO_EXPIRY}"
        )
    return ttl_s
