"""A link between two machines that is cut and mended, with a network namespace for each machine."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

from tests.hold.processes import Client, Tier
from tests.served import eventually

TOKENS = 160
LINK = "wire"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@dataclass(frozen=True)
class Machine:
    """A network namespace with an address on the link."""

    name: str
    address: str

    @property
    def prefix(self) -> tuple[str, ...]:
        return ("ip", "netns", "exec", self.name)

    def turn_link(self, state: str) -> None:
        ip("-n", self.name, "link", "set", LINK, state)


@contextmanager
def two_machines() -> Iterator[tuple[Machine, Machine]]:
    """A veth pair with a namespace at each end; skips where that is not permitted."""
    machines = tuple(Machine(f"samovar-{os.getpid()}-{i}", f"10.199.7.{i + 1}") for i in (0, 1))
    one, two = machines
    try:
        try:
            for machine in machines:
                ip("netns", "add", machine.name)
            peer = ("peer", "name", LINK, "netns", two.name)
            ip("link", "add", LINK, "netns", one.name, "type", "veth", *peer)
        except (FileNotFoundError, subprocess.CalledProcessError) as fault:
            pytest.skip(f"no network namespaces here: {fault}")
        for machine in machines:
            ip("-n", machine.name, "address", "add", f"{machine.address}/24", "dev", LINK)
            ip("-n", machine.name, "link", "set", "lo", "up")
            machine.turn_link("up")
        yield one, two
    finally:
        for machine in machines:
            subprocess.run(
                ["ip", "netns", "delete", machine.name], capture_output=True, check=False
            )


@pytest.fixture
def machines() -> Iterator[tuple[Machine, Machine]]:
    with two_machines() as made:
        yield made


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    file = tmp_path / "token"
    file.write_text("a shared secret\n")
    file.chmod(0o600)
    return file


def test_hold_a_cut_link_shortens_prefixes_until_it_is_mended(
    tier: Tier, machines: tuple[Machine, Machine], token_file: Path
) -> None:
    far, near = (
        tier.node(
            i,
            bind_host="0.0.0.0",
            advertise_host=machine.address,
            token_file=token_file,
            prefix=machine.prefix,
        )
        for i, machine in enumerate(machines)
    )
    writer = tier.client(far, token_file=token_file, prefix=machines[0].prefix)
    reader = tier.client(near, token_file=token_file, prefix=machines[1].prefix)
    for first, second in ((far, near), (near, far)):
        at = writer if first is far else reader
        at.say(do="publish", epoch=1, nodes=[asdict(first.info), asdict(second.info)])
        assert at.hear() == {"epoch": 1}
    writer.stores(1, TOKENS)
    reader.finds(1, TOKENS)
    reader.stores(2, TOKENS)

    reader.order("fetch", 1, TOKENS, pause=("read", 1), deadline_s=2.0)
    reader.paused("read")
    machines[0].turn_link("down")
    cut_off = reader.go_on()
    assert (cut_off["tokens"], cut_off["right"]) == (0, True), cut_off
    assert cut_off["failures"] == {"FAILED": 10}
    for _ in range(3):
        assert reader.fetch(1, TOKENS, deadline_s=2.0)["tokens"] == 0
        assert reader.fetch(2, TOKENS)["tokens"] == TOKENS, "its own node is as near as ever"
        reader.stores(3, TOKENS)
    writer.stores(4, TOKENS)

    machines[0].turn_link("up")
    for prompt in (1, 4):
        reader.finds(prompt, TOKENS)
    writer.finds(3, TOKENS)
    eventually(lambda: settled(writer) and settled(reader))


def settled(client: Client) -> bool:
    client.say(do="stats")
    stats = client.hear()
    return bool(stats["leases"] == stats["reserved_cells"] == stats["retired"] == 0)
