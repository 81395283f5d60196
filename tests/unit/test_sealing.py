"""The seal: what a node finds at its start is not found by others before all deletes are known."""

import errno
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvstore import probe
from kvstore.burial_log import BURIAL_LOG_FILE
from kvstore.burials import BurialPage
from kvstore.calls import CellOutcome
from kvstore.deletes import MEND_S
from kvstore.errors import UnavailableError
from kvstore.owed import OWED_FILE
from kvstore.table import KeyTable
from kvstore.tenants import TENANTS_FILE, EpochPage, tenant_digest
from tests.faults import UnreadableFiles
from tests.life_world import TENANT, LifeWorld, keys_of
from tests.worlds import cells_of, shared_folder

OTHER = tenant_digest("other")


def page_of(tenant: bytes, epoch: int) -> EpochPage:
    return EpochPage(np.frombuffer(tenant, np.uint8)[None], np.array([epoch], np.uint64))


@pytest.fixture
def world() -> Iterator[LifeWorld]:
    with shared_folder() as folder:
        yield LifeWorld(folder)


def in_company(world: LifeWorld) -> None:
    """Blocks 1 and 2 are on the disk, 1 and 3 in the arena; then the node is killed."""
    world.life.keep_company()
    world.put_twice(1, 2)
    world.host.delete(keys_of(2))
    world.put(3)
    world.restart()


def test_a_node_that_was_always_alone_is_never_sealed(world: LifeWorld) -> None:
    world.put_twice(1)
    world.restart()
    assert not world.life.is_sealed
    assert world.found(1) == [True]


def test_nothing_is_found_or_announced_before_the_node_is_unsealed(world: LifeWorld) -> None:
    in_company(world)
    mapped = KeyTable.map(world.fs, world.folder)
    assert world.node.stats().is_sealed
    assert world.found(1, 2, 3) == [False] * 3
    assert world.acquire(1, 2, 3).outcomes.tolist() == [CellOutcome.MISS] * 3
    assert not mapped.find(keys_of(1, 3), cells_of(0, 0)).held.any()
    assert world.node.touch(keys_of(1, 2, 3), 1) == 0
    assert len(world.announced()) == 0
    assert len(world.node.drain_changes()) == 0
    epoch = world.life.epoch
    world.life.unseal()
    assert world.life.epoch == epoch + 1
    assert world.found(1, 2, 3) == [True] * 3
    assert mapped.find(keys_of(1, 3), cells_of(0, 0)).held.all()
    assert len(world.announced()) == 3
    assert len(world.node.drain_changes()) == 0, "the snapshot says it"
    world.life.unseal()
    assert world.life.epoch == epoch + 1, "once"


def test_a_delete_that_was_missed_is_done_under_the_seal(world: LifeWorld) -> None:
    in_company(world)
    ids, ages_ms = np.array([9, 9], np.uint64), np.zeros(2, np.uint64)
    world.life.deletes_from(BurialPage(keys_of(1, 2), ids, ages_ms))
    world.pass_time()
    world.life.unseal()
    assert world.found(1, 2, 3) == [False, False, True]
    assert len(world.life.burials) == 2


def test_writing_goes_on_under_the_seal(world: LifeWorld) -> None:
    in_company(world)
    assert world.put(1, 4) == [CellOutcome.PRESENT, CellOutcome.STORED]
    assert world.put(1, 4) == [CellOutcome.PRESENT, CellOutcome.PRESENT]
    world.pass_time(1)
    assert world.found(4) == [False]
    world.life.unseal()
    assert world.found(1, 2, 3, 4) == [True] * 4
    world.pass_time(1)
    assert world.below(4), "it was used again"


def test_a_node_that_cannot_read_whether_it_had_company_is_sealed(
    world: LifeWorld, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(path: Path) -> bytes | None:
        raise OSError(errno.EIO, "made to fail")

    world.put_twice(1)
    with monkeypatch.context() as broken:
        broken.setattr(world.files, "read", refuse)
        world.restart()
        assert world.life.is_sealed
        assert "whether this node was ever in a map with others" in caplog.text
        world.life.keep_company()
    world.restart()
    assert world.life.is_sealed, "it was written down all the same"


def test_every_start_seals_again_until_the_others_were_heard(world: LifeWorld) -> None:
    in_company(world)
    world.restart()
    assert world.life.is_sealed
    world.life.unseal()
    world.restart()
    assert world.life.is_sealed


@pytest.mark.parametrize("is_native", [True, False])
def test_both_ways_to_look_up_see_the_seal(
    world: LifeWorld, monkeypatch: pytest.MonkeyPatch, is_native: bool
) -> None:
    world.put(1)
    monkeypatch.setattr(probe, "is_native", lambda: is_native)
    mapped = KeyTable.map(world.fs, world.folder)
    for sealed in (True, False, True):
        world.host.table.set_sealed(sealed)
        assert mapped.is_sealed == sealed
        assert mapped.find(keys_of(1), cells_of(0)).held.tolist() == [not sealed]
        assert mapped.find_sealed(keys_of(1), cells_of(0)).held.all()


def test_a_node_that_is_left_out_shows_nothing_from_then_on(world: LifeWorld) -> None:
    world.put_twice(1)
    world.put(2)
    mapped = KeyTable.map(world.fs, world.folder)
    assert world.found(1, 2) == [True] * 2
    epoch = world.life.epoch
    for _ in range(2):
        world.life.seal()
    world.put(3)
    world.pass_time(1)
    assert world.found(1, 2, 3) == [False] * 3
    assert world.acquire(1, 2, 3).outcomes.tolist() == [CellOutcome.MISS] * 3
    assert not mapped.find(keys_of(1, 2, 3), cells_of(0, 0, 0)).held.any()
    assert len(world.announced()) == len(world.node.drain_changes()) == 0
    ids, ages_ms = np.array([9], np.uint64), np.zeros(1, np.uint64)
    world.life.deletes_from(BurialPage(keys_of(2), ids, ages_ms))
    world.pass_time()
    world.life.unseal()
    assert world.life.epoch == epoch + 1
    assert world.found(1, 2, 3) == [True, False, True]
    assert len(world.announced()) == 2


def test_an_empty_node_is_sealed_too() -> None:
    """It may have missed an erasure, and clients would store what is of before."""
    with shared_folder() as folder:
        world = LifeWorld(folder, has_disk=False)
        world.life.keep_company()
        world.life.keep_company()
        world.put(1)
        world.restart(adopt=False)
        assert world.life.is_sealed
        with pytest.raises(UnavailableError, match="not heard from all others"):
            world.life.erase(TENANT)
        world.life.unseal()
        assert world.life.erase(TENANT) == 1
        world.put(1)
        assert world.found(1) == [True]


def test_a_node_that_cannot_read_which_tenants_were_erased_is_sealed_until_it_can() -> None:
    files = UnreadableFiles()
    with shared_folder() as folder:
        world = LifeWorld(folder, has_disk=False, files=files)
        world.put(1, 2)
        world.life.erase(TENANT)
        world.hold(1, handle="new", tenant_epoch=1)
        world.hold(2, handle="other", tenant=OTHER)
        world.life.tenants.erase(OTHER)  # and the hold outlives it, by a crash
        files.away = TENANTS_FILE
        world.restart()
        world.pass_time(1)
        assert world.life.is_sealed
        assert world.found(1) == [False]
        assert len(world.announced()) == 0
        with pytest.raises(UnavailableError, match="before it can be read"):
            world.life.erase(TENANT)
        world.life.unseal()
        assert world.life.is_sealed, "its neighbours may not know what it knew"
        assert not world.life.raise_epochs(page_of(TENANT, 1)), "it can't write that down"
        files.away = ""
        epoch = world.life.epoch
        world.pass_time(0.2)
        assert not world.life.is_sealed
        assert world.life.epoch == epoch + 1, "everything is announced"
        assert world.found(1) == [True]
        assert [mark.handle for mark in world.life.holds_of(TENANT)] == ["new"]
        assert world.life.holds_of(OTHER) == []
        assert world.life.erase(TENANT) == 2


@pytest.mark.parametrize("unreadable", [BURIAL_LOG_FILE, OWED_FILE])
def test_a_node_that_cannot_read_what_was_deleted_is_sealed_until_it_can(unreadable: str) -> None:
    files = UnreadableFiles()
    with shared_folder() as folder:
        world = LifeWorld(folder, files=files)
        world.put(1, 2)
        world.delete(2)
        files.away = unreadable
        world.restart()
        world.pass_time(MEND_S + 1)
        world.life.unseal()
        assert world.life.is_sealed, "its neighbours may not know what it knew"
        files.away = ""
        world.pass_time(MEND_S + 1)
        assert world.found(1, 2) == [True, False]


def test_who_awaits_others_stays_sealed_when_its_file_can_be_read() -> None:
    files = UnreadableFiles()
    with shared_folder() as folder:
        world = LifeWorld(folder, files=files)
        world.life.keep_company()
        world.put(1)
        files.away = TENANTS_FILE
        world.restart()
        files.away = ""
        world.pass_time(0.2)
        assert world.life.tenants.is_read
        assert world.life.is_sealed
        world.life.unseal()
        assert world.found(1) == [True]


def test_a_disk_that_comes_back_in_mid_life_is_not_sealed(world: LifeWorld) -> None:
    in_company(world)
    world.life.unseal()
    world.queue.die()
    world.pass_time(3)
    assert world.found(1, 2) == [True, True]
