"""Clients of a tiny tier, cut off, raced, starved and lied to by memory, against the right bytes.

Whatever happens: the bytes that a client is given are those of exactly its tokens in its namespace;
every page of the arena is held, reserved, resting, free or retired, and only one of these; what was
stored a moment ago is found; and in the end all memory that was not retired can be filled again.
"""

from contextlib import suppress
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvstore.arena import Arena
from kvstore.config import ClientConfig
from kvstore.namespace import Namespace
from kvstore.plan import Plan, Stored
from kvstore.sessions import SESSION_DEAD_S
from kvstore.table import SlotState
from kvstore.tiers.space import SWEEP_S
from tests.property.client_world import (
    BLOCK,
    CELL_BYTES,
    CELLS,
    NAMESPACES,
    REAL,
    TICK_S,
    Client,
    Rows,
    World,
    WriterGoneError,
    nothing,
)

SPACES = st.sampled_from([NAMESPACES[0], *NAMESPACES])
CLIENTS = st.integers(0, 1)
BOUNDARIES = st.sampled_from([(), (5,), (BLOCK, 2 * BLOCK + 9), (3, 20)])
TTLS = st.sampled_from([0, 0, 2, 30])
LATE = 0xAA


@st.composite
def prompts(draw: st.DrawFn) -> list[int]:
    """Up to four blocks of two kinds, and perhaps the beginning of one more."""
    blocks = draw(st.lists(st.sampled_from([1, 2]), max_size=4))
    tokens = [kind for kind in blocks for _ in range(BLOCK)]
    return tokens + [3] * draw(st.sampled_from([1, 5, 9]))


class ClientMachine(RuleBasedStateMachine):
    """Two clients, one node. Rules are named after what happens to them."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.memory = Arena.map(REAL, self.world.folder)
        self.faults = False
        self.known: list[tuple[Namespace, list[int]]] = []
        self.plans: list[tuple[Namespace, list[int], Plan]] = []
        self.unfinished: list[tuple[int, int]] = []

    def teardown(self) -> None:
        try:
            self.nothing_is_stuck()
        finally:
            self.world.close()

    def client(self, number: int) -> Client:
        return self.world.clients[number]

    @rule(number=CLIENTS, space=SPACES, tokens=prompts(), named=BOUNDARIES, ttl_s=TTLS,
          known=st.integers(0, 80))  # fmt: skip
    def put(
        self, number: int, space: Namespace, tokens: list[int], named: tuple[int, ...], ttl_s: int,
        known: int,
    ) -> None:  # fmt: skip
        samovar = self.client(number).samovar
        self.known = [*self.known[-5:], (space, tokens)]
        boundaries = [boundary for boundary in named if boundary <= len(tokens)]
        start = min(known, samovar.longest_prefix(space, tokens, boundaries).tokens)
        rows = Rows.right(space, tokens)
        rows.kv[:, :, : start // BLOCK * BLOCK] = 0  # an engine need not have what is there
        if boundaries and start:
            rows = Rows.right(space, tokens)  # but a tail is written whole
        stored = samovar.put(space, tokens, rows, start, boundaries, ttl_s=ttl_s)
        assert stored.failed == 0, dict(stored.reasons)
        if stored.complete:
            again = samovar.longest_prefix(space, tokens, boundaries)
            assert again.tokens >= min(len(tokens) // BLOCK * BLOCK, len(tokens) - 1)

    @rule(number=CLIENTS, space=SPACES, tokens=prompts(), named=BOUNDARIES)
    def get(self, number: int, space: Namespace, tokens: list[int], named: tuple[int, ...]) -> None:
        boundaries = [boundary for boundary in named if boundary <= len(tokens)]
        self.get_all(number, space, tokens, boundaries)

    @precondition(lambda self: self.known)
    @rule(data=st.data(), number=CLIENTS)
    def get_again(self, data: st.DataObject, number: int) -> None:
        """What somebody put, by itself or as the beginning of more."""
        space, tokens = data.draw(st.sampled_from(self.known))
        self.get_all(number, space, [*tokens, 7], [len(tokens)])

    def get_all(
        self, number: int, space: Namespace, tokens: list[int], boundaries: list[int]
    ) -> None:
        plan = self.client(number).samovar.longest_prefix(space, tokens, boundaries)
        assert plan.tokens < len(tokens)
        before = self.world.tier.stats.damaged
        got = self.deliver(number, space, tokens, plan)
        damaged = self.world.tier.stats.damaged - before
        assert got == plan.tokens or damaged, "a block was lost between a look-up and a read"
        self.plans = [*self.plans[-3:], (space, tokens, plan)]

    @precondition(lambda self: self.plans)
    @rule(data=st.data(), number=CLIENTS)
    def get_late(self, data: st.DataObject, number: int) -> None:
        """What was planned long ago, whatever its slots hold now."""
        self.deliver(number, *data.draw(st.sampled_from(self.plans)))

    @precondition(lambda self: self.plans)
    @rule(data=st.data(), number=CLIENTS)
    def touch(self, data: st.DataObject, number: int) -> None:
        self.client(number).samovar.touch(data.draw(st.sampled_from(self.plans))[2])

    def deliver(self, number: int, space: Namespace, tokens: list[int], plan: Plan) -> int:
        rows = Rows(len(tokens))
        got = self.client(number).samovar.get_into(plan, rows).tokens
        right = Rows.right(space, tokens)
        assert np.array_equal(rows.kv[:, :, :got], right.kv[:, :, :got]), "wrong bytes"
        return got

    @rule(number=CLIENTS, space=SPACES, tokens=prompts(), early=st.booleans(),
          what=st.sampled_from(["race", "restart", "starve", "dawdle"]))  # fmt: skip
    def put_disturbed(
        self, number: int, space: Namespace, tokens: list[int], early: bool, what: str
    ) -> None:
        """Between Reserve and Commit: another writer, another node, a lost session, no time."""

        def race() -> None:
            other = self.client(1 - number).samovar
            stored = other.put(space, tokens, Rows.right(space, tokens))
            assert stored.stored == 0, "somebody else is writing these"

        def starve() -> None:
            session = self.client(number).access.known_session
            self.client(number).access.known_session = 0
            self.world.pass_time(round(SESSION_DEAD_S / TICK_S))
            self.client(number).access.known_session = session

        def dawdle() -> None:
            self.world.pass_time(round(ClientConfig().put_deadline_s / TICK_S) + 1)

        happens = {
            "race": race, "restart": self.world.restart, "starve": starve, "dawdle": dawdle,
        }[what]  # fmt: skip
        transport = self.client(number).transport
        transport.wrote = []
        transport.before_write = happens if early else nothing
        transport.after_write = nothing if early else happens
        stored = self.client(number).samovar.put(space, tokens, Rows.right(space, tokens))
        transport.before_write = transport.after_write = nothing
        if transport.wrote:
            gone = what in ("restart", "starve") or (what == "dawdle" and early)
            assert bool(stored.failed) == gone
        if what in ("restart", "starve"):
            self.world.late += [(write.offset, CELL_BYTES) for write in transport.wrote]

    @rule(number=CLIENTS, space=SPACES, tokens=prompts())
    def put_lost(self, number: int, space: Namespace, tokens: list[int]) -> None:
        """Nobody knows whether more bytes arrive: more do, whenever they like."""
        transport = self.client(number).transport
        transport.lost, transport.wrote = True, []
        self.client(number).samovar.put(space, tokens, Rows.right(space, tokens))
        transport.lost = False
        self.world.late += [(write.offset, CELL_BYTES) for write in transport.wrote]

    @rule(number=CLIENTS, space=SPACES, tokens=prompts(), early=st.booleans())
    def put_unfinished(self, number: int, space: Namespace, tokens: list[int], early: bool) -> None:
        """The writer dies; its successor has a session of its own."""
        client = self.client(number)
        client.transport.wrote = []

        def die() -> None:
            client.access.cut_off = True
            raise WriterGoneError

        client.transport.before_write = die if early else nothing
        client.transport.after_write = nothing if early else die
        with suppress(WriterGoneError):
            client.samovar.put(space, tokens, Rows.right(space, tokens))
        if client.access.cut_off:
            client.access.cut_off, client.access.known_session = False, 0
        client.transport.before_write = client.transport.after_write = nothing
        self.unfinished += [(write.offset, CELL_BYTES) for write in client.transport.wrote]

    @rule(ticks=st.sampled_from([1, 1, 4, 12, 40]))
    def pass_time(self, ticks: int) -> None:
        self.world.pass_time(ticks)

    @rule(data=st.data(), at=st.one_of(st.integers(0, 79), st.integers(4096, 4096 + 255)))
    def flip(self, data: st.DataObject, at: int) -> None:
        """A byte of a cell that is held changes in memory."""
        held = self.world.tier.held_slots().tolist()
        if held:
            offset = self.world.tier.table.slots["offset"][data.draw(st.sampled_from(held))]
            self.memory.view(int(offset) + at, 1)[0] ^= 0x10

    @rule(at=st.integers(0, 3))
    def write_late(self, at: int) -> None:
        """Writers that were given up go on."""
        for start, length in self.world.late[at::4]:
            self.memory.view(start, length)[:] = LATE

    @rule(fail_at=st.sampled_from([0, 0, 1, 2, 3, 4, 5, 6, 7, 8]))
    def restart(self, fail_at: int) -> None:
        self.faults = self.faults or fail_at > 0
        self.world.restart(fail_at)

    @rule(operation=st.integers(1, 3))
    def fail(self, operation: int) -> None:
        """One of the next operations of the file system fails."""
        self.faults = True
        self.world.fs.fail_at = self.world.fs.operations + operation

    @invariant()
    def all_memory_is_accounted_for(self) -> None:
        tier = self.world.tier
        records, stats = tier.table.slots, tier.stats
        states = records["state"]
        sizes = {state: int(records["size_bytes"][states == state].sum()) for state in SlotState}
        assert int((states == SlotState.RESERVED).sum()) == stats.reserved_cells
        assert int((states == SlotState.COMMITTED).sum()) == stats.held_cells
        assert sizes[SlotState.COMMITTED] == stats.held_bytes
        retired = tier.table.retired_ranges()
        assert sum(stop - start for start, stop in retired) == stats.retired_bytes
        used = records[states != SlotState.UNUSED]
        slots = zip(used["offset"].tolist(), used["size_bytes"].tolist(), strict=True)
        ranges = sorted([*retired, *((start, start + size) for start, size in slots)])
        assert all(stop <= start for (_, stop), (start, _) in pairwise(ranges)), "memory shared"
        frontier = int(tier.table.header["frontier"])
        taken = sum(stop - start for start, stop in ranges)
        assert taken + tier._space.free_bytes == frontier, "memory lost"
        backed = frontier - stats.retired_bytes
        assert backed <= stats.capacity_bytes
        assert backed == stats.capacity_bytes or self.faults
        for start, length in self.world.late:
            assert any(a <= start and start + length <= b for a, b in retired), "not retired"

    def nothing_is_stuck(self) -> None:
        """Without faults, and when all who were lost are known to be: the whole tier can be put."""
        self.world.fs.fail_at = 0
        self.world.pass_time(round(SESSION_DEAD_S / TICK_S) + 1)
        self.world.clock.advance(SWEEP_S)
        self.world.pass_time(1)
        stats = self.world.node.stats()
        assert stats.host.reserved_cells == stats.leases == 0
        self.world.late += self.unfinished
        self.faults = False
        self.all_memory_is_accounted_for()
        tokens = [9] * (CELLS // 2 * BLOCK)
        client = self.client(0).samovar
        stored = client.put(NAMESPACES[0], tokens, Rows.right(NAMESPACES[0], tokens))
        assert (stored.stored, stored.complete) == (CELLS // 2, True), dict(stored.reasons)
        plan = client.longest_prefix(NAMESPACES[0], [*tokens, 9])
        assert self.deliver(1, NAMESPACES[0], [*tokens, 9], plan) == len(tokens)


def test_a_put_does_not_evict_its_own_beginning() -> None:
    """What is known to be in the tier is the oldest there: it must not make way for the rest."""
    world = World()
    try:
        client, (space, other) = world.clients[0].samovar, NAMESPACES
        prompt = [1] * (4 * BLOCK)
        client.put(space, prompt[: 2 * BLOCK], Rows.right(space, prompt[: 2 * BLOCK]))
        rest = [2] * ((CELLS // 2 - 2) * BLOCK)
        assert client.put(other, rest, Rows.right(other, rest)).complete
        assert client.put(space, prompt, Rows.right(space, prompt), start=2 * BLOCK).complete
        assert client.longest_prefix(space, [*prompt, 1]).tokens == len(prompt)
    finally:
        world.close()


@pytest.mark.parametrize("writing", range(1, CELLS // 2))
def test_a_put_keeps_its_own_beginning_when_nothing_else_may_leave(writing: int) -> None:
    """Somebody else is writing so many of the twelve blocks that there is room for."""
    world = World()
    try:
        client, (space, other) = world.clients[0].samovar, NAMESPACES
        prompt, rest = [1] * (4 * BLOCK), [2] * (writing * BLOCK)
        client.put(space, prompt[:BLOCK], Rows.right(space, prompt[:BLOCK]))
        stored: list[Stored] = []

        def meanwhile() -> None:
            rows = Rows.right(space, prompt)
            stored.append(client.put(space, prompt, rows, start=BLOCK, boundaries=(3, BLOCK + 4)))

        world.clients[1].transport.before_write = meanwhile
        assert world.clients[1].samovar.put(other, rest, Rows.right(other, rest)).complete
        assert [one.stored for one in stored] == [min(5, CELLS // 2 - writing - 1)]
        found = client.longest_prefix(space, [*prompt, 1])
        assert found.tokens == BLOCK * min(4, CELLS // 2 - writing)
    finally:
        world.close()


TestClient = ClientMachine.TestCase
TestClient.settings = settings(
    max_examples=50, stateful_step_count=40, deadline=None, derandomize=True
)


class ClientMachineAtLength(ClientMachine):
    """The same, other cases every time."""


TestClientAtLength = pytest.mark.slow(ClientMachineAtLength.TestCase)
TestClientAtLength.settings = settings(max_examples=400, stateful_step_count=50, deadline=None)
