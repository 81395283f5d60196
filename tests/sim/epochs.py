"""Epochs: which tenants were erased, as clients were told, and what nobody may find or store since.

answered by all nodes, and their clients    known: what begins later with an older one is void
answered, some are pending                  known to some
not answered                                nobody knows
"""

from collections import Counter


class Epochs:
    """All erasures of a world, as its clients see them."""

    def __init__(self) -> None:
        self.begun: Counter[str] = Counter()
        """How often each tenant's erasure was asked for: no epoch is above that."""
        self._known: dict[str, int] = {}

    def erase_begins(self, tenant: str) -> None:
        """Somebody asks for it."""
        self.begun[tenant] += 1

    def erase_ends(self, tenant: str, epoch: int) -> None:
        """It was answered by everybody."""
        self._known[tenant] = max(self._known.get(tenant, 0), epoch)

    def known(self, tenant: str) -> int:
        """The epoch by which everybody goes, at least."""
        return self._known.get(tenant, 0)

    def disk_lost(self) -> None:
        """A node begins anew, and knows of nothing until others have told it."""
        self._known.clear()
