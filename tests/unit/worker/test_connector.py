"""The connector against a tier in memory, on host rows and on a device that defers its copies."""

import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from dataclasses import replace

import numpy as np
import pytest

from kvstore.cell import Grid
from kvstore.clock import ManualClock
from kvstore.errors import UsageError
from kvstore.key import Tokens
from kvstore.namespace import Namespace
from tests.unit.worker.fakes import ArrayRows, DeferredStaging, FakePlan, MemoryTier
from worker import connector
from worker.connector import Abandoned, AskAgain, Connector, Matched, Request
from worker.staging import HostStaging, Staging

LAYERS, HEADS, CAPACITY, ROW_BYTES, BLOCK = 2, 2, 128, 4, 16
NAMESPACE = Namespace("w", "form", "float32", "gqa", Grid((ROW_BYTES,) * LAYERS, HEADS, BLOCK))
PROMPT: Tokens = np.arange(70, dtype=np.int32)


class World:
    """One connector and the engine caches round it."""

    def __init__(self, staging_for: Callable[[ArrayRows], Staging]) -> None:
        self.clock = ManualClock()
        self.tier = MemoryTier(LAYERS)
        self.connector: Connector[FakePlan] = Connector(self.tier, NAMESPACE, self.clock)
        self.staging_for = staging_for
        self.ids = iter(range(1000))

    def cache(self, seed: int | None = None) -> ArrayRows:
        """An engine's cache, filled with computed-looking KV or empty."""
        rows = ArrayRows(LAYERS, HEADS, CAPACITY, ROW_BYTES)
        if seed is not None:
            random = np.random.default_rng(seed)
            rows.array[:] = random.integers(0, 256, rows.array.shape, np.uint8)
        return rows

    def request(
        self,
        cache: ArrayRows,
        tokens: Tokens = PROMPT,
        boundaries: tuple[int, ...] = (),
        resident: int = 0,
    ) -> Request:
        staging = self.staging_for(cache)
        return Request(str(next(self.ids)), tokens, staging, boundaries, resident)

    def saved(self, boundaries: tuple[int, ...] = ()) -> ArrayRows:
        """The cache of an engine whose KV of ``PROMPT`` the tier has."""
        cache = self.cache(seed=1)
        self.connector.save(self.request(cache, boundaries=boundaries), PROMPT)
        self.connector.settle()
        return cache

    def loaded(self, request: Request) -> Matched:
        """Match and load, as an engine that waits does."""
        matched = self.connector.match_now(request)
        assert isinstance(matched, Matched)
        self.connector.load(request, matched)
        return matched


@pytest.fixture(params=[HostStaging, DeferredStaging.over], ids=["host", "deferred"])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    world = World(request.param)
    yield world
    world.connector.close()


@pytest.mark.parametrize(
    ("boundaries", "tokens"), [((), 64), ((64,), 64), ((67,), 67), ((3, 67), 67), ((70,), 69)]
)
def test_a_second_engine_gets_what_the_first_computed(
    world: World, boundaries: tuple[int, ...], tokens: int
) -> None:
    source = world.saved(boundaries)
    target = world.cache()
    matched = world.loaded(world.request(target, boundaries=boundaries))
    assert matched == Matched(tokens, local=tokens, remote=0, kept=0)
    np.testing.assert_array_equal(target.array[:, :, :tokens], source.array[:, :, :tokens])
    assert not target.array[:, :, 70:].any()


def test_the_first_match_never_waits(world: World) -> None:
    world.saved()
    world.tier.gate = threading.Event()
    request = world.request(world.cache())
    assert world.connector.match(request) == AskAgain()
    assert world.connector.match(request) == AskAgain()
    world.tier.gate.set()
    assert world.connector.match_now(request) == Matched(64, 64, 0, kept=0)
    assert world.tier.lookups == 2  # one by the save, one for all matches


def test_sources_are_told_apart(world: World) -> None:
    world.saved()
    world.tier.source = "remote"
    assert world.loaded(world.request(world.cache())) == Matched(64, 0, 64, kept=0)


def test_a_match_leaves_the_last_token_to_run(world: World) -> None:
    world.saved()
    matched = world.loaded(world.request(world.cache(), tokens=PROMPT[:64]))
    assert matched.tokens == 63


def test_what_the_engine_has_itself_is_not_fetched(world: World) -> None:
    world.saved()
    own = world.cache(seed=2)
    before = own.array.copy()
    assert world.loaded(world.request(own, resident=65)) == Matched(0, 0, 0, kept=65)
    np.testing.assert_array_equal(own.array, before)


def test_the_tier_is_not_asked_for_less_than_a_block(world: World) -> None:
    request = world.request(world.cache(), resident=60)
    assert world.loaded(request) == Matched(0, 0, 0, kept=60)
    assert world.tier.lookups == 0


def test_the_tier_is_asked_where_it_has_more_than_the_engine(world: World) -> None:
    world.saved((67,))
    request = world.request(world.cache(), boundaries=(67,), resident=60)
    assert world.loaded(request) == Matched(19, 19, 0, kept=48)


@pytest.mark.parametrize("resident", [16, 17, 31, 32, 40])
def test_only_blocks_behind_the_own_tokens_are_loaded(world: World, resident: int) -> None:
    source = world.saved()
    own = world.cache(seed=2)
    before = own.array.copy()
    kept = resident // BLOCK * BLOCK
    matched = world.loaded(world.request(own, resident=resident))
    assert matched == Matched(64 - kept, 64 - kept, 0, kept=kept)
    assert matched.warm == 64
    assert world.tier.loaded == [tuple(range(kept, 64, BLOCK))]
    np.testing.assert_array_equal(own.array[:, :, :kept], before[:, :, :kept])
    np.testing.assert_array_equal(own.array[:, :, kept:64], source.array[:, :, kept:64])
    np.testing.assert_array_equal(own.array[:, :, 64:], before[:, :, 64:])


def test_a_prefix_that_arrives_short_is_admitted_short(world: World) -> None:
    world.saved()
    world.tier.deliver_tokens = 48
    assert world.loaded(world.request(world.cache(), resident=40)) == Matched(16, 16, 0, kept=32)


def test_of_a_prefix_that_does_not_arrive_the_own_tokens_remain(world: World) -> None:
    world.saved()
    world.tier.deliver_tokens = 0
    assert world.loaded(world.request(world.cache(), resident=40)) == Matched(0, 0, 0, kept=32)


def test_only_what_the_tier_lacks_is_put_and_the_rest_is_touched(world: World) -> None:
    cache = world.saved()
    longer: Tokens = np.arange(100, dtype=np.int32)
    world.connector.save(world.request(cache, tokens=longer), longer)
    world.connector.settle()
    assert world.tier.put_from == [0, 64]
    assert world.tier.touched == [(0, 0), (0, 64)]
    assert world.loaded(world.request(world.cache(), tokens=longer)).tokens == 96


def test_a_save_is_in_the_background(world: World) -> None:
    world.tier.put_gate.clear()
    world.connector.save(world.request(world.cache(seed=1)), PROMPT)
    assert not world.tier.blocks
    world.tier.put_gate.set()
    world.connector.settle()
    assert len(world.tier.blocks) == 4


def test_a_failing_tier_is_a_miss_and_is_logged_once_and_once_when_back(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.tier.error = OSError("no route")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            missed = world.loaded(world.request(world.cache(), resident=5))
            assert missed == Matched(0, 0, 0, kept=5)
        world.connector.save(world.request(world.cache(seed=1)), PROMPT)
        world.connector.settle()
        assert [record.message for record in caplog.records] == [
            "tier degraded: a load failed with OSError: no route"
        ]
        world.tier.error = None
        world.saved()
        assert world.loaded(world.request(world.cache())).tokens == 64
    assert [record.message for record in caplog.records][1:] == ["tier answers again"]


def test_a_transfer_that_fails_half_way_leaves_the_own_blocks_before_it(world: World) -> None:
    world.saved()
    own = world.cache(seed=2)
    before = own.array.copy()
    world.tier.get_error = OSError("reset by peer")
    missed = world.loaded(world.request(own, resident=40))
    assert missed == Matched(0, 0, 0, kept=32)
    np.testing.assert_array_equal(own.array[:, :, :32], before[:, :, :32])


def test_what_landed_is_not_lifted_again() -> None:
    world = World(DeferredStaging.over)
    source = world.saved((67,))
    request = world.request(world.cache(), boundaries=(67,))
    assert isinstance(request.staging, DeferredStaging)
    world.loaded(request)
    request.staging.device.array[:, :, 67:70] = source.array[:, :, 67:70]
    world.connector.save(request, PROMPT)
    world.connector.settle()
    assert request.staging.lifted == [(67, 70)]
    np.testing.assert_array_equal(request.staging.host.array[:, :, :70], source.array[:, :, :70])
    world.connector.close()


def test_what_a_failed_transfer_wrote_over_is_lifted_again() -> None:
    world = World(DeferredStaging.over)
    world.saved()
    request = world.request(world.cache(seed=2), tokens=PROMPT + 1)
    world.connector.save(request, request.tokens)
    world.connector.settle()
    assert isinstance(request.staging, DeferredStaging)
    world.tier.get_error = OSError("reset by peer")
    again = replace(request, id="again", tokens=PROMPT, resident=40)
    assert world.loaded(again) == Matched(0, 0, 0, kept=32)
    world.tier.blocks.clear()
    world.connector.save(again, PROMPT)
    world.connector.settle()
    assert request.staging.lifted == [(0, 70), (32, 70)]
    world.tier.get_error = None
    target = world.cache()
    assert world.loaded(world.request(target)).tokens == 64
    stored = request.staging.device.array[:, :, :64]
    np.testing.assert_array_equal(target.array[:, :, :64], stored)
    world.connector.close()


def test_a_bug_of_the_caller_comes_through(world: World) -> None:
    world.tier.error = UsageError("tokens do not fit")
    with pytest.raises(UsageError, match="tokens do not fit"):
        world.connector.match_now(world.request(world.cache()))


def test_a_transfer_that_outlives_its_deadline_is_abandoned(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.saved()
    gate = world.tier.gate = threading.Event()
    request = world.request(world.cache())
    assert world.connector.match(request) == AskAgain()
    world.clock.advance(5.5)
    assert world.connector.match(request) == AskAgain()
    world.clock.advance(1.0)
    assert world.connector.match(request) == Abandoned()
    assert "outlived its deadline" in caplog.text
    world.tier.gate = None
    assert world.loaded(world.request(world.cache())).tokens == 64
    gate.set()


def test_answers_that_nobody_asks_for_are_forgotten(world: World) -> None:
    world.saved()
    for _ in range(5):
        request = world.request(world.cache())
        world.connector.match(request)
    wait([load.future for load in world.connector._loads.values()], timeout=30)
    world.clock.advance(100.0)
    assert world.loaded(world.request(world.cache())).tokens == 64
    assert not world.connector._loads


def test_more_transfers_than_a_process_should_have_threads_are_misses(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connector, "LOADS_MAX", 3)
    world.saved()
    gate = world.tier.gate = threading.Event()
    started = [world.request(world.cache()) for _ in range(3)]
    for request in started:
        assert world.connector.match(request) == AskAgain()
    over = world.request(world.cache(), resident=20)
    assert world.connector.match(over) == Matched(0, 0, 0, kept=20)
    gate.set()
    for request in started:
        assert world.loaded(request).tokens == 64
    assert world.loaded(over).tokens == 48


def test_a_tier_that_takes_no_saves_is_offered_only_so_many(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connector, "SAVES_MAX", 2)
    world.tier.put_gate.clear()
    for _ in range(5):
        world.connector.save(world.request(world.cache(seed=1)), PROMPT)
    world.tier.put_gate.set()
    world.connector.settle()
    assert len(world.tier.put_from) == 2


def test_a_request_goes_on_in_the_epoch_in_which_it_began(world: World) -> None:
    world.saved()
    world.tier.epoch = 1
    assert world.loaded(world.request(world.cache())).tokens == 0, "another epoch, other keys"
    cache = world.cache(seed=1)
    old = world.request(cache)
    world.loaded(old)
    world.tier.epoch = 2
    world.connector.save(old, PROMPT)
    world.connector.settle()
    assert world.loaded(world.request(world.cache())).tokens == 0, "computed before the erasure"
    world.connector.save(world.request(cache), PROMPT)
    world.connector.settle()
    assert world.loaded(world.request(world.cache())).tokens == 64


def test_a_request_that_is_saved_twice_stays_in_its_epoch(world: World) -> None:
    request = world.request(world.cache(seed=1))
    world.connector.save(request, PROMPT[:50])
    world.connector.settle()
    world.tier.epoch = 1
    world.connector.save(request, PROMPT)
    world.connector.settle()
    assert world.loaded(world.request(world.cache())).tokens == 0, "computed before the erasure"


def test_what_a_request_has_offered_it_does_not_use_again(world: World) -> None:
    longer: Tokens = np.arange(100, dtype=np.int32)
    request = world.request(world.cache(seed=1), boundaries=(67, 99))
    for tokens in (PROMPT, longer):
        world.connector.save(request, tokens)
        world.connector.settle()
    assert world.tier.put_from == [0, 67]
    assert world.tier.put_tails == [(67,), (99,)]
    assert world.tier.touched == [(0, 0), (70, 67)]


def test_what_the_tier_did_not_take_is_offered_whole_again(world: World) -> None:
    request = world.request(world.cache(seed=1), boundaries=(67,))
    world.tier.full = True
    world.connector.save(request, PROMPT)
    world.connector.settle()
    world.tier.full = False
    world.connector.save(request, PROMPT)
    world.connector.settle()
    assert world.tier.put_tails == [(67,), (67,)]
    assert world.loaded(world.request(world.cache(), boundaries=(67,))).tokens == 67


def test_of_requests_that_are_never_saved_only_so_many_are_remembered(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connector, "REQUESTS_MAX", 3)
    for _ in range(5):
        world.loaded(world.request(world.cache()))
    assert len(world.connector._courses) == 3
