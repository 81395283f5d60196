"""The tcp transport on broken wires: what flips, breaks off, stands still or talks nonsense.

A relay stands between the client and a server of this process. Sweeps take a stream and harm it at
one place after the other, so that every part of the protocol is harmed once.
"""

import logging
import socket
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvstore.clock import Deadline, SystemClock
from kvstore.errors import UsageError
from kvstore.leaf_table import Leaves
from kvstore.transport import frame
from kvstore.transport.base import CellRead, ReadOutcome, WriteOutcome
from kvstore.transport.tcp import TcpTransport
from tests.unit.transport_world import World, accepting, into, same, served, soon

FROM_SERVER, FROM_CLIENT = True, False


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World.make(tmp_path / "node")


@dataclass
class Relay:
    """Passes bytes on both ways, but harms the byte number ``at`` that comes from one side."""

    target: str
    from_server: bool = True
    at: int = -1
    cut: bool = False
    total: int = -1
    """Behind so many bytes of that side nothing comes any more: nobody waits for a deadline."""

    def admit(self, client: socket.socket) -> None:
        host, _, port = self.target.rpartition(":")
        server = socket.create_connection((host, int(port)))
        both = threading.Thread(target=self._both, args=(client, server))
        both.start()

    def _both(self, client: socket.socket, server: socket.socket) -> None:
        with client, server:
            back = threading.Thread(target=self._pass, args=(server, client, FROM_SERVER))
            back.start()
            self._pass(client, server, FROM_CLIENT)
            back.join()

    def _pass(self, source: socket.socket, sink: socket.socket, from_server: bool) -> None:
        passed = 0
        with suppress(OSError):
            while piece := bytearray(source.recv(1 << 16)):
                place = self.at - passed
                passed += len(piece)
                if from_server == self.from_server and 0 <= place < len(piece):
                    if self.cut:
                        sink.sendall(piece[:place])
                        break
                    piece[place] ^= 0x04
                sink.sendall(piece)
                if from_server == self.from_server and passed == self.total:
                    sink.shutdown(socket.SHUT_WR)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@contextmanager
def relayed(address: str, relay: Relay) -> Iterator[TcpTransport]:
    relay.target = address
    with accepting(relay.admit) as entrance:
        transport = TcpTransport(entrance, connections=1)
        try:
            yield transport
        finally:
            transport.close()


def fresh(reads: Sequence[CellRead]) -> list[CellRead]:
    return [into(read, *(leaf * 0 for leaf in read.leaves)) for read in reads]


GREETED = frame.GREETING.size + frame.STATUS.size
HEADED = GREETED + 3 * (frame.ANSWER.size + 64 + 8 * 3)
CELL_BYTES = 2 * 16 * 72


@pytest.mark.parametrize("cut", [False, True], ids=["flip", "cut"])
def test_hold_whatever_the_wire_does_to_a_read_no_wrong_byte_is_verified(
    world: World, cut: bool
) -> None:
    content = [world.leaves() for _ in range(3)]
    reads = [world.stored(leaves) for leaves in content]
    total = HEADED + 3 * CELL_BYTES
    # All of the framing, and the payload in wide steps.
    places = [*range(HEADED), *range(HEADED, total, 101)]
    with served(world.folder) as address:
        for at in places:
            mine = fresh(reads)
            with relayed(address, Relay("", FROM_SERVER, at, cut, total)) as transport:
                outcomes = transport.read(mine, soon())
            for outcome, read, leaves in zip(outcomes, mine, content, strict=True):
                assert outcome is not ReadOutcome.VERIFIED or same(read.leaves, leaves), at
            if at >= HEADED:
                harmed = (at - HEADED) // CELL_BYTES
                assert outcomes[:harmed] == [ReadOutcome.VERIFIED] * harmed, at
                assert outcomes[harmed] is not ReadOutcome.VERIFIED, at
            # A greeting's flag for a wanted token and its challenge mean nothing without a token.
            if at >= GREETED or cut:
                assert set(outcomes) != {ReadOutcome.VERIFIED}, at


@pytest.mark.parametrize("cut", [False, True], ids=["flip", "cut"])
def test_hold_whatever_the_wire_does_to_a_write_only_what_is_right_is_filled(
    tmp_path: Path, cut: bool
) -> None:
    shapes = ((2, 16, 4), (2, 16, 2))
    opening = frame.PROOF_BYTES
    total = (
        opening + frame.REQUEST.size + frame.OFFERED.size + 8 + 192 + frame.HEADED.size + 64 + 16
    )
    world = World.make(tmp_path / "node")
    with served(world.folder) as address:
        for at in range(opening, total, 3):
            write = world.reserved(world.leaves(shapes))
            # A flip in a count makes both sides wait for the other.
            short = Deadline.after(SystemClock(), 0.5)
            with relayed(address, Relay("", FROM_CLIENT, at, cut, total)) as transport:
                (written,) = transport.write([write], short)
            if written.outcome is WriteOutcome.FILLED:
                # Harm to what only the client needs, such as the time it has left.
                read = world.committed(write, written.header_digest)
                with relayed(address, Relay("")) as direct:
                    assert direct.read([read], soon()) == [ReadOutcome.VERIFIED], at
                    assert same(read.leaves, write.leaves)
                assert at < opening + frame.REQUEST.size, at


def test_a_write_that_breaks_off_is_uncertain(world: World) -> None:
    writes = [world.reserved(world.leaves()) for _ in range(3)]
    offers = frame.REQUEST.size + 3 * (frame.OFFERED.size + 4 * 3)
    middle_of_first = frame.PROOF_BYTES + offers + 1000
    with (
        served(world.folder) as address,
        relayed(address, Relay("", FROM_CLIENT, middle_of_first, cut=True)) as transport,
    ):
        answers = transport.write(writes, soon())
    outcomes = [answer.outcome for answer in answers]
    assert outcomes[0] is WriteOutcome.UNCERTAIN
    assert WriteOutcome.FILLED not in outcomes


def test_a_server_that_says_nothing_costs_the_deadline_and_no_more() -> None:
    held: list[socket.socket] = []
    with accepting(held.append) as address:
        transport = TcpTransport(address)
        deadline = Deadline.after(SystemClock(), 0.1)
        read = CellRead(bytes(32), 0, 0, Leaves.of(()))
        assert transport.read([read], deadline) == [ReadOutcome.FAILED]
        transport.close()
    for connected in held:
        connected.close()


def test_nobody_there_is_a_failed_read(world: World) -> None:
    with served(world.folder) as address:
        pass
    transport = TcpTransport(address)
    assert transport.read([world.stored(world.leaves())], soon()) == [ReadOutcome.FAILED]
    transport.close()


def test_a_server_that_came_back_is_used_again(world: World) -> None:
    read = world.stored(world.leaves())
    with served(world.folder) as address:
        relay = Relay(address)
        with accepting(relay.admit) as entrance:
            transport = TcpTransport(entrance)
            assert transport.read([read], soon()) == [ReadOutcome.VERIFIED]
            for wire in list(transport._peer._idle):
                wire.shut()  # as a server that ends does
            assert transport.read([read], soon()) == [ReadOutcome.VERIFIED]
            transport.close()


@pytest.mark.parametrize("token", [b"wrong", None])
def test_a_wrong_token_is_refused_and_reported_once(
    world: World, caplog: pytest.LogCaptureFixture, token: bytes | None
) -> None:
    read = world.stored(world.leaves())
    with served(world.folder, token=b"right") as address:
        transport = TcpTransport(address, token)
        with caplog.at_level(logging.WARNING):
            for _ in range(3):
                assert transport.read([read], soon()) == [ReadOutcome.FAILED]
        transport.close()
    assert sum("refused our token" in record.message for record in caplog.records) == 1
    assert sum("refused a client" in record.message for record in caplog.records) == 1


def test_a_token_that_nobody_asked_for_does_no_harm(world: World) -> None:
    read = world.stored(world.leaves())
    with served(world.folder) as address:
        transport = TcpTransport(address, b"spare")
        assert transport.read([read], soon()) == [ReadOutcome.VERIFIED]
        transport.close()


@pytest.mark.parametrize("address", ["", "host", ":1", "host:", "host:port"])
def test_an_address_without_host_and_port_is_refused(address: str) -> None:
    with pytest.raises(UsageError, match="host:port"):
        TcpTransport(address)


HELLO = bytes(frame.PROOF_BYTES)
GOOD_OFFER = frame.OFFERED.pack(bytes(32), 1, 0, 0, 10, 0, 1)


@pytest.mark.parametrize(
    "nonsense",
    [
        pytest.param(frame.REQUEST.pack(3, 1, 1000, 0), id="kind"),
        pytest.param(frame.REQUEST.pack(1, 0, 1000, 0), id="no cells"),
        pytest.param(frame.REQUEST.pack(1, 513, 1000, 0), id="too many cells"),
        pytest.param(
            frame.REQUEST.pack(1, 1, 1000, 0) + frame.ASKED.pack(bytes(32), 1, 64, 1),
            id="cell outside of any grid",
        ),
        pytest.param(
            frame.REQUEST.pack(1, 1, 1000, 0) + frame.ASKED.pack(bytes(32), 2**31, 0, 1),
            id="a cell too large",
        ),
        pytest.param(
            frame.REQUEST.pack(1, 1, 1000, 0) + frame.ASKED.pack(bytes(32), 1, 0, 481),
            id="a read of too many leaves",
        ),
        pytest.param(
            frame.REQUEST.pack(2, 1, 1000, 0) + frame.OFFERED.pack(bytes(32), 1, 0, 0, 10, 0, 0),
            id="no leaves",
        ),
        pytest.param(
            frame.REQUEST.pack(2, 1, 1000, 0) + frame.OFFERED.pack(bytes(32), 1, 0, 0, 10, 0, 481),
            id="too many leaves",
        ),
        pytest.param(
            frame.REQUEST.pack(2, 1, 1000, 0) + GOOD_OFFER + struct.pack("<I", 11),
            id="leaves that do not add up",
        ),
        pytest.param(b"GET / HTTP/1.1\r\nHost: samovar\r\n\r\n", id="http"),
        pytest.param(b"", id="leaves at once"),
        pytest.param(struct.pack("<H", 1), id="leaves in the middle"),
    ],
)
def test_nonsense_ends_its_connection_and_nothing_else(world: World, nonsense: bytes) -> None:
    read = world.stored(world.leaves())
    with served(world.folder) as address:
        host, _, port = address.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=10) as stranger:
            stranger.sendall(HELLO + nonsense)
            with suppress(OSError):  # the server may have hung up already
                stranger.shutdown(socket.SHUT_WR)
            with suppress(ConnectionResetError):
                while stranger.recv(4096):
                    pass
        transport = TcpTransport(address)
        assert transport.read([read], soon()) == [ReadOutcome.VERIFIED]
        transport.close()


def test_a_proof_depends_on_token_and_challenge() -> None:
    proofs = {frame.proof(token, bytes([c]) * 32) for token in (b"a", b"b") for c in range(2)}
    assert len(proofs) == 4
