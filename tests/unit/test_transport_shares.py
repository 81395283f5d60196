"""How many threads a transfer gets, and that cells are the same however many there are."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore.fs import LinuxFileSystem
from kvstore.transport import local, shares, tcp
from kvstore.transport.base import ReadOutcome, Transport, WriteOutcome
from kvstore.transport.local import LocalTransport
from kvstore.transport.shares import hands, run_shares
from kvstore.transport.tcp import TcpTransport
from tests.unit.transport_world import World, into, same, served, soon

CELLS = 60


@pytest.mark.parametrize(
    ("processors", "most", "expected"),
    [(1, 8, 2), (2, 8, 2), (4, 8, 2), (8, 8, 4), (16, 8, 8), (64, 8, 8), (64, 4, 4)],
)
def test_half_the_processors_two_at_least_and_no_more_than_pay(
    monkeypatch: pytest.MonkeyPatch, processors: int, most: int, expected: int
) -> None:
    monkeypatch.setattr(shares, "_processors", lambda: processors)
    assert hands(most) == expected


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many parts each transfer had, on a machine of 64 processors; every cell pays."""
    monkeypatch.setattr(shares, "_processors", lambda: 64)
    monkeypatch.setattr(local, "STEP_BYTES", 1)
    monkeypatch.setattr(local, "PARALLEL_BYTES", 1)
    monkeypatch.setattr(tcp, "PARALLEL_BYTES", 1)
    counts: list[int] = []

    def run(shares: int, *rest: object) -> None:
        counts.append(shares)
        run_shares(shares, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(local, "run_shares", run)
    monkeypatch.setattr(tcp, "run_shares", run)
    return counts


@pytest.fixture(params=["local", "tcp"])
def transport(
    request: pytest.FixtureRequest, world: World, counted: list[int]
) -> Iterator[Transport]:
    if request.param == "local":
        way: Transport = LocalTransport.open(LinuxFileSystem(), world.folder)
        yield way
        way.close()
    else:
        with served(world.folder) as address:
            way = TcpTransport(address)
            yield way
            way.close()


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World.make(tmp_path / "node")


def test_many_hands_bring_the_same_cells(
    world: World, transport: Transport, counted: list[int]
) -> None:
    content = [world.leaves() for _ in range(CELLS)]
    writes = [world.reserved(leaves) for leaves in content]
    written = transport.write(writes, soon())
    assert {one.outcome for one in written} == {WriteOutcome.FILLED}
    stored = zip(writes, written, strict=True)
    reads = [world.committed(write, one.header_digest) for write, one in stored]
    reads = [into(read, *(leaf * 0 for leaf in read.leaves)) for read in reads]
    world.tier.evict(reads[7].slot)
    outcomes = transport.read(reads, soon())
    gone = [ReadOutcome.GONE if index == 7 else ReadOutcome.VERIFIED for index in range(CELLS)]
    assert outcomes == gone
    assert all(
        same(read.leaves, leaves)
        for index, (read, leaves) in enumerate(zip(reads, content, strict=True))
        if index != 7
    )
    most = local.THREADS_MAX if isinstance(transport, LocalTransport) else tcp.CONNECTIONS_MAX
    assert counted == [most, most]
