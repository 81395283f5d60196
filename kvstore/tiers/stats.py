"""Stats: what a host tier counts.

Does not cover: sessions and leases (``kvstore.calls.NodeStats``).
"""

from dataclasses import dataclass


@dataclass(slots=True)
class HostStats:
    """Counters since start, and what is held now."""

    capacity_bytes: int = 0
    held_bytes: int = 0
    held_cells: int = 0
    reserved_cells: int = 0
    retired_bytes: int = 0
    stored: int = 0
    evicted: int = 0
    dropped_unspilled: int = 0
    """Of the evicted, those that were to go to the disk and were not there: the node lost them."""
    expired: int = 0
    deleted: int = 0
    aborted: int = 0
    retired: int = 0
    adopted: int = 0
    damaged: int = 0
