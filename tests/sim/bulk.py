"""Payload between machines: the bulk port, with its bytes arriving leaf by leaf.

Does what ``kvstore.transport.tcp`` and ``bulk_server`` do, on simulated time: the server sends from
the arena without looking at the slot again, so that a slot which is reused meanwhile arrives torn;
a writer's leaves arrive in a slot one after the other, also when nobody wants them any more. What
is verified, and how, is the real code.
"""

import asyncio
from collections.abc import Sequence

import numpy as np

from kvstore.block import HEADER_BYTES, FormatFault, Header, header_digest, leaf_digests
from kvstore.clock import Deadline
from kvstore.table import SlotState
from kvstore.transport.base import (
    CellRead,
    CellWrite,
    ReadOutcome,
    WriteOutcome,
    Written,
    names_of,
)
from kvstore.transport.mapped import write_header
from kvstore.transport.verify import header_of
from tests.sim.edges import WatchedNode
from tests.sim.network import Endpoint, Network, Refused
from tests.sim.scheduler import Process, current

Sent = tuple[int, bytes, list[bytes]] | None
"""Header digest, header page and leaves of a cell, or nothing for one that is not there."""


class SimBulk:
    """A ``Transport`` to one node's bulk port."""

    def __init__(self, network: Network, process: Process, address: str) -> None:
        self._network = network
        self._process = process
        self._address = address

    def read(self, cells: Sequence[CellRead], deadline: Deadline) -> list[ReadOutcome]:
        outcomes = [ReadOutcome.FAILED] * len(cells)
        numbers: list[int] = []
        for index, cell in enumerate(cells):
            remaining_s = deadline.remaining_s()
            if not remaining_s:
                break

            async def send(endpoint: Endpoint, cell: CellRead = cell) -> Sent:
                return await _send_cell(self._network, endpoint, cell, numbers)

            answer = self._network.call(self._process, self._address, send)
            if not current(self._network.scheduler).wait(answer, remaining_s):
                break
            try:
                sent: Sent = answer.result()
            except Refused:
                break
            outcomes[index] = self._deliver(cell, sent)
        return outcomes

    def write(self, cells: Sequence[CellWrite], deadline: Deadline) -> list[Written]:
        answers = [Written(WriteOutcome.UNSENT)] * len(cells)
        for index, cell in enumerate(cells):
            remaining_s = deadline.remaining_s()
            if not remaining_s:
                break
            leaves = [leaf.tobytes() for leaf in cell.leaves]
            digests = tuple(leaf_digests(cell.key, cell.cell, list(cell.leaves)))
            header = Header(
                cell.key, cell.cell, cell.tokens, cell.length, cell.depth, cell.span, digests
            ).pack()

            async def receive(
                endpoint: Endpoint,
                cell: CellWrite = cell,
                header: bytes = header,
                leaves: list[bytes] = leaves,
            ) -> bool:
                return await _receive_cell(self._network, endpoint, cell, header, leaves)

            answer = self._network.call(self._process, self._address, receive)
            if not current(self._network.scheduler).wait(answer, remaining_s):
                answers[index] = Written(WriteOutcome.UNCERTAIN)
                break
            try:
                good = bool(answer.result())
            except Refused:
                break
            answers[index] = (
                Written(WriteOutcome.FILLED, header_digest(header))
                if good
                else Written(WriteOutcome.GONE)
            )
        return answers

    def close(self) -> None:
        return

    def _deliver(self, cell: CellRead, sent: Sent) -> ReadOutcome:
        if sent is None:
            return ReadOutcome.GONE
        digest, page, leaves = sent
        header = header_of(cell, page, digest)
        if isinstance(header, FormatFault):
            return ReadOutcome.CORRUPT
        random = self._network.scheduler.random
        for target, data in zip(cell.leaves, leaves, strict=True):
            arrived = np.frombuffer(data, np.uint8).copy()
            if random.random() < self._network.weather.flips:
                arrived[random.randrange(len(arrived))] ^= 1 << random.randrange(8)
            np.copyto(target, arrived.reshape(target.shape))
        seen = tuple(leaf_digests(cell.key, cell.cell, list(cell.leaves)))
        return ReadOutcome.VERIFIED if seen == header.leaf_digests else ReadOutcome.CORRUPT


async def _send_cell(
    network: Network, endpoint: Endpoint, cell: CellRead, numbers: list[int]
) -> Sent:
    """``numbers`` has the read's, once a cell of it was asked for."""
    node: WatchedNode = endpoint.services["bulk"]
    numbers += [] if numbers else [node.begin_read()]
    keys, cells = names_of([cell])
    found = node.find(keys, cells, endpoint.services["clock"].wall_ms())
    node.note_uses(found, found.held, numbers[0])
    slot = node.found_bytes(found, 0, cell.length)
    if slot is None:
        return None
    page, leaves, start = slot[:HEADER_BYTES].tobytes(), [], HEADER_BYTES
    for leaf in cell.leaves:
        await _some_time(network)
        leaves.append(slot[start : start + leaf.nbytes].tobytes())
        start += leaf.nbytes
    return int(found.header_digests[0]), page, leaves


async def _receive_cell(
    network: Network, endpoint: Endpoint, cell: CellWrite, header: bytes, leaves: list[bytes]
) -> bool:
    node: WatchedNode = endpoint.services["bulk"]
    slot = node.slot_bytes(
        SlotState.RESERVED, cell.slot, cell.generation, cell.cell, cell.offset, cell.length
    )
    if slot is None:
        return False
    start = HEADER_BYTES
    for leaf in leaves:
        await _some_time(network)
        node.writing(cell.generation, cell.offset, len(slot))
        slot[start : start + len(leaf)] = np.frombuffer(leaf, np.uint8)
        start += len(leaf)
    node.writing(cell.generation, cell.offset, len(slot))
    write_header(slot, header)
    return True


async def _some_time(network: Network) -> None:
    """Between two leaves; now and then long enough for much to happen."""
    random = network.scheduler.random
    long = random.random() < network.weather.late
    await asyncio.sleep(random.uniform(0, 4.0) if long else random.uniform(0, 0.002))
