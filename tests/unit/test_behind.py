"""A node with an NVMe tier behind its host tier: what leaves the arena is still held."""

import random
from collections.abc import Iterator

import numpy as np
import pytest

from kvstore.block import HEADER_BYTES
from kvstore.calls import CellOutcome, Damage
from kvstore.changes import Changes
from kvstore.node import Node
from kvstore.tiers import write_behind
from kvstore.tiers.behind import Behind
from kvstore.tiers.nvme.spill import Phase
from kvstore.tiers.nvme.tier import RESTART_S
from tests.behind_world import ARENA_PAGES, World, empty_world, new_world
from tests.driven_node import LEASE_MS
from tests.nvme_world import SLOTS
from tests.worlds import (
    PAGE,
    cells_of,
    key_number,
    new_cell,
    packed,
    shared_folder,
)


@pytest.fixture
def world() -> Iterator[World]:
    with shared_folder() as folder:
        yield empty_world(folder)


def names(changes: Changes) -> set[tuple[bytes, int]]:
    keys = [key.tobytes() for key in changes.keys]
    return set(zip(keys, changes.cells.tolist(), strict=True))


def test_what_the_arena_evicts_comes_back_from_the_disk(world: World) -> None:
    world.fill(range(12))
    assert not any(world.above(number) for number in range(3))
    assert world.node.lookup(packed([key_number(n) for n in range(12)]), 1) == 12
    reply = world.acquire(0, 1, 11)
    assert reply.outcomes.tolist() == [CellOutcome.FOUND] * 3
    assert reply.loaded.tolist() == [True, True, False]
    assert world.above(0)
    assert world.above(1)
    world.release(reply)
    assert world.node.stats().leases == 0
    assert not world.acquire(0, 1).loaded.any()


def test_what_is_used_again_goes_down_without_pressure(world: World) -> None:
    world.fill(range(2))
    assert not world.below(0)
    world.put_cells([new_cell(0)])
    world.pass_time()
    assert world.below(0)
    assert not world.below(1)
    world.release(world.acquire(1))
    world.pass_time()
    assert world.below(1)


def test_what_was_brought_up_can_leave_again(world: World) -> None:
    world.fill(range(12))
    for _ in range(2):
        world.release(world.acquire(0, 1, 11))
    world.fill(range(20, 28))
    assert all(world.above(number) for number in range(20, 28))


def test_calls_for_the_same_cell_share_one_load(world: World) -> None:
    world.fill(range(12))
    world.queue.is_eager = False
    keys, cells = packed([key_number(0)]), cells_of(0)
    first, second = (world.node.begin_acquire(keys, cells) for _ in range(2))
    assert not first.is_done
    assert not second.is_done
    assert world.put_cells([new_cell(0)]) == [CellOutcome.BUSY]
    world.queue.is_eager = True
    world.node.behind.poll()
    assert first.is_done
    assert second.is_done
    assert first.loaded.all()
    assert second.loaded.all()
    assert world.node.stats().nvme.loaded == 1
    for promotion in (first, second):
        world.node.end_acquire(promotion)
    world.release(world.acquire(0))


def test_what_does_not_come_in_time_is_refused_and_comes_later(world: World) -> None:
    world.fill(range(12))
    world.queue.is_eager = False
    keys, cells = packed([key_number(0), key_number(99)]), cells_of(0, 0)
    promotion = world.node.begin_acquire(keys, cells)
    world.node.behind.poll()
    reply = world.node.acquire(world.session, keys, cells, LEASE_MS, promotion)
    world.node.end_acquire(promotion)
    assert reply.outcomes.tolist() == [CellOutcome.REFUSED, CellOutcome.MISS]
    world.queue.is_eager = True
    world.pass_time()
    assert world.above(0)
    assert not world.acquire(0).loaded.any()


def test_a_dead_disk_is_a_miss_and_everything_is_back_with_it(world: World) -> None:
    world.fill(range(12))
    epoch = world.node.behind.epoch
    world.queue.is_eager = False
    keys, cells = packed([key_number(0)]), cells_of(0)
    promotion = world.node.begin_acquire(keys, cells)
    world.queue.die()
    world.node.behind.poll()
    assert promotion.is_done
    assert not promotion.loaded.any()
    world.node.end_acquire(promotion)
    assert world.nvme.phase is Phase.OPENING
    assert world.acquire(0).outcomes.tolist() == [CellOutcome.MISS]
    world.queue.is_eager = True
    world.pass_time(RESTART_S[0] + 0.2)
    assert world.node.behind.epoch == epoch + 2
    assert world.acquire(0).outcomes.tolist() == [CellOutcome.FOUND]


def test_what_is_used_again_while_the_disk_is_away_goes_down_when_it_is_back(world: World) -> None:
    world.fill(range(1))
    world.queue.die()
    world.node.behind.poll()
    assert world.nvme.phase is Phase.OPENING
    world.put_cells([new_cell(0)])
    world.pass_time(RESTART_S[0] + 0.2)
    world.pass_time()
    assert world.below(0)


def test_a_cell_whose_bytes_rotted_on_the_disk_does_not_come(world: World) -> None:
    world.fill(range(12))
    record = next(r for r in world.nvme.held_records() if r["key"].tobytes() == key_number(0))
    disk = world.disk
    disk.flip((int(record["offset"]) + PAGE + 100) * 8)
    reply = world.acquire(0)
    assert reply.outcomes.tolist() == [CellOutcome.MISS]
    assert not world.below(0)
    assert not world.above(0)
    assert world.put_cells([new_cell(0)]) == [CellOutcome.STORED]


def test_an_arena_full_of_leases_refuses_what_is_on_the_disk(world: World) -> None:
    world.fill(range(12))
    sessions = [world.session, world.node.open_session()]
    held = [n for n in range(12) if world.above(n)]
    leases = []
    for session, some in zip(sessions, (held[:4], held[4:]), strict=True):
        keys = packed([key_number(n) for n in some])
        leases.append(world.node.acquire(session, keys, cells_of(*[0] * len(some)), LEASE_MS))
    assert all((lease.outcomes == CellOutcome.FOUND).all() for lease in leases)
    reply = world.acquire(0)
    assert reply.outcomes.tolist() == [CellOutcome.REFUSED]
    for session, lease in zip(sessions, leases, strict=True):
        world.node.release(session, lease.lease)
    assert world.acquire(0).outcomes.tolist() == [CellOutcome.FOUND]


def test_what_has_expired_is_in_neither_tier(world: World) -> None:
    world.fill(range(12), ttl_s=60)
    assert world.below(0)
    world.pass_time(30)
    world.release(world.acquire(0))
    world.pass_time(40)
    assert world.acquire(0).outcomes.tolist() == [CellOutcome.FOUND], "its use made it live on"
    assert world.acquire(1).outcomes.tolist() == [CellOutcome.MISS]
    assert world.node.lookup(packed([key_number(1)]), 1) == 0


def test_touching_a_cell_of_the_arena_makes_its_copy_live_on(world: World) -> None:
    world.fill(range(2), ttl_s=60)
    world.node.touch(packed([key_number(0)]), 1)
    world.pass_time(40)
    assert world.node.touch(packed([key_number(0)]), 1) == 1
    world.pass_time(40)
    assert world.below(0)


def bound_writes(world: World, daily_bytes: int) -> None:
    """Drive the same tiers by a node whose disk takes so much in a day."""
    behind = Behind(world.host, world.nvme, world.clock, daily_bytes=daily_bytes)
    world.node = Node(world.node.identity, world.host, world.clock, behind=behind)
    world.session = world.node.open_session()


def test_no_more_is_written_in_a_day_than_is_allowed(world: World) -> None:
    bound_writes(world, daily_bytes=5 * PAGE)
    world.fill(range(12))
    assert world.nvme.stats.stored == 2
    world.clock.advance(24 * 3600)
    world.fill(range(12, 20))
    assert world.nvme.stats.stored == 4


def test_what_finds_no_room_on_the_disk_is_none_of_a_days_writes(world: World) -> None:
    bound_writes(world, daily_bytes=40 * PAGE)
    world.fill(range(18))
    stats = world.nvme.stats
    assert stats.held_cells == stats.stored == SLOTS
    promised = np.arange(SLOTS, dtype=np.uint32)
    world.nvme.keep(promised)
    world.fill(range(18, 40))
    assert stats.stored == SLOTS, "no room was left"
    world.nvme.let_go(promised)
    world.fill(range(40, 60))
    assert stats.stored == 20


def test_the_node_announces_what_either_tier_holds(world: World) -> None:
    """The changes that are told, one after the other, make up what is held: strictly in turns."""
    told: set[tuple[bytes, int]] = set()
    rng = random.Random(5)
    for _ in range(150):
        number = rng.randrange(16)
        if rng.random() < 0.5:
            world.put_cells([new_cell(number)])
        else:
            world.release(world.acquire(number))
        if rng.random() < 0.7:
            world.pass_time(0.1)
        changes = world.node.drain_changes()
        for key, cell, added in zip(changes.keys, changes.cells, changes.added, strict=True):
            name = (key.tobytes(), int(cell))
            assert (name in told) != added
            (told.add if added else told.discard)(name)
        assert told == names(world.node.snapshot())
    assert world.nvme.stats.evicted > 0
    assert world.nvme.stats.loaded > 0


def test_a_machine_that_died_is_warm_from_its_disk(world: World) -> None:
    world.fill(range(12))
    held = {r["key"].tobytes() for r in world.nvme.held_records()}
    world.disk.crash()
    with shared_folder() as folder:
        late = new_world(folder, world.clock, world.disk, world.catalog, incarnation=2)
        assert {key for key, _ in names(late.node.snapshot())} == held
        first = next(n for n in range(12) if key_number(n) in held)
        assert late.acquire(first).outcomes.tolist() == [CellOutcome.FOUND]


def test_what_was_wanted_and_is_gone_stands_in_nobodys_way(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write_behind, "WANTED_SEEN", 1)
    world.fill(range(6))
    world.queue.is_eager = False
    world.put_cells([new_cell(number) for number in range(6)])
    for slot in world.host.next_to_leave(ARENA_PAGES).tolist():
        world.host.evict(slot)
    world.pass_time(0.5)
    world.queue.is_eager = True
    world.fill(range(20, 22))
    world.put_cells([new_cell(20)])
    world.pass_time()
    assert world.below(20)


def test_a_damaged_cell_of_the_arena_is_not_spilled(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.fill(range(2))
    slot = int(world.host.find(packed([key_number(0)]), cells_of(0)).slots[0])
    at = int(world.host.table.slots[slot]["offset"]) + 10
    world.host.arena.view(at, 1)[0] ^= 1
    for _ in range(3):
        world.put_cells([new_cell(0), new_cell(1)])
        world.pass_time()
    assert not world.below(0)
    assert world.below(1)
    assert world.nvme.stats.stored == 1
    assert caplog.text.count("is damaged: it is not spilled") == 1, "it is tried once"


def damaged(world: World) -> Damage:
    """A bit of block 0 flips in the arena; what its reader says of it."""
    found = world.host.find(packed([key_number(0)]), cells_of(0))
    world.host.arena.view(int(found.offsets[0]) + HEADER_BYTES + 10, 1)[0] ^= 1
    return Damage(key_number(0), 0, (int(found.lengths[0]),))


def test_a_damaged_cell_that_is_being_written_goes_when_that_is_over(world: World) -> None:
    world.fill(range(1))
    damage = damaged(world)
    world.queue.is_eager = False
    world.put_cells([new_cell(0)])
    for _ in range(3):
        assert world.node.discard([damage]) == 0, "the disk reads it"
    world.pass_time()
    assert world.node.lookup(packed([key_number(0)]), 1) == 1
    world.queue.is_eager = True
    world.pass_time(1)
    assert world.node.lookup(packed([key_number(0)]), 1) == 0
    assert not world.below(0)
    assert world.node.stats().host.damaged == 1


def test_what_was_damaged_before_it_was_spilled_leaves_both_tiers(world: World) -> None:
    world.fill(range(2))
    damage = damaged(world)
    world.put_cells([new_cell(0)])
    world.pass_time()
    assert world.below(0)
    assert world.node.discard([damage]) == 1
    assert not world.below(0)
    world.fill(range(1))
    world.put_cells([new_cell(0)])
    world.pass_time()
    assert world.below(0)
    for slot in world.host.held_slots().tolist():
        world.host.evict(slot)
    assert world.acquire(0).outcomes.tolist() == [CellOutcome.FOUND]
