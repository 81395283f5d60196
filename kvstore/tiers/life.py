"""Life: how long a cell lives, by the same rule in every tier.

Does not cover: when a tier looks at expiries, the order of eviction (``kvstore.eviction``).
"""

import numpy as np
import numpy.typing as npt


def slide(
    records: npt.NDArray[np.void],
    rows: npt.NDArray[np.uint32],
    stamp: int,
    wall_ms: int,
    ttl_s: int | None = None,
) -> None:
    """Move ``rows`` of a tier's records to ``stamp`` and slide their expiry; never shortens a life.

    ``ttl_s`` is what a new put of them asks for, 0 for no expiry, ``None`` for mere use. Works on
    the fields ``stamp``, ``ttl_s`` and ``expires_ms`` (0: never).
    """
    records["stamp"][rows] = np.maximum(records["stamp"][rows], np.uint64(stamp))
    expiring = records["expires_ms"][rows] != 0
    if ttl_s is not None:
        longer = np.maximum(records["ttl_s"][rows], np.uint32(ttl_s))
        records["ttl_s"][rows] = np.where(expiring & (ttl_s != 0), longer, 0)
        expiring &= ttl_s != 0
    ttl_ms = records["ttl_s"][rows].astype(np.uint64) * np.uint64(1000)
    until = np.maximum(records["expires_ms"][rows], np.uint64(wall_ms) + ttl_ms)
    records["expires_ms"][rows] = np.where(expiring, until, 0)


def later(
    expires_ms: npt.NDArray[np.uint64], until_ms: npt.NDArray[np.uint64] | np.uint64
) -> npt.NDArray[np.uint64]:
    """The later end of both; 0 is never."""
    ends = (expires_ms != 0) & (until_ms != 0)
    found: npt.NDArray[np.uint64] = np.where(ends, np.maximum(expires_ms, until_ms), 0)
    return found


def outlive(records: npt.NDArray[np.void], row: int, former: np.void) -> None:
    """Let a cell that takes another one's place live as long, and be as fresh, as either."""
    for name in ("expires_ms", "ttl_s"):
        records[name][row] = later(records[name][row], former[name])
    records["stamp"][row] = max(records["stamp"][row], former["stamp"])


def clamp(records: npt.NDArray[np.void], rows: npt.NDArray[np.uint32], wall_ms: int) -> None:
    """Let no expiry of ``rows`` be further away than use makes it, whatever the clock was before.

    For what an earlier life of a tier left.
    """
    expires_ms = records["expires_ms"][rows]
    ttl_ms = records["ttl_s"][rows].astype(np.uint64) * np.uint64(1000)
    sliding = (ttl_ms != 0) & (expires_ms != 0)
    longest = np.minimum(expires_ms, np.uint64(wall_ms) + ttl_ms)
    records["expires_ms"][rows] = np.where(sliding, longest, expires_ms)
