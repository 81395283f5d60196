"""Holds: what is promised is kept through eviction, expiry, restarts and a disk that goes away."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from xxhash import xxh3_64_digest

from kvstore.block import HEADER_BYTES
from kvstore.calls import (
    HANDLE_BYTES_MAX,
    CellOutcome,
    Damage,
    HoldOutcome,
    HoldRequest,
    NodeIdentity,
)
from kvstore.clock import ManualClock
from kvstore.errors import UsageError
from kvstore.fs import LinuxFileSystem
from kvstore.hold import Hold
from kvstore.hold_files import HOLDS_FOLDER, HoldFiles
from kvstore.lasting import Lasting
from kvstore.node import Node
from kvstore.tenants import EPOCH_MAX, EpochPage, tenant_digest
from kvstore.tiers.nvme.spill import Phase
from tests.faults import FaultyFiles
from tests.life_world import FOLDER, TENANT, LifeWorld, keys_of
from tests.worlds import PAGE, cells_of, key_number, shared_folder

OTHER = tenant_digest("other")
CELL_BYTES = 2 * PAGE
"""What a cell of one page and its header take."""


@pytest.fixture
def world() -> Iterator[LifeWorld]:
    with shared_folder() as folder:
        yield LifeWorld(folder, arena_pages=32, hold_bytes=8 * PAGE)


@pytest.fixture
def diskless() -> Iterator[LifeWorld]:
    with shared_folder() as folder:
        yield LifeWorld(folder, has_disk=False, arena_pages=32, hold_bytes=8 * PAGE)


def flood(world: LifeWorld) -> None:
    """More than the arena and the disk have room for."""
    for number in range(100, 140):
        world.put(number)
        world.put(number)
        world.pass_time(0.2)


def pins(world: LifeWorld) -> int:
    return int(world.host._pins.sum())


def test_a_held_cell_stays_in_an_arena_without_a_disk(diskless: LifeWorld) -> None:
    diskless.put(1, 2)
    reply = diskless.hold(1)
    assert reply.outcome is HoldOutcome.GRANTED
    assert (reply.held_bytes, reply.budget_bytes) == (CELL_BYTES, 8 * PAGE)
    flood(diskless)
    assert diskless.found(1, 2) == [True, False]
    assert diskless.life.release_hold(TENANT, "h")
    assert not diskless.life.release_hold(TENANT, "h")
    assert pins(diskless) == 0
    flood(diskless)
    assert diskless.found(1) == [False]


def test_a_held_cell_moves_to_the_disk_and_stays_there(world: LifeWorld) -> None:
    world.put(1, 2)
    world.hold(1)
    assert pins(world) == 1
    world.pass_time(2)
    assert world.below(1), "a promise wants it on the disk"
    assert pins(world) == 0, "the disk keeps it now"
    flood(world)
    assert world.found(1, 2) == [True, False]
    assert world.below(1)
    assert world.acquire(1).outcomes.tolist() == [CellOutcome.FOUND]
    world.life.release_hold(TENANT, "h")
    flood(world)
    assert not world.below(1)


def test_held_cells_that_arrive_on_the_disk_together_stay_there(world: LifeWorld) -> None:
    world.put(1, 2, 3, ttl_s=20)
    world.hold(1, ttl_s=100)
    world.pass_time(2)
    world.hold(2, 3, ttl_s=100)
    world.pass_time(2)
    assert pins(world) == 0, "the disk keeps them now"
    flood(world)
    world.pass_time(20)
    assert world.found(1, 2, 3) == [True] * 3


def test_what_is_on_the_disk_already_is_held_there(world: LifeWorld) -> None:
    world.put_twice(1)
    assert world.hold(1).outcome is HoldOutcome.GRANTED
    assert pins(world) == 0
    flood(world)
    assert world.below(1)


def test_a_hold_ends_by_itself(diskless: LifeWorld) -> None:
    diskless.put(1)
    diskless.hold(1, ttl_s=30)
    diskless.pass_time(29)
    (mark,) = diskless.life.holds_of(TENANT)
    assert 0 < mark.remaining_ms <= 1000
    diskless.pass_time(2)
    assert diskless.life.holds_of(TENANT) == []
    assert pins(diskless) == 0
    assert not diskless.files.names(FOLDER / HOLDS_FOLDER)


def test_expiry_waits_for_the_promise(world: LifeWorld) -> None:
    world.put_twice(1, ttl_s=20)
    world.put(2, ttl_s=20)
    world.put(3, ttl_s=20)
    world.hold(1, 2, ttl_s=100)
    world.pass_time(90)
    assert world.found(1, 2, 3) == [True, True, False]
    assert world.acquire(1, 2).outcomes.tolist() == [CellOutcome.FOUND] * 2
    world.life.release_hold(TENANT, "h")
    world.pass_time(19)
    assert world.found(1, 2) == [True, True]
    world.pass_time(2)
    assert world.found(1, 2) == [False, False], "as long as after a use just then"


def test_a_promise_does_not_shorten_or_limit_a_life(diskless: LifeWorld) -> None:
    diskless.put(1)
    diskless.put(2, ttl_s=500)
    diskless.hold(1, 2, ttl_s=10)
    diskless.pass_time(30)
    assert diskless.found(1, 2) == [True, True]
    diskless.pass_time(500)
    assert diskless.found(1, 2) == [True, False]


def test_all_or_nothing(world: LifeWorld) -> None:
    world.put(1)
    assert world.hold(1, 9).outcome is HoldOutcome.NOT_HELD
    assert pins(world) == 0
    assert world.life.holds_of(TENANT) == []
    request = HoldRequest(TENANT, "h", keys_of(1), 0b11, 1000)
    assert world.life.hold(request).outcome is HoldOutcome.NOT_HELD, "one of two cells"


def test_bytes_are_counted_once_for_a_tenant(diskless: LifeWorld) -> None:
    diskless.put(*range(8))
    assert diskless.hold(0, 1, 2, handle="a").held_bytes == 3 * CELL_BYTES
    assert diskless.hold(1, 2, 3, handle="b").held_bytes == 4 * CELL_BYTES
    assert diskless.hold(4, handle="c").outcome is HoldOutcome.OVER_BUDGET
    assert diskless.hold(0, 3, handle="c").held_bytes == 4 * CELL_BYTES
    diskless.life.release_hold(TENANT, "b")
    assert diskless.node.stats().promised_bytes == 4 * CELL_BYTES
    diskless.life.release_hold(TENANT, "c")
    assert diskless.node.stats().promised_bytes == 3 * CELL_BYTES
    assert pins(diskless) == 3
    diskless.life.release_hold(TENANT, "a")
    assert diskless.node.stats().promised_bytes == 0


def test_all_tenants_together_have_half_of_the_arena(diskless: LifeWorld) -> None:
    diskless.put(*range(12))
    tenants = [tenant_digest(str(number)) for number in range(3)]
    outcomes = [
        diskless.hold(*range(4 * at, 4 * at + 4), tenant=tenant).outcome
        for at, tenant in enumerate(tenants)
    ]
    assert outcomes == [HoldOutcome.GRANTED] * 2 + [HoldOutcome.OVER_BUDGET]
    stats = diskless.node.stats()
    assert (stats.holds, stats.promised_bytes) == (2, 16 * PAGE)
    assert stats.promisable_bytes == 16 * PAGE


def test_the_same_handle_again_is_the_union_until_the_later_end(diskless: LifeWorld) -> None:
    diskless.put(1, 2, 3)
    diskless.hold(1, 2, ttl_s=60)
    assert diskless.hold(2, 3, ttl_s=10).held_bytes == 3 * CELL_BYTES
    (mark,) = diskless.life.holds_of(TENANT)
    assert mark.remaining_ms == 60_000
    assert pins(diskless) == 3
    diskless.hold(1, handle="other", ttl_s=500)
    diskless.life.release_hold(TENANT, "h")
    assert pins(diskless) == 1
    flood(diskless)
    assert diskless.found(1, 2, 3) == [True, False, False]


def test_handles_of_tenants_are_apart(diskless: LifeWorld) -> None:
    diskless.put(1)
    diskless.hold(1)
    assert not diskless.life.release_hold(OTHER, "h")
    assert diskless.life.holds_of(OTHER) == []
    assert len(diskless.life.holds_of(TENANT)) == 1


def test_too_many(diskless: LifeWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstore.holds.HOLDS_MAX", 2)
    diskless.put(1)
    outcomes = [diskless.hold(1, handle=name).outcome for name in ("a", "b", "c", "a")]
    assert [one.name for one in outcomes] == ["GRANTED", "GRANTED", "TOO_MANY", "GRANTED"]


def test_delete_beats_hold(world: LifeWorld) -> None:
    world.put_twice(1)
    world.put(2, 3)
    world.hold(1, 2, 3)
    world.delete(1, 2)
    assert world.found(1, 2, 3) == [False, False, True]
    assert world.node.stats().promised_bytes == CELL_BYTES
    world.put(1)
    flood(world)
    assert world.found(1, 3) == [False, True], "a later copy is nobody's promise"
    world.delete(3)
    assert world.node.stats().holds == 0
    world.pass_time(5)
    assert pins(world) == 0


@pytest.mark.parametrize("adopt", [True, False])
def test_promises_outlive_the_node(world: LifeWorld, adopt: bool) -> None:
    world.put_twice(1)
    world.hold(1, ttl_s=600)
    world.pass_time(2)
    world.restart(adopt)
    world.pass_time(2)
    (mark,) = world.life.holds_of(TENANT)
    assert 590_000 < mark.remaining_ms < 600_000
    flood(world)
    assert world.found(1) == [True]
    assert world.life.release_hold(TENANT, "h")
    flood(world)
    assert world.found(1) == [False]


def test_an_arenas_cells_are_held_again_after_a_restart(diskless: LifeWorld) -> None:
    diskless.put(1, ttl_s=5)
    diskless.hold(1, ttl_s=600)
    diskless.restart()
    assert pins(diskless) == 1
    flood(diskless)
    assert diskless.found(1) == [True]


def test_what_a_reboot_lost_is_said_and_leaves_the_hold(
    diskless: LifeWorld, caplog: pytest.LogCaptureFixture
) -> None:
    diskless.put(1)
    diskless.hold(1)
    diskless.restart(adopt=False)
    assert "1 cells of the hold 'h' are lost" in caplog.text
    assert diskless.node.stats().holds == 0
    assert not diskless.files.names(FOLDER / HOLDS_FOLDER)


def test_a_clock_that_was_set_back_makes_no_hold_longer(diskless: LifeWorld) -> None:
    diskless.put(1)
    diskless.hold(1, ttl_s=60)
    diskless.clock.wall_now_ms -= 3_600_000
    diskless.restart()
    (mark,) = diskless.life.holds_of(TENANT)
    assert mark.remaining_ms == 60_000
    diskless.clock.wall_now_ms += 7_200_000
    diskless.restart()
    assert diskless.life.holds_of(TENANT) == []


@pytest.mark.parametrize("kind", ["diskless", "world"])
@pytest.mark.parametrize("step_ms", [3_600_000, -3_600_000])
def test_what_is_promised_does_not_expire_when_the_clock_is_set(
    request: pytest.FixtureRequest, kind: str, step_ms: int
) -> None:
    world: LifeWorld = request.getfixturevalue(kind)
    world.put(1, ttl_s=4)
    world.hold(1, ttl_s=60)
    world.pass_time(3)
    world.clock.wall_now_ms += step_ms
    world.node.tick()
    assert world.found(1) == [True]
    world.pass_time(56)
    assert world.found(1) == [True]
    world.pass_time(10)
    assert world.found(1) == [False], "its time is over"


@pytest.mark.parametrize("spoil", ["flip", "cut", "empty"])
def test_a_damaged_file_is_said_once_and_dropped(
    diskless: LifeWorld, caplog: pytest.LogCaptureFixture, spoil: str
) -> None:
    diskless.put(1, 2)
    diskless.hold(1, handle="a")
    diskless.hold(2, handle="b")
    name = diskless.files.names(FOLDER / HOLDS_FOLDER)[0]
    path = FOLDER / HOLDS_FOLDER / name
    data = bytearray(diskless.files.read(path) or b"")
    data[len(data) // 2] ^= 1
    spoiled = {"flip": bytes(data), "cut": bytes(data[:-9]), "empty": b""}[spoil]
    diskless.files.replace(path, spoiled)
    diskless.restart()
    assert caplog.text.count("is damaged") == 1
    assert len(diskless.life.holds_of(TENANT)) == 1
    diskless.restart()
    assert caplog.text.count("is damaged") == 1


def test_holds_on_a_real_disk(tmp_path: Path) -> None:
    clock = ManualClock()
    files = HoldFiles(Lasting(LinuxFileSystem(), tmp_path), clock)
    assert files.read() == []
    keys, cells = np.repeat(keys_of(1, 2), 2, axis=0), cells_of(0, 1, 0, 1)
    sizes_bytes = np.array([1, 2, 3, 1 << 40], np.uint64)
    hold = Hold(TENANT, "räder", keys, cells, sizes_bytes, 60_000, clock.now_s + 40, "a", 1)
    files.write(hold)
    (tmp_path / HOLDS_FOLDER / ".torn.new").write_bytes(b"SMV")
    clock.advance(10)
    (found,) = files.read()
    assert (found.tenant, found.handle, found.ttl_ms) == (TENANT, "räder", 60_000)
    assert found.until_s == pytest.approx(hold.until_s)
    assert found.names() == hold.names()
    assert found.sizes_bytes.tolist() == sizes_bytes.tolist()
    assert len(list((tmp_path / HOLDS_FOLDER).iterdir())) == 1
    clock.advance(30)
    assert files.read() == []
    assert not list((tmp_path / HOLDS_FOLDER).iterdir())


def test_a_file_knows_of_copies_and_of_releases(tmp_path: Path) -> None:
    clock = ManualClock()
    files = HoldFiles(Lasting(LinuxFileSystem(), tmp_path), clock)
    assert files.read() == []
    keys, cells, sizes_bytes = keys_of(1), cells_of(0), np.array([1], np.uint64)
    until_s = clock.now_s + 40
    mine = Hold(TENANT, "h", keys, cells, sizes_bytes, 60_000, until_s, "a", 1 << 63, 7, 2, "b")
    theirs = replace(mine, granter="ü", partner="ü")
    released = replace(mine.select(np.zeros(1, np.bool_)), released=mine.grant, partner="")
    for hold in (mine, theirs, released):
        files.write(hold)
    clock.advance(10)
    found = {(hold.granter, len(hold)): hold for hold in files.read()}
    assert len(found) == 3
    for hold in (mine, theirs, released):
        back = found[hold.granter, len(hold)]
        assert (back.name, back.replicas, back.partner) == (hold.name, 2, hold.partner)
        assert (back.grant, back.released) == (hold.grant, hold.released)
    files.remove(mine)
    files.remove(released)
    assert [hold.granter for hold in files.read()] == ["ü"]


def test_a_file_of_another_version_is_said_once_and_dropped(
    diskless: LifeWorld, caplog: pytest.LogCaptureFixture
) -> None:
    diskless.put(1)
    diskless.hold(1)
    (name,) = diskless.files.names(FOLDER / HOLDS_FOLDER)
    path = FOLDER / HOLDS_FOLDER / name
    body = (diskless.files.read(path) or b"")[:-8].replace(b"SMVHOLD4", b"SMVHOLD3")
    diskless.files.replace(path, body + xxh3_64_digest(body))
    diskless.restart()
    assert caplog.text.count("is damaged") == 1
    assert diskless.life.holds_of(TENANT) == []
    assert not diskless.files.names(FOLDER / HOLDS_FOLDER)


def test_whatever_file_operation_fails_no_promise_is_made_up() -> None:
    """Fail the first, the second, ...: what was granted is there, and nothing else."""
    for fail_at in range(1, 100):
        with shared_folder() as folder:
            files = FaultyFiles(fail_at)
            world = LifeWorld(folder, has_disk=False, files=files)
            world.put(1, 2, 3)
            granted = {
                handle
                for number, handle in enumerate("abc", start=1)
                if world.hold(number, handle=handle).outcome is HoldOutcome.GRANTED
            }
            world.life.release_hold(TENANT, "a")
            world.files = files.copy()
            world.restart()
            found = {mark.handle for mark in world.life.holds_of(TENANT)}
            assert granted - {"a"} <= found <= granted
            assert pins(world) == len(found)
            if not files.faults:
                return
    raise AssertionError("the sweep has no end")


def test_a_promise_that_cannot_be_written_down_is_declined(
    diskless: LifeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("full")

    diskless.put(1)
    monkeypatch.setattr(diskless.files, "replace", refuse)
    assert diskless.hold(1).outcome is HoldOutcome.FAILED
    assert pins(diskless) == 0
    assert diskless.node.stats().holds == 0


def test_a_disk_that_goes_away_and_comes_back_keeps_its_promises(world: LifeWorld) -> None:
    world.put_twice(1, ttl_s=60)
    world.put(2)
    world.hold(1, 2, ttl_s=600)
    world.pass_time(2)
    world.queue.die()
    world.pass_time(0.2)
    world.pass_time(3)
    assert world.below(1)
    flood(world)
    assert world.found(1, 2) == [True, True]
    world.life.release_hold(TENANT, "h")
    flood(world)
    assert world.found(1, 2) == [False, False]
    world.pass_time(5)
    assert pins(world) == 0


def test_nothing_takes_the_place_of_a_held_cell_on_a_disk_that_has_just_come_back(
    world: LifeWorld,
) -> None:
    world.put_twice(1)
    world.hold(1)
    flood(world)
    assert not world.above(1)
    world.queue.die()
    world.pass_time(0.1)
    while world.nvme.phase is not Phase.OPEN:
        world.pass_time(0.1)
    for number in range(200, 240):
        world.put(number)
        world.put(number)
        world.node.behind.poll()
    assert world.found(1) == [True]


def test_a_hold_that_ends_shortens_no_other_while_a_cell_arrives_on_the_disk(
    world: LifeWorld,
) -> None:
    """The one counts in the arena still, the other on the disk already."""
    world.put(2)
    world.hold(2, handle="first")
    world.pass_time(2)
    world.put(1, ttl_s=4)
    world.hold(1, handle="a", ttl_s=600)
    world.pass_time(0.2)
    assert world.below(1)
    assert pins(world) == 1, "nobody has looked since"
    world.hold(1, handle="b", ttl_s=600)
    assert world.life.release_hold(TENANT, "b")
    world.pass_time(10)
    assert world.found(1) == [True]
    assert world.acquire(1).outcomes.tolist() == [CellOutcome.FOUND]


def test_a_held_cell_that_is_to_live_for_ever_does_so_on_the_disk(world: LifeWorld) -> None:
    """It was put again, without an end, while it was on its way there."""
    world.put(2)
    world.hold(2, handle="first")
    world.pass_time(2)
    for _ in range(2):
        world.put(1, ttl_s=4)
    world.queue.is_eager = False
    world.pass_time(0.2)
    world.put(1)
    world.hold(1, ttl_s=600)
    world.queue.is_eager = True
    world.pass_time(2)
    assert pins(world) == 0, "the disk keeps it now"
    flood(world)
    world.pass_time(10)
    assert world.found(1) == [True]


def test_a_damaged_cell_of_the_arena_leaves_its_hold(diskless: LifeWorld) -> None:
    diskless.put(1, 2)
    diskless.hold(1, 2)
    slot = int(diskless.host.table.find(keys_of(1), cells_of(0)).slots[0])
    record = diskless.host.table.slots[slot]
    length = int(record["length"])
    damage = Damage(key_number(1), 0, (length,))
    assert diskless.node.discard([damage]) == 0, "it is whole"
    assert pins(diskless) == 2
    diskless.host.arena.view(int(record["offset"]) + HEADER_BYTES, 1)[:] ^= 1
    assert diskless.node.discard([damage]) == 1
    diskless.pass_time(2)
    assert pins(diskless) == 1
    assert diskless.put(1) == [CellOutcome.STORED], "nothing stands in the way of its repair"
    assert diskless.node.stats().promised_bytes == CELL_BYTES


def test_a_damaged_cell_of_the_disk_is_kept_in_the_arena(world: LifeWorld) -> None:
    world.put_twice(1)
    world.hold(1)
    world.pass_time(2)
    found = world.nvme.find(keys_of(1), cells_of(0))
    world.host.delete(keys_of(1))
    world.disk.flip(8 * (int(found.offsets[0]) + HEADER_BYTES + 5))
    assert world.acquire(1).outcomes.tolist() == [CellOutcome.MISS]
    world.pass_time(2)
    assert world.node.stats().holds == 0
    assert world.put(1) == [CellOutcome.STORED]


def test_erasing_a_tenant_ends_its_holds(diskless: LifeWorld) -> None:
    diskless.put(1)
    diskless.hold(1, handle="a")
    diskless.hold(1, handle="b", tenant=OTHER)
    diskless.life.erase(TENANT)
    assert diskless.life.holds_of(TENANT) == []
    assert len(diskless.life.holds_of(OTHER)) == 1
    assert pins(diskless) == 1


def raised(epoch: int) -> EpochPage:
    return EpochPage(np.frombuffer(TENANT, np.uint8)[None], np.array([epoch], np.uint64))


def handles(world: LifeWorld) -> set[str]:
    return {mark.handle for mark in world.life.holds_of(TENANT)}


def test_an_erasure_that_is_heard_late_ends_only_what_is_of_before(diskless: LifeWorld) -> None:
    """A client that knows of it already may ask a node that does not."""
    diskless.put(1, 2, 3)
    for epoch, handle in enumerate(("first", "second", "third")):
        reply = diskless.hold(epoch + 1, handle=handle, tenant_epoch=epoch)
        assert reply.outcome is HoldOutcome.GRANTED
    for epoch, left in ((1, {"second", "third"}), (1, {"second", "third"}), (2, {"third"})):
        assert diskless.life.raise_epochs(raised(epoch))
        assert handles(diskless) == left
    assert diskless.life.raise_epochs(raised(1)), "overtaken by a later one"
    assert handles(diskless) == {"third"}
    assert pins(diskless) == 1
    diskless.restart()
    assert handles(diskless) == {"third"}, "its file says so"
    assert diskless.life.erase(TENANT) == 3
    assert handles(diskless) == set()
    assert pins(diskless) == 0


def test_nothing_is_promised_in_an_epoch_that_is_over(diskless: LifeWorld) -> None:
    diskless.put(1, 2)
    assert diskless.life.raise_epochs(raised(2))
    assert diskless.hold(1, tenant_epoch=1).outcome is HoldOutcome.NOT_HELD
    assert diskless.hold(1, tenant_epoch=2).outcome is HoldOutcome.GRANTED
    assert diskless.hold(2, tenant_epoch=3).outcome is HoldOutcome.GRANTED
    assert pins(diskless) == 1, "a handle's new epoch leaves nothing of the one before"
    assert diskless.hold(1, tenant_epoch=2).outcome is HoldOutcome.NOT_HELD
    assert diskless.life.raise_epochs(raised(3))
    assert handles(diskless) == {"h"}


def test_a_handles_new_epoch_takes_the_budget_of_the_one_before() -> None:
    with shared_folder() as folder:
        world = LifeWorld(folder, has_disk=False, hold_bytes=CELL_BYTES)
        world.put(1, 2)
        assert world.hold(1).outcome is HoldOutcome.GRANTED
        assert world.hold(2).outcome is HoldOutcome.OVER_BUDGET
        assert world.hold(2, tenant_epoch=1).outcome is HoldOutcome.GRANTED
        assert world.node.stats().promised_bytes == CELL_BYTES


def test_a_crash_in_the_middle_of_an_erasure_leaves_no_hold(diskless: LifeWorld) -> None:
    diskless.put(1)
    diskless.hold(1)
    diskless.life.tenants.erase(TENANT)
    assert handles(diskless) == {"h"}
    diskless.restart()
    assert handles(diskless) == set()


def test_a_sealed_node_promises_nothing_and_keeps_its_promises(world: LifeWorld) -> None:
    world.life.keep_company()
    world.put_twice(1)
    world.put(2)
    world.hold(1, 2, ttl_s=600)
    world.restart()
    assert world.hold(1, handle="new").outcome is HoldOutcome.NOT_HELD
    flood(world)
    world.life.unseal()
    assert world.found(1, 2) == [True, True]


def test_a_callers_bugs(diskless: LifeWorld) -> None:
    diskless.put(1)
    for request, said in (
        (HoldRequest(b"acme", "h", keys_of(1), 1, 1000), "tenant_digest"),
        (HoldRequest(TENANT, "", keys_of(1), 1, 1000), "handle"),
        (HoldRequest(TENANT, "é" * (HANDLE_BYTES_MAX // 2 + 1), keys_of(1), 1, 1000), "handle"),
        (HoldRequest(TENANT, "h", keys_of(), 1, 1000), "blocks"),
        (HoldRequest(TENANT, "h", keys_of(1), 1, 0), "ms"),
        (HoldRequest(TENANT, "h", keys_of(1), 0, 1000), "mask"),
        (HoldRequest(TENANT, "h", keys_of(1), 1, 1000, 1, EPOCH_MAX + 1), "epoch"),
    ):
        with pytest.raises(UsageError, match=said):
            diskless.life.hold(request)
    assert diskless.hold(1, 1).held_bytes == CELL_BYTES, "named twice, counted once"


def test_nothing_is_promised_without_a_budget() -> None:
    with shared_folder() as folder:
        world = LifeWorld(folder, has_disk=False)
        world.put(1)
        identity = NodeIdentity("n", 1, "h", str(folder))
        node = Node(identity, world.host, world.clock, hold_bytes=0)
        request = HoldRequest(TENANT, "h", keys_of(1), 1, 1000)
        assert node.life.hold(request).outcome is HoldOutcome.OVER_BUDGET
        assert np.count_nonzero(world.host._pins) == 0
