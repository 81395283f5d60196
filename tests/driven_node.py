"""A node that is driven as its services, its clients and its loops drive it, on a clock of its own.

For worlds that have one in this process. What is found is read, and must be right. Cells are those
of `tests.worlds`. Does not cover: what the node is made of, and what becomes of it (the worlds).
"""

from collections.abc import Sequence

import numpy as np

from kvstore.calls import AcquireReply, CellOutcome, ReserveReply
from kvstore.clock import ManualClock
from kvstore.key import Keys
from kvstore.node import Node
from kvstore.table import Cells
from kvstore.tiers.host import HostTier
from kvstore.tiers.nvme.tier import NvmeTier
from kvstore.tiers.tier import NewCell
from tests.worlds import (
    cells_of,
    holds,
    key_number,
    new_cell,
    packed,
    read_verified,
    request_for,
    write_cell,
)

LEASE_MS = 10_000


class DrivenNode:
    """What a world has that drives its node."""

    clock: ManualClock
    host: HostTier
    nvme: NvmeTier
    node: Node
    session: int
    operation: int = 0

    def reserve(self, *cells: NewCell) -> ReserveReply:
        self.operation += 1
        return self.node.reserve(request_for(self.session, self.operation, cells))

    def commit(self, reply: ReserveReply, row: int, new: NewCell) -> int:
        digest = write_cell(self.host.arena, int(reply.offsets[row]), new)
        slots, generations = reply.slots[[row]], reply.generations[[row]]
        digests = np.array([digest], np.uint64)
        return int(self.node.commit(self.session, slots, generations, digests)[0])

    def put_cells(self, cells: Sequence[NewCell]) -> list[int]:
        """As a client does; the outcomes of reserving or else committing."""
        reply = self.reserve(*cells)
        outcomes: list[int] = reply.outcomes.tolist()
        for row, new in enumerate(cells):
            if outcomes[row] == CellOutcome.RESERVED:
                outcomes[row] = self.commit(reply, row, new)
        return outcomes

    def pass_time(self, seconds: float = 0.3) -> None:
        for _ in range(max(1, round(seconds * 10))):
            self.clock.advance(0.1)
            self.node.beat(self.session)
            self.node.tick()

    def lease(self, session: int, keys: Keys, cells: Cells, lease_ms: int) -> AcquireReply:
        """As the service does, with all the time that the disk wants."""
        promotion = self.node.begin_acquire(keys, cells)
        while not promotion.is_done:
            self.node.behind.poll()
        reply = self.node.acquire(session, keys, cells, lease_ms, promotion)
        self.node.end_acquire(promotion)
        return reply

    def acquire(self, *numbers: int) -> AcquireReply:
        """Lease blocks of one cell, and read what is found."""
        keys, cells = packed([key_number(n) for n in numbers]), cells_of(*[0] * len(numbers))
        reply = self.lease(self.session, keys, cells, LEASE_MS)
        for row in np.flatnonzero(reply.outcomes == CellOutcome.FOUND).tolist():
            header = read_verified(
                self.host.arena, int(reply.offsets[row]), int(reply.lengths[row]),
                int(reply.header_digests[row]),
            )  # fmt: skip
            assert header is not None, "an acquired cell does not verify"
            assert header.key == key_number(numbers[row])
        return reply

    def above(self, number: int) -> bool:
        return holds(self.host, new_cell(number))

    def below(self, number: int) -> bool:
        return bool(self.nvme.find(packed([key_number(number)]), cells_of(0)).held[0])
