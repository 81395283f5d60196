"""A storage node in a tiny world, against an oracle that shares nothing with it.

Four blocks, an arena of seven pages, clients that die, hang and come back late, a node that is
killed and re-adopts its arena. After every step: what the oracle holds is found and its bytes
verify, what it does not hold is a miss, and all memory is accounted for.
"""

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvstore.arena import Arena
from kvstore.burials import BurialPage
from kvstore.calls import CellOutcome, HoldOutcome, HoldRequest, NodeIdentity, ReserveReply
from kvstore.clock import ManualClock
from kvstore.fs import LinuxFileSystem, MemoryFiles
from kvstore.lasting import Lasting
from kvstore.node import Node
from kvstore.sessions import SESSION_DEAD_S, STALL_S
from kvstore.tenants import tenant_digest
from kvstore.tiers.host import HostTier
from kvstore.tiers.tier import NewCell, Refusal
from tests.property.node_oracle import Held, Name, NodeOracle, Page, Session
from tests.worlds import (
    PAGE,
    cells_of,
    holds,
    new_cell,
    packed,
    request_for,
    shared_folder,
    write_cell,
)

FS = LinuxFileSystem()
CAPACITY_PAGES = 7
SLOTS = 8
HOLD_PAGES = 3
TENANT = tenant_digest("acme")
NUMBERS = st.integers(0, 3)
PAGES = st.sampled_from([1, 2, 3, 1, CAPACITY_PAGES])
TTLS = st.sampled_from([0, 1, 3])
EARLIER = st.sampled_from([0, 0, 1, 2])
"""Which operation a call is part of: a new one, or one of the last."""
THEN = st.sampled_from([(), (), ("read",), ("hold",), ("read", "hold"), ("read", "delete")])
SEVERAL = st.lists(NUMBERS, min_size=1, max_size=3)
TICK_S = 0.125


@dataclass(frozen=True)
class Ticket:
    """What a client remembers of a reservation, however long ago."""

    session: int
    slot: int
    generation: int
    offset: int
    new: NewCell

    @property
    def name(self) -> Name:
        return self.new.key, self.new.cell


def cell(number: int, pages: int = 1, ttl_s: int = 0) -> NewCell:
    """Blocks 0, 1, 2 are a chain; block 3 is another prompt's first one, in another cell."""
    return new_cell(number, cell=number // 3, pages=pages, depth=number % 3, ttl_s=ttl_s)


def name_of(number: int) -> Name:
    return cell(number).key, cell(number).cell


NAMES = [name_of(number) for number in range(4)]


class NodeMachine(RuleBasedStateMachine):
    """Every rule does one thing to the node and the same to the oracle."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = ManualClock()
        self.world = shared_folder()
        self.folder = self.world.__enter__()
        self.incarnation = 1
        tier = HostTier.create(FS, self.clock, self.folder, CAPACITY_PAGES * PAGE, SLOTS, 1)
        self.lasting = Lasting(MemoryFiles(), Path("/node"))
        self.node = self.new_node(tier)
        self.oracle = NodeOracle(CAPACITY_PAGES, SLOTS, self.clock.now_s)
        self.writers_view = Arena.map(FS, self.folder)
        self.tickets: list[Ticket] = []
        self.operation = 0
        self.deletes = 0
        self.generations: set[int] = set()

    def new_node(self, tier: HostTier) -> Node:
        identity = NodeIdentity("n", self.incarnation, "h", str(self.folder))
        return Node(identity, tier, self.clock, lasting=self.lasting, hold_bytes=HOLD_PAGES * PAGE)

    def teardown(self) -> None:
        self.world.__exit__(None, None, None)

    @initialize(count=st.integers(2, 3))
    def some_sessions(self, count: int) -> None:
        for _ in range(count):
            self.open_session()

    @precondition(lambda self: len(self.oracle.sessions) < 3)
    @rule()
    def open_session(self) -> None:
        session = self.node.open_session()
        assert session not in self.oracle.sessions
        self.oracle.sessions[session] = Session(self.clock.now_s)

    @rule(data=st.data())
    def close_session(self, data: st.DataObject) -> None:
        session = self.any_session(data)
        self.node.close_session(session)
        if session in self.oracle.sessions:
            self.oracle.close_session(session)

    @rule(data=st.data())
    def beat(self, data: st.DataObject) -> None:
        session = self.any_session(data)
        assert self.node.beat(session) == (session in self.oracle.sessions)
        if session in self.oracle.sessions:
            self.oracle.sessions[session].beat_s = self.clock.now_s

    @rule(known=st.just([]) | SEVERAL, numbers=SEVERAL, pages=PAGES, ttl_s=TTLS, then=THEN)
    def put(
        self, known: list[int], numbers: list[int], pages: int, ttl_s: int, then: tuple[str, ...]
    ) -> None:
        """What most clients do: reserve, write and commit, and soon use what they have put."""
        before, session = len(self.tickets), self.living_session()
        if known:
            self.touch_some(known, session, self.any_operation(0))
        self.reserve_some(session, numbers, pages, ttl_s, earlier=bool(known))
        for ticket in self.tickets[before:]:
            self.commit_ticket(ticket, True, 1)
        for use in then:
            if use == "read":
                self.acquire_some(self.living_session(), numbers, 1500)
            elif use == "hold":
                self.hold_some(numbers, "a", 2)
            else:
                self.delete_some(numbers, by_gossip=False)

    @rule(data=st.data(), numbers=SEVERAL, pages=PAGES, ttl_s=TTLS, earlier=EARLIER)
    def reserve(
        self, data: st.DataObject, numbers: list[int], pages: int, ttl_s: int, earlier: int
    ) -> None:
        self.reserve_some(self.any_session(data), numbers, pages, ttl_s, earlier)

    def any_operation(self, earlier: int) -> int:
        """The number of a new one, or of one of the last."""
        self.operation += not earlier
        return self.operation - max(0, earlier - 1)

    def reserve_some(
        self, session: int, numbers: list[int], pages: int, ttl_s: int, earlier: int = 0
    ) -> None:
        operation = self.any_operation(earlier)
        cells = [cell(number, pages, ttl_s) for number in numbers]
        reply = self.node.reserve(request_for(session, operation, cells))
        if session not in self.oracle.sessions:
            assert set(reply.outcomes.tolist()) == {CellOutcome.REFUSED}
            assert set(reply.refusals.tolist()) == {Refusal.SESSION}
            return
        removed = [change for change in self.changes() if not change[1]]
        stamp = self.oracle.stamp_of(session, operation)
        self.foresee_reserve(session, cells, stamp, reply, [name for name, _ in removed])

    def foresee_reserve(
        self,
        session: int,
        cells: list[NewCell],
        stamp: int,
        reply: ReserveReply,
        removed: list[Name],
    ) -> None:
        """Go through a reserve call row by row; the node must have evicted exactly ``removed``."""
        oracle, wall_ms = self.oracle, self.clock.wall_ms()
        names = [(new.key, new.cell) for new in cells]
        for name in dict.fromkeys(names):
            here = name in oracle.held and not oracle.pinned(name)
            if here and oracle.held[name].expired(wall_ms):
                assert removed.pop(0) == name, "expired cells make way first"
                oracle.drop(name)
        present = [name in oracle.held for name in names]
        for name in {name for name, here in zip(names, present, strict=True) if here}:
            oracle.held[name].stamp = max(oracle.held[name].stamp, stamp)
            oracle.held[name].slide(wall_ms, cells[0].ttl_s)
        for row, new in enumerate(cells):
            outcome, refusal = int(reply.outcomes[row]), int(reply.refusals[row])
            pages = new.length // PAGE + 1
            if present[row]:
                assert outcome == CellOutcome.PRESENT
            elif names[row] in oracle.writing:
                assert outcome == CellOutcome.BUSY
            elif pages > CAPACITY_PAGES:
                assert (outcome, refusal) == (CellOutcome.REFUSED, Refusal.TOO_LARGE)
            elif self.makes_room(pages, stamp, removed):
                assert outcome == CellOutcome.RESERVED, "nothing is refused while there is room"
                self.reserved(session, new, reply, row, stamp)
            else:
                why = Refusal.SHRUNK if oracle.shrunk_below(pages) else Refusal.NO_ROOM
                assert (outcome, refusal) == (CellOutcome.REFUSED, why)
        assert removed == [], "evicted without need"

    def makes_room(self, pages: int, stamp: int, removed: list[Name]) -> bool:
        if not self.oracle.has_room(pages) and not self.oracle.could_have_room(pages, stamp):
            return False
        while not self.oracle.has_room(pages):
            victims = self.oracle.victims(stamp)
            assert removed, "should have evicted somebody"
            victim = removed.pop(0)
            assert victim in victims, "evicted out of order, or while leased"
            self.oracle.drop(victim)
        return True

    def reserved(
        self, session: int, new: NewCell, reply: ReserveReply, row: int, stamp: int
    ) -> None:
        slot, generation = int(reply.slots[row]), int(reply.generations[row])
        offset = int(reply.offsets[row])
        assert offset % PAGE == 0
        assert generation not in self.generations, "a generation was used twice"
        self.generations.add(generation)
        expires_ms = self.clock.wall_ms() + 1000 * new.ttl_s if new.ttl_s else 0
        held = Held(
            slot, generation, offset // PAGE, new.length // PAGE + 1, new.depth, stamp, new.ttl_s,
            expires_ms,
        )  # fmt: skip
        self.oracle.take(held)
        self.oracle.writing[new.key, new.cell] = session, held
        self.tickets.append(Ticket(session, slot, generation, offset, new))

    @precondition(lambda self: self.tickets)
    @rule(data=st.data(), good=st.sampled_from([True, True, True, False]), twice=st.booleans())
    def commit(self, data: st.DataObject, good: bool, twice: bool) -> None:
        self.commit_ticket(data.draw(st.sampled_from(self.tickets)), good, 1 + twice)

    def commit_ticket(self, ticket: Ticket, good: bool, times: int) -> None:
        holder = self.oracle.writing.get(ticket.name)
        mine = holder is not None and holder[1].generation == ticket.generation
        here = self.oracle.held.get(ticket.name)
        digest = 0
        doomed = self.oracle.doomed.get(ticket.generation)
        if mine or doomed:  # whose reservation is gone must not write, so this one does not
            digest = write_cell(self.writers_view, ticket.offset, ticket.new) ^ (not good)
        slots, generations = self.packed_tickets([ticket] * times)
        digests = np.array([digest] * times, np.uint64)
        outcomes = self.node.commit(ticket.session, slots, generations, digests).tolist()
        if here is not None and here.generation == ticket.generation:
            assert set(outcomes) == {CellOutcome.STORED}, "committing again is harmless"
        elif mine and holder is not None and ticket.session in self.oracle.sessions:
            if good:
                self.oracle.held[ticket.name] = holder[1]
                del self.oracle.writing[ticket.name]
                assert set(outcomes) == {CellOutcome.STORED}
            else:
                self.oracle.give_up(holder[1])
                assert outcomes == [CellOutcome.DAMAGED, CellOutcome.LOST][:times]
        else:
            assert set(outcomes) == {CellOutcome.LOST}
            if doomed is not None and ticket.session == doomed[0]:
                self.oracle.give_up(doomed[1])

    @precondition(lambda self: self.tickets)
    @rule(data=st.data(), sure=st.booleans(), twice=st.booleans())
    def abort_or_abandon(self, data: st.DataObject, sure: bool, twice: bool) -> None:
        ticket = data.draw(st.sampled_from(self.tickets))
        call = self.node.abort if sure else self.node.abandon
        call(ticket.session, *self.packed_tickets([ticket] * (1 + twice)))
        writing = [*self.oracle.writing.values(), *self.oracle.doomed.values()]
        for session, cell in writing:
            if (session, cell.generation) == (ticket.session, ticket.generation):
                (self.oracle.give_up if sure else self.oracle.retire)(cell)

    @rule(data=st.data(), numbers=SEVERAL, lease_ms=st.sampled_from([0, 200, 1500]))
    def acquire(self, data: st.DataObject, numbers: list[int], lease_ms: int) -> None:
        self.acquire_some(self.any_session(data), numbers, lease_ms)

    @precondition(lambda self: self.oracle.held)
    @rule(data=st.data(), lease_ms=st.sampled_from([200, 1500]))
    def read(self, data: st.DataObject, lease_ms: int) -> None:
        """What most clients do: lease what is there."""
        self.acquire_some(self.living_session(), self.held_numbers(data), lease_ms)

    def acquire_some(self, session: int, numbers: list[int], lease_ms: int) -> None:
        names = [name_of(number) for number in numbers]
        keys, cells = packed([key for key, _ in names]), cells_of(*(c for _, c in names))
        reply = self.node.acquire(session, keys, cells, lease_ms)
        if session not in self.oracle.sessions:
            assert set(reply.outcomes.tolist()) == {CellOutcome.REFUSED}
            assert reply.lease == 0
            return
        expired = self.oracle.loose_and_expired(names, self.clock.wall_ms())
        assert [name for name, added in self.changes() if not added] == expired
        for name in expired:
            self.oracle.drop(name)
        visible = [self.oracle.visible(name, self.clock.wall_ms()) for name in names]
        here = [name for name, seen in zip(names, visible, strict=True) if seen]
        granted = iter(self.oracle.leasable(session, here))
        answers = {True: CellOutcome.FOUND, False: CellOutcome.REFUSED}
        wanted = [answers[next(granted)] if seen else CellOutcome.MISS for seen in visible]
        assert reply.outcomes.tolist() == wanted
        found = [n for n, code in zip(names, wanted, strict=True) if code is CellOutcome.FOUND]
        assert (reply.lease != 0) == bool(found)
        for row, name in enumerate(names):
            if wanted[row] is CellOutcome.FOUND:
                held = self.oracle.held[name]
                assert int(reply.offsets[row]) == held.first_page * PAGE
                assert int(reply.generations[row]) == held.generation
        if found:
            self.oracle.lease(reply.lease, session, found, self.clock.now_s, lease_ms)
            self.touched(set(found), self.oracle.next_stamp())

    @precondition(lambda self: self.oracle.leases)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.oracle.leases)))
        session = self.any_session(data)
        self.node.release(session, number)
        self.oracle.forget_leases(lambda one, lease: (one, lease.session) == (number, session))

    @rule(data=st.data(), numbers=SEVERAL, earlier=st.none() | EARLIER)
    def touch(self, data: st.DataObject, numbers: list[int], earlier: int | None) -> None:
        """By itself, or as part of what a session puts."""
        if earlier is None:
            self.touch_some(numbers, 0, 0)
        else:
            self.touch_some(numbers, self.any_session(data), self.any_operation(earlier))

    def touch_some(self, numbers: list[int], session: int, operation: int) -> None:
        keys = [name_of(number)[0] for number in numbers]
        here = [(k, c) for k in keys for c in (0, 1)]
        visible = [name for name in here if self.oracle.visible(name, self.clock.wall_ms())]
        assert self.node.touch(packed(keys), 0b11, session, operation) == len(visible)
        self.touched(set(visible), self.oracle.stamp_of(session, operation))

    @rule(data=st.data(), by_gossip=st.booleans())
    def delete(self, data: st.DataObject, by_gossip: bool) -> None:
        """Blocks are deleted, here or by a neighbour; a burial keeps nobody from putting again."""
        self.delete_some(data.draw(st.just(self.held_numbers(data)) | SEVERAL), by_gossip)

    def delete_some(self, numbers: list[int], by_gossip: bool) -> None:
        self.changes()
        keys = packed([name_of(number)[0] for number in numbers])
        before = {name for name in self.oracle.held if name[0] in {key.tobytes() for key in keys}}
        if by_gossip:
            self.deletes += 1
            # Newer than every id that this node gives: those begin with the time.
            ids = np.full(len(keys), (1 + self.deletes) << 56, np.uint64)
            self.node.life.deletes_from(BurialPage(keys, ids, np.zeros(len(keys), np.uint64)))
        else:
            assert self.node.life.bury(self.node.life.delete(keys))
        assert set(self.changes()) == {(name, False) for name in before}
        for key in keys:
            self.oracle.delete(key.tobytes())

    @rule(
        data=st.data(), handle=st.sampled_from("ab"), ttl_s=st.sampled_from([1, 2, 5]),
    )  # fmt: skip
    def hold(self, data: st.DataObject, handle: str, ttl_s: int) -> None:
        """All or nothing, within the budget; cells of blocks 0 to 2, and of block 3 another."""
        self.hold_some(data.draw(st.just(self.held_numbers(data)) | SEVERAL), handle, ttl_s)

    def hold_some(self, numbers: list[int], handle: str, ttl_s: int) -> None:
        wall_ms = self.clock.wall_ms()
        for mask in (1, 2):
            names = [n for n in map(name_of, numbers) if 1 << n[1] == mask]
            if not names:
                continue
            keys = packed([key for key, _ in names])
            reply = self.node.life.hold(HoldRequest(TENANT, handle, keys, mask, 1000 * ttl_s))
            if not all(self.oracle.visible(name, wall_ms) for name in names):
                assert reply.outcome is HoldOutcome.NOT_HELD
                continue
            before = self.oracle.held_pages()
            trial = deepcopy(self.oracle)
            trial.hold(handle, names, ttl_s, wall_ms)
            if before < trial.held_pages() > HOLD_PAGES:
                assert reply.outcome is HoldOutcome.OVER_BUDGET
                continue
            assert reply.outcome is HoldOutcome.GRANTED
            assert reply.held_bytes == PAGE * trial.held_pages()
            self.oracle.hold(handle, names, ttl_s, wall_ms)

    @rule(handle=st.sampled_from("ab"))
    def release_hold(self, handle: str) -> None:
        assert self.node.life.release_hold(TENANT, handle) == (handle in self.oracle.holds)
        if handle in self.oracle.holds:
            self.oracle.release_hold(handle, self.clock.wall_ms())

    def touched(self, names: set[Name], stamp: int) -> None:
        for name in names:
            self.oracle.held[name].stamp = max(self.oracle.held[name].stamp, stamp)
            self.oracle.held[name].slide(self.clock.wall_ms(), None)

    @rule(ticks=st.integers(1, 12), beating=st.sampled_from([True, True, False]))
    def pass_time(self, ticks: int, beating: bool) -> None:
        for _ in range(ticks):
            self.clock.advance(TICK_S)
            for session in self.oracle.sessions if beating else ():
                assert self.node.beat(session)
                self.oracle.sessions[session].beat_s = self.clock.now_s
            self.node.tick()
            self.oracle.tick(self.clock.now_s, self.clock.wall_ms())

    @rule()
    def stand_still(self) -> None:
        """The node gets no processor for 5 s: nobody who beat of late is declared dead for that."""
        latest_s = self.clock.now_s - SESSION_DEAD_S + STALL_S
        lively = {n for n, one in self.oracle.sessions.items() if one.beat_s > latest_s}
        self.clock.advance(5.0)
        self.node.tick()
        self.oracle.tick(self.clock.now_s, self.clock.wall_ms())
        assert lively <= set(self.oracle.sessions)

    @rule()
    def restart(self) -> None:
        """Killed with -9; another process adopts the folder."""
        self.incarnation += 1
        self.changes()
        capacity = CAPACITY_PAGES * PAGE
        tier = HostTier.adopt(FS, self.clock, self.folder, capacity, self.incarnation)
        self.node = self.new_node(tier)
        self.oracle.restart(self.clock.wall_ms())
        self.oracle.ticked_s = self.clock.now_s

    @rule()
    def write_late(self) -> None:
        """Clients that were given up go on writing into what they had reserved."""
        for page, use in enumerate(self.oracle.pages):
            if use is Page.RETIRED:
                self.writers_view.view(page * PAGE, PAGE)[:] = 0xAA

    def living_session(self) -> int:
        """The newest, or a new one."""
        if not self.oracle.sessions:
            self.open_session()
        return max(self.oracle.sessions)

    def held_numbers(self, data: st.DataObject) -> list[int]:
        """Some of the blocks that are held, one if none is."""
        held = [number for number, name in enumerate(NAMES) if name in self.oracle.held]
        return data.draw(st.lists(st.sampled_from(held or [0]), min_size=1, max_size=3))

    def any_session(self, data: st.DataObject) -> int:
        """A session that lives, or one that never did."""
        return data.draw(st.sampled_from([*self.oracle.sessions, *self.oracle.sessions, 77]))

    def packed_tickets(self, tickets: list[Ticket]) -> tuple[Any, Any]:
        return (
            np.array([ticket.slot for ticket in tickets], np.uint32),
            np.array([ticket.generation for ticket in tickets], np.uint64),
        )

    def changes(self) -> list[tuple[Name, bool]]:
        found = self.node.drain_changes()
        rows = zip(found.keys, found.cells.tolist(), found.added.tolist(), strict=True)
        return [((key.tobytes(), index), added) for key, index, added in rows]

    @invariant()
    def exactly_what_is_held_is_found(self) -> None:
        marks = {mark.handle: mark.remaining_ms for mark in self.node.life.holds_of(TENANT)}
        assert marks == {
            handle: round(1000 * (until_s - self.clock.now_s))
            for handle, (until_s, _) in self.oracle.holds.items()
        }
        for number, name in enumerate(NAMES):
            visible = self.oracle.visible(name, self.clock.wall_ms())
            new = cell(number)
            assert holds(self.node.tier, new) == visible, f"block {number}"
            keys = packed([new.key])
            assert self.node.lookup(keys, 1 << new.cell) == visible
        snapshot = self.node.snapshot()
        listed = {(k.tobytes(), c) for k, c in zip(snapshot.keys, snapshot.cells, strict=True)}
        assert listed == set(self.oracle.held)

    @invariant()
    def all_memory_is_accounted_for(self) -> None:
        stats, oracle = self.node.stats(), self.oracle
        assert stats.promised_bytes == PAGE * oracle.held_pages()
        assert stats.host.held_cells == len(oracle.held)
        assert stats.host.held_bytes == PAGE * sum(h.pages for h in oracle.held.values())
        assert stats.host.reserved_cells == len(oracle.writing) + len(oracle.doomed)
        assert stats.host.retired_bytes == PAGE * oracle.pages.count(Page.RETIRED)
        assert (stats.sessions, stats.leases) == (len(oracle.sessions), len(oracle.leases))
        assert len(oracle.pages) - oracle.pages.count(Page.RETIRED) == CAPACITY_PAGES
        assert int(self.node.tier.table.header["frontier"]) == len(oracle.pages) * PAGE


TestNode = NodeMachine.TestCase
TestNode.settings = settings(
    max_examples=80, stateful_step_count=50, deadline=None, derandomize=True
)


class NodeMachineAtLength(NodeMachine):
    """The same, other cases every time."""


TestNodeAtLength = pytest.mark.slow(NodeMachineAtLength.TestCase)
TestNodeAtLength.settings = settings(max_examples=500, stateful_step_count=50, deadline=None)
