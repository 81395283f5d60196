"""Deletes: a block is found no more, at once, whatever is done with it, nor after any crash."""

from collections.abc import Iterator

import numpy as np
import pytest

from kvstore import burial_log, burials
from kvstore.burial_log import ROW
from kvstore.burials import BurialPage
from kvstore.calls import DELETE_ID_MAX, DELETE_KEYS_MAX, CellOutcome
from kvstore.errors import UsageError
from kvstore.node import Node
from kvstore.owed import OWED_FILE
from kvstore.table import KeyTable
from kvstore.tiers.nvme.spill import Phase
from tests.life_world import FOLDER, LifeWorld, keys_of
from tests.worlds import cells_of, key_number, new_cell, packed, shared_folder


@pytest.fixture
def world() -> Iterator[LifeWorld]:
    with shared_folder() as folder:
        yield LifeWorld(folder)


@pytest.fixture
def diskless() -> Iterator[LifeWorld]:
    with shared_folder() as folder:
        yield LifeWorld(folder, has_disk=False)


def page_of(delete_id: int, *numbers: int, age_ms: int = 0) -> BurialPage:
    """What a neighbour shows of one delete."""
    count = len(numbers)
    return BurialPage(
        keys_of(*numbers), np.full(count, delete_id, np.uint64), np.full(count, age_ms, np.uint64)
    )


def test_all_cells_of_a_block_are_gone_at_once(diskless: LifeWorld) -> None:
    for cell in (0, 3, 63):
        diskless.put(1, 2, cell=cell)
    deletion = diskless.life.delete(keys_of(1))
    assert deletion.is_done, "there is no disk to wait for"
    assert diskless.life.bury(deletion)
    assert diskless.found(1, 2) == [False, True]
    for cell in (0, 3, 63):
        assert diskless.node.lookup(keys_of(1), 1 << cell) == 0
        assert diskless.node.lookup(keys_of(2), 1 << cell) == 1
    assert diskless.node.stats().host.deleted == 3
    assert {key.tobytes() for key in diskless.announced()} == {key_number(2)}


def test_mapped_readers_miss_it_at_once(diskless: LifeWorld) -> None:
    diskless.put(1)
    mapped = KeyTable.map(diskless.fs, diskless.folder)
    assert mapped.find(keys_of(1), cells_of(0)).held[0]
    diskless.delete(1)
    assert not mapped.find(keys_of(1), cells_of(0)).held[0]


def test_the_change_is_told(diskless: LifeWorld) -> None:
    diskless.put(1)
    diskless.node.drain_changes()
    diskless.delete(1)
    changes = diskless.node.drain_changes()
    assert [key.tobytes() for key in changes.keys] == [key_number(1)]
    assert not changes.added.any()


def test_memory_under_a_lease_is_free_when_the_lease_ends(diskless: LifeWorld) -> None:
    diskless.put(1)
    reply = diskless.acquire(1)
    assert reply.outcomes.tolist() == [CellOutcome.FOUND]
    slot, generation = int(reply.slots[0]), int(reply.generations[0])
    free_bytes = diskless.host.spare_bytes
    diskless.delete(1)
    diskless.pass_time(1)
    assert diskless.found(1) == [False]
    assert diskless.acquire(1).outcomes.tolist() == [CellOutcome.MISS]
    assert int(diskless.host.table.slots["generation"][slot]) > generation, "the reader notices"
    assert diskless.host.spare_bytes == free_bytes, "somebody reads there"
    diskless.node.release(diskless.session, reply.lease)
    diskless.pass_time(1)
    assert diskless.host.spare_bytes > free_bytes
    assert diskless.node.stats().host.held_cells == 0


def test_what_is_being_written_is_lost_to_its_writer(diskless: LifeWorld) -> None:
    new = new_cell(1)
    doomed = diskless.reserve(new)
    diskless.delete(1)
    fresh = diskless.reserve(new)
    assert fresh.outcomes.tolist() == [CellOutcome.RESERVED], "computed after the delete"
    assert diskless.commit(doomed, 0, new) == CellOutcome.LOST
    assert diskless.found(1) == [False]
    assert diskless.commit(doomed, 0, new) == CellOutcome.LOST
    assert diskless.commit(fresh, 0, new) == CellOutcome.STORED
    assert diskless.found(1) == [True]
    diskless.pass_time(1)
    assert diskless.node.stats().host.reserved_cells == 0


@pytest.mark.parametrize("end", ["abort", "abandon", "close"])
def test_a_write_that_was_deleted_can_end_in_any_way(diskless: LifeWorld, end: str) -> None:
    reply = diskless.reserve(new_cell(1))
    diskless.delete(1)
    if end == "close":
        diskless.node.close_session(diskless.session)
    else:
        getattr(diskless.node, end)(diskless.session, reply.slots, reply.generations)
    stats = diskless.node.stats().host
    assert (stats.reserved_cells, stats.held_cells) == (0, 0)
    assert bool(stats.retired_bytes) == (end != "abort")


def test_a_block_can_be_put_again(world: LifeWorld) -> None:
    world.put_twice(1)
    world.delete(1)
    assert world.found(1) == [False]
    world.put_twice(1)
    assert world.found(1) == [True]
    world.restart(adopt=False)
    world.pass_time()
    assert world.found(1) == [True], "the later copy is not the one that was deleted"


def test_it_is_done_when_no_crash_brings_it_back(world: LifeWorld) -> None:
    world.put_twice(1, 2)
    world.queue.is_eager = False
    deletion = world.life.delete(keys_of(1))
    assert world.found(1, 2) == [False, True]
    world.node.behind.poll()
    assert not deletion.is_done
    with pytest.raises(UsageError, match="is_done"):
        world.life.bury(deletion)
    world.queue.is_eager = True
    world.pass_time()
    assert deletion.is_done
    assert world.life.bury(deletion)
    world.restart(adopt=False)
    assert world.found(1, 2) == [False, True]
    assert world.life.burials.get(key_number(1)) is not None


def test_a_disk_that_is_away_wipes_it_when_it_is_back(world: LifeWorld) -> None:
    world.put_twice(1)
    world.queue.die()
    world.node.behind.poll()
    assert world.nvme.phase is Phase.OPENING
    deletion = world.life.delete(keys_of(1))
    world.pass_time(0.2)
    assert not deletion.is_done
    world.pass_time(2)
    assert deletion.is_done
    assert world.found(1) == [False]


def test_a_refused_disk_keeps_no_delete_waiting(world: LifeWorld) -> None:
    world.put_twice(1, 2)
    world.restart(adopt=False, is_refused=True)
    assert world.delete(1).is_done
    world.life.deletes_from(page_of(1, 3))
    world.pass_time()
    assert world.life.burials.get(key_number(3)) is not None


def test_a_delete_that_was_begun_before_the_disk_was_refused_is_done_then(
    world: LifeWorld,
) -> None:
    world.put_twice(1)
    world.queue.die()
    world.node.behind.poll()
    deletion = world.life.delete(keys_of(1))
    assert not deletion.is_done
    world.queue.owner = "node-b"
    world.pass_time(2)
    assert world.nvme.phase is Phase.REFUSED
    assert deletion.is_done
    assert world.life.bury(deletion)


@pytest.mark.parametrize("restarts", [1, 2])
def test_a_disk_that_is_opened_again_has_forgotten_what_was_deleted(
    world: LifeWorld, restarts: int
) -> None:
    world.put_twice(1, 2)
    world.restart(adopt=False, is_refused=True)
    world.delete(1)
    world.pass_time()
    for more in range(restarts, 0, -1):
        world.restart(adopt=False, is_refused=more > 1)
    assert world.found(1, 2) == [False, True], "at once"
    world.pass_time()
    world.put_twice(1)
    world.restart(adopt=False)
    world.pass_time()
    assert world.found(1, 2) == [True, True], "once: the later copy was never deleted"


def test_a_disk_that_is_configured_again_has_forgotten_what_was_deleted(world: LifeWorld) -> None:
    world.put_twice(1, 2)
    world.has_disk = False
    world.restart(adopt=False)
    world.delete(1)
    world.pass_time()
    world.has_disk = True
    world.restart(adopt=False)
    assert world.found(1, 2) == [False, True]


def test_what_a_refused_disk_is_owed_is_no_more_than_what_is_buried(
    world: LifeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(burials, "BURIALS_MAX", 3)
    monkeypatch.setattr(burial_log, "OUTDATED_ROWS_MAX", 4)
    world.put_twice(40)
    world.restart(adopt=False, is_refused=True)
    for number in range(1, 41):
        world.delete(number)
    world.pass_time(2)
    assert len(world.life.burials) == 3
    rows = {name: len(world.files.read(FOLDER / name) or b"") for name in (OWED_FILE, "burials")}
    assert rows[OWED_FILE] == rows["burials"] < 15 * ROW.itemsize
    world.restart(adopt=False)
    assert world.found(40) == [False]


def test_what_a_refused_disk_could_not_be_told_durably_is_not_deleted_yet(
    world: LifeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("full")

    world.put_twice(1)
    world.restart(adopt=False, is_refused=True)
    deletion = world.life.delete(keys_of(1))
    with monkeypatch.context() as full:
        full.setattr(world.files, "append", refuse)
        full.setattr(world.files, "replace", refuse)
        assert not world.life.bury(deletion)
        world.pass_time()
    assert world.life.burials.get(key_number(1)) is None, "else no neighbour could tell of it"
    world.pass_time()
    assert world.life.burials.get(key_number(1)) is not None
    world.restart(adopt=False)
    assert world.found(1) == [False]


def test_what_is_on_its_way_up_never_arrives(world: LifeWorld) -> None:
    world.put_twice(1)
    world.evict_all()
    world.queue.is_eager = False
    promotion = world.node.begin_acquire(keys_of(1), cells_of(0))
    assert not promotion.is_done
    world.life.delete(keys_of(1))
    world.queue.is_eager = True
    world.node.behind.poll()
    assert promotion.is_done
    assert not promotion.loaded.any()
    reply = world.node.acquire(world.session, keys_of(1), cells_of(0), 1000, promotion)
    assert reply.outcomes.tolist() == [CellOutcome.MISS]
    world.node.end_acquire(promotion)
    world.pass_time(1)
    stats = world.node.stats()
    assert (stats.host.held_cells, stats.host.reserved_cells) == (0, 0)
    assert stats.nvme.held_cells == 0


def test_what_is_on_its_way_down_never_arrives(world: LifeWorld) -> None:
    world.put(1)
    world.queue.is_eager = False
    world.put(1)
    world.pass_time(0.1)
    assert not world.queue.is_idle(), "the disk is reading it"
    world.life.delete(keys_of(1))
    world.queue.is_eager = True
    world.pass_time(1)
    assert world.found(1) == [False]
    assert world.node.stats().nvme.held_cells == 0
    assert not world.host._pins.any()


def test_a_neighbours_deletes_are_done_and_buried_without_asking(world: LifeWorld) -> None:
    world.put_twice(1, 2)
    world.put(3)
    world.queue.is_eager = False
    world.life.deletes_from(page_of(77, 1, 3, age_ms=5000))
    world.life.deletes_from(page_of(77, 1, 3, age_ms=5000))
    assert world.found(1, 2, 3) == [False, True, False]
    world.pass_time()
    assert len(world.life.burials) == 0, "not before it is durable"
    world.queue.is_eager = True
    world.pass_time()
    assert len(world.life.burials) == 2
    assert world.life.burials.digest().burials == 2
    page = world.life.burial_page(0, 10)
    assert page.ids.tolist() == [77, 77]
    assert page.ages_ms.min() >= 5000
    assert world.life.delete(keys_of(9)).id > 77


def test_gossip_of_an_old_delete_leaves_a_newer_copy_alone(world: LifeWorld) -> None:
    world.put(1)
    deletion = world.delete(1)
    world.put(1)
    world.life.deletes_from(page_of(deletion.id, 1))
    world.life.deletes_from(page_of(deletion.id - 1, 1))
    assert world.found(1) == [True]
    world.restart()
    world.life.deletes_from(page_of(deletion.id, 1))
    assert world.found(1) == [True]
    world.life.deletes_from(page_of(deletion.id + 1, 1))
    assert world.found(1) == [False]


def test_a_crash_before_the_burial_lets_the_delete_come_again(world: LifeWorld) -> None:
    world.put_twice(1)
    world.queue.is_eager = False
    deletion = world.life.delete(keys_of(1))
    world.restart(adopt=False)
    world.queue.is_eager = True
    world.pass_time()
    assert world.found(1) == [True], "nobody was told that it is deleted"
    world.life.deletes_from(page_of(deletion.id, 1))
    world.pass_time()
    assert world.found(1) == [False]


def test_ids_go_on_after_a_restart(diskless: LifeWorld) -> None:
    first = diskless.delete(1).id
    diskless.clock.wall_now_ms -= 3_600_000
    diskless.restart(adopt=False)
    assert diskless.life.delete(keys_of(2)).id > first


def test_a_log_that_the_disk_refuses_is_said_and_tried_again(
    diskless: LifeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("full")

    deletion = diskless.life.delete(keys_of(1))
    with monkeypatch.context() as full:
        full.setattr(diskless.files, "append", refuse)
        full.setattr(diskless.files, "replace", refuse)
        assert not diskless.life.bury(deletion)
        diskless.pass_time(2)
    assert diskless.life.burials.get(key_number(1)) is not None
    diskless.pass_time(2)
    diskless.restart()
    assert diskless.life.burials.get(key_number(1)) is not None


def test_a_callers_bugs(diskless: LifeWorld) -> None:
    many = packed([key_number(1)] * (DELETE_KEYS_MAX + 1))
    with pytest.raises(UsageError, match="split it"):
        diskless.life.delete(many)
    for delete_id in (0, -1, DELETE_ID_MAX + 1):
        with pytest.raises(UsageError, match="no id of a delete"):
            diskless.life.delete(keys_of(1), delete_id)
    diskless.life.deletes_from(page_of(DELETE_ID_MAX + 1, 1))
    assert diskless.life.delete(keys_of(1)).id <= DELETE_ID_MAX
    assert diskless.life.delete(keys_of()).is_done


def test_a_node_without_a_folder_remembers_while_it_lives(diskless: LifeWorld) -> None:
    node = Node(diskless.node.identity, diskless.host, diskless.clock)
    deletion = node.life.delete(keys_of(1))
    assert node.life.bury(deletion)
    assert node.life.burials.get(key_number(1)) is not None
    assert not node.life.is_sealed
