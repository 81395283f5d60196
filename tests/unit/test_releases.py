"""Releases of holds that have copies: what is over stays over, and what is held again stays held.

However late a message of before is, and whoever missed the release. How copies are made is in
`test_replication`, one node's holds are in `test_holds`.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest

from kvstore.calls import CarryRequest, CopyState, HoldOutcome
from kvstore.errors import UsageError
from kvstore.replication import SURVEY_S
from tests.life_world import TENANT, keys_of
from tests.replica_world import GRACE_S, ReplicaWorld
from tests.worlds import PAGE, cells_of

CHAIN = (1, 2, 3)
LONG_S, SHORT_S = 3600.0, 30.0


@pytest.fixture
def world() -> Iterator[ReplicaWorld]:
    with ExitStack() as stack:
        world = ReplicaWorld(stack, "abc", has_disk=False, arena_pages=64, hold_bytes=16 * PAGE)
        world.near = {"c"}
        for name in "abc":
            world.nodes[name].put(*CHAIN)
        yield world


def hold(world: ReplicaWorld, *numbers: int, at: str = "a", ttl_s: float = LONG_S) -> None:
    reply = world.nodes[at].hold(*numbers, replicas=2, ttl_s=ttl_s)
    assert reply.outcome is HoldOutcome.GRANTED


def copied(world: ReplicaWorld, *numbers: int, ttl_s: float = LONG_S) -> None:
    """Held by a, with the copy at b, which is on another host."""
    hold(world, *numbers, ttl_s=ttl_s)
    world.pass_time(2)
    assert world.held(*numbers) == {"a": len(numbers), "b": len(numbers), "c": 0}


def release(world: ReplicaWorld, names: str = "abc") -> None:
    for name in names:
        world.nodes[name].life.release_hold(TENANT, "h")


def nobody_holds(world: ReplicaWorld) -> bool:
    return not any(world.held(*CHAIN).values())


@pytest.mark.parametrize("late_s", [0.0, 0.6, 60.0, LONG_S / 2])
@pytest.mark.parametrize("restarts", [False, True])
def test_a_message_of_before_the_release_brings_nothing_back(
    world: ReplicaWorld, late_s: float, restarts: bool
) -> None:
    hold(world, *CHAIN)
    world.is_slow = True
    world.pass_time(1)
    release(world)
    world.pass_time(late_s / 2)
    if restarts:
        world.restart("a")
    world.pass_time(late_s / 2)
    world.arrive()
    assert world.held(*CHAIN)["b"] == 3, "it can't know"
    world.pass_time(2)
    assert nobody_holds(world)


def test_a_message_of_before_the_release_adds_nothing_to_a_later_hold(world: ReplicaWorld) -> None:
    hold(world, *CHAIN)
    world.is_slow = True
    world.pass_time(1)
    release(world)
    world.is_slow = False
    copied(world, 1, ttl_s=SHORT_S)
    world.arrive()
    world.pass_time(2)
    assert world.held(*CHAIN) == {"a": 1, "b": 1, "c": 0}
    world.pass_time(SHORT_S)
    assert nobody_holds(world)


def test_a_later_hold_takes_nothing_over_from_one_that_was_released(world: ReplicaWorld) -> None:
    copied(world, *CHAIN)
    world.kill("b")
    release(world, "ac")
    hold(world, 1)
    world.restart("b")
    world.pass_time(2)
    assert world.held(*CHAIN) == {"a": 1, "b": 1, "c": 0}


def test_what_is_held_again_stays_held_where_the_release_was_missed(world: ReplicaWorld) -> None:
    copied(world, *CHAIN)
    world.cut.add(frozenset("ab"))
    release(world, "b")
    hold(world, 1)
    world.cut.clear()
    world.pass_time(2 * SURVEY_S)
    held = world.held(*CHAIN)
    assert held["a"] == held["b"] == 3
    assert world.state("a", 1) is CopyState.COMPLETE


def test_what_is_held_again_after_a_restart_stays_held(world: ReplicaWorld) -> None:
    copied(world, *CHAIN)
    release(world)
    world.restart("a")
    copied(world, *CHAIN)


def assert_over_when_a_is_back(world: ReplicaWorld) -> None:
    """Released at ``b`` while ``a`` is away."""
    world.pass_time(2)
    world.kill("a")
    release(world, "b")
    world.restart("a")
    world.pass_time(2)
    assert nobody_holds(world)


def test_who_has_the_copy_knows_of_a_hold_that_adds_nothing(world: ReplicaWorld) -> None:
    copied(world, *CHAIN)
    hold(world, *CHAIN)
    assert_over_when_a_is_back(world)


def test_who_holds_the_same_itself_ends_the_copy_as_well(world: ReplicaWorld) -> None:
    hold(world, *CHAIN)
    hold(world, *CHAIN, at="b")
    assert_over_when_a_is_back(world)


def test_a_release_is_remembered_for_as_long_as_any_hold_of_its_handle(world: ReplicaWorld) -> None:
    copied(world, *CHAIN)
    world.kill("b")
    release(world, "ac")
    hold(world, 1, ttl_s=SHORT_S)
    release(world, "ac")
    world.pass_time(2 * SHORT_S)
    world.restart("b")
    world.pass_time(2)
    assert nobody_holds(world)


def test_a_third_node_learns_of_a_release_when_the_first_is_lost(world: ReplicaWorld) -> None:
    copied(world, *CHAIN)
    world.kill("a")
    world.is_slow = True
    world.pass_time(GRACE_S + 2)
    release(world, "bc")
    world.arrive()
    assert world.held(*CHAIN) == {"b": 0, "c": 3}
    world.pass_time(2)
    assert nobody_holds(world)


def test_a_clock_that_was_set_back_ends_no_later_hold(world: ReplicaWorld) -> None:
    copied(world, *CHAIN)
    release(world)
    world.cut |= {frozenset("ab"), frozenset("ac")}
    world.pass_time(1)
    hold(world, *CHAIN)
    world.pass_time(1)
    world.kill("b")
    world.clock.wall_now_ms -= 1_000_000
    world.restart("b")
    world.cut.clear()
    world.unseal()
    world.pass_time(3)
    assert world.held(*CHAIN) == {"a": 3, "b": 3, "c": 0}


@pytest.mark.parametrize("lacks", [{"origin": ""}, {"granter": ""}, {"grant": 0}])
def test_a_copy_without_a_grant_is_a_callers_bug(
    world: ReplicaWorld, lacks: dict[str, Any]
) -> None:
    named = {"origin": "b", "granter": "b", "grant": 1, **lacks}
    request = CarryRequest(
        TENANT, "h", keys=keys_of(1), cells=cells_of(0), sizes_bytes=np.array([1], np.uint64),
        more_bytes=0, ttl_ms=1000, released=0, tenant_epoch=0, **named,
    )  # fmt: skip
    with pytest.raises(UsageError, match="an origin and a grant"):
        world.nodes["a"].life.carry(request)
