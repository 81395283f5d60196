"""Copies of what is held: who gets them, when they are made anew, and what is never copied."""

import errno
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from kvstore import replication
from kvstore.block import HEADER_BYTES
from kvstore.calls import CopyState, Damage, HoldOutcome, HoldRequest
from kvstore.errors import UsageError
from kvstore.replication import BURST_S, SURVEY_S
from tests.life_world import TENANT, keys_of
from tests.replica_world import GRACE_S, ReplicaWorld
from tests.worlds import PAGE, cells_of

CHAIN = (1, 2, 3)
CELL_BYTES = 2 * PAGE


class Make:
    """Makes worlds, and takes them away again."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack

    def __call__(self, names: str = "ab", **how: Any) -> ReplicaWorld:
        how = {"has_disk": False, "arena_pages": 64, "hold_bytes": 16 * PAGE, **how}
        return ReplicaWorld(self._stack, names, **how)


@pytest.fixture
def make() -> Iterator[Make]:
    with ExitStack() as stack:
        yield Make(stack)


def copied(make: Make, names: str = "ab", **how: Any) -> tuple[ReplicaWorld, str]:
    """A world in which node a holds a chain, and who has the copy."""
    world = make(names, **how)
    world.nodes["a"].put(*CHAIN)
    assert world.nodes["a"].hold(*CHAIN, replicas=2, ttl_s=3600).outcome is HoldOutcome.GRANTED
    world.pass_time(2)
    (partner,) = {name for name, count in world.held(*CHAIN).items() if count} - {"a"}
    assert world.state("a", 1) is CopyState.COMPLETE
    return world, partner


def flood(world: ReplicaWorld, name: str) -> None:
    for number in range(100, 140):
        world.nodes[name].put(number)


def test_a_held_chain_has_a_copy_that_is_held_as_well(make: Make) -> None:
    world, partner = copied(make)
    assert world.found(*CHAIN) == {"a": 3, "b": 3}
    assert world.held(*CHAIN) == {"a": 3, "b": 3}
    for name in "ab":
        assert all(world.nodes[name].above(number) for number in CHAIN), "its bytes are right"
    flood(world, partner)
    assert world.found(*CHAIN)[partner] == 3
    (mark,) = world.nodes["a"].life.holds_of(TENANT)
    assert (mark.copies, mark.replicas) == (2, 2)
    assert world.nodes["a"].node.stats().short_holds == 0
    assert world.nodes["a"].node.stats().copied_cells == 3


def test_nothing_moves_while_both_have_it(make: Make) -> None:
    world, _ = copied(make, "abcd")
    sent = len(world.sent)
    world.pass_time(3 * SURVEY_S)
    assert len(world.sent) == sent
    assert sorted(world.held(*CHAIN).values()) == [0, 0, 3, 3]
    assert sorted(one.node.stats().holds for one in world.nodes.values()) == [0, 0, 1, 1]


@pytest.mark.parametrize("far", ["b", "c", "d"])
def test_a_node_on_another_host_goes_before_those_on_this_one(make: Make, far: str) -> None:
    world = make("abcd")
    world.near = {"b", "c", "d"} - {far}
    world.nodes["a"].put(*CHAIN)
    world.nodes["a"].hold(*CHAIN, replicas=2)
    world.pass_time(2)
    assert world.held(*CHAIN)[far] == 3
    world.near = {"b", "c", "d"}
    world.pass_time(SURVEY_S)
    assert sum(world.held(*CHAIN).values()) == 6, "who has it keeps it"


def test_one_copy_is_one_copy(make: Make) -> None:
    world = make()
    world.nodes["a"].put(*CHAIN)
    world.nodes["a"].hold(*CHAIN)
    world.pass_time(60)
    assert world.held(*CHAIN) == {"a": 3, "b": 0}
    assert world.state("a", 1) is CopyState.SINGLE


def test_what_the_other_node_has_already_is_not_sent(make: Make) -> None:
    world = make()
    world.nodes["a"].put(*CHAIN)
    world.nodes["b"].put(1, 3)
    world.nodes["a"].hold(*CHAIN, replicas=2)
    world.pass_time(2)
    assert [sent.cells for sent in world.sent] == [1]
    assert world.held(*CHAIN) == {"a": 3, "b": 3}


def test_a_hold_over_two_nodes_has_two_copies_of_each_part(make: Make) -> None:
    world = make("abc")
    for name, part in (("a", (1, 2)), ("b", (3, 4))):
        world.nodes[name].put(*part)
        world.nodes[name].hold(*part, replicas=2)
    world.pass_time(2 * SURVEY_S)
    for part in ((1, 2), (3, 4)):
        assert sum(count == 2 for count in world.held(*part).values()) == 2
    assert world.state("a", 1) is world.state("b", 3) is CopyState.COMPLETE


@pytest.mark.parametrize("owner_dies", [True, False])
def test_another_node_gets_the_copy_when_one_is_gone(make: Make, owner_dies: bool) -> None:
    world, partner = copied(make, "abc")
    (third,) = {"b", "c"} - {partner}
    dead, left = ("a", partner) if owner_dies else (partner, "a")
    world.kill(dead)
    world.pass_time(GRACE_S - 1)
    assert world.held(*CHAIN) == {left: 3, third: 0}
    world.pass_time(3)
    assert world.held(*CHAIN) == {left: 3, third: 3}
    assert world.state(left, 1) is CopyState.COMPLETE
    sent = len(world.sent)
    world.restart(dead)
    world.pass_time(3 * SURVEY_S)
    assert len(world.sent) == sent, "a node that comes back has its copy still"


def test_a_node_that_is_back_in_time_costs_nothing(make: Make) -> None:
    world, partner = copied(make, "abc")
    sent = len(world.sent)
    for _ in range(3):
        world.kill(partner)
        world.pass_time(GRACE_S - 2)
        world.restart(partner)
        world.pass_time(SURVEY_S)
    assert len(world.sent) == sent
    assert sorted(world.held(*CHAIN).values()) == [0, 3, 3]


def test_a_standstill_of_our_own_is_nobodys_absence(make: Make) -> None:
    world, partner = copied(make, "abc")
    sent = len(world.sent)
    world.cut.add(frozenset(("a", partner)))
    world.pass_time(100, stands_still={"a", partner})
    world.pass_time(2)
    world.cut.clear()
    world.pass_time(SURVEY_S)
    assert len(world.sent) == sent


def test_a_node_that_comes_back_empty_gets_its_copy_again(make: Make) -> None:
    world, partner = copied(make)
    world.restart(partner, adopt=False)
    assert world.found(*CHAIN)[partner] == 0
    world.pass_time(3)
    assert world.found(*CHAIN) == {"a": 3, "b": 3}
    assert world.held(*CHAIN) == {"a": 3, "b": 3}


def test_an_owner_that_comes_back_empty_is_given_its_blocks(make: Make) -> None:
    world, partner = copied(make)
    world.restart("a", adopt=False)
    assert world.found(*CHAIN) == {"a": 0, partner: 3}
    world.pass_time(3)
    assert world.found(*CHAIN) == {"a": 3, partner: 3}
    assert world.held(*CHAIN) == {"a": 3, partner: 3}


def test_who_has_the_copy_outlives_a_restart(make: Make) -> None:
    world, first = copied(make, "abc")
    world.kill(first)
    world.pass_time(GRACE_S + 2)
    world.kill("a")
    world.restart(first, adopt=False)  # it would be the first choice, and has nothing any more
    world.restart("a")
    sent = len(world.sent)
    world.pass_time(2 * SURVEY_S)
    assert len(world.sent) == sent


def test_who_declines_is_passed_over_openly(make: Make) -> None:
    world = make("abc")
    world.nodes["a"].put(*CHAIN)
    for name in "bc":
        world.nodes[name].put(*range(10, 18))
        assert world.nodes[name].hold(*range(10, 18), handle="own").outcome is HoldOutcome.GRANTED
    world.nodes["a"].hold(*CHAIN, replicas=2, ttl_s=3600)
    world.pass_time(5)
    assert world.state("a", 1) is CopyState.DECLINED
    assert not world.sent, "declined before anything is sent"
    assert world.nodes["a"].node.stats().short_holds == 1
    (mark,) = world.nodes["a"].life.holds_of(TENANT)
    assert (mark.copies, mark.replicas) == (1, 2)
    world.nodes["c"].life.release_hold(TENANT, "own")
    world.pass_time(90)
    assert world.held(*CHAIN) == {"a": 3, "b": 0, "c": 3}
    assert world.state("a", 1) is CopyState.COMPLETE


def test_a_copy_that_does_not_fit_is_declined_before_any_of_it_is_sent(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replication, "SURVEY_BYTES_MAX", CELL_BYTES)
    world = make()
    world.nodes["b"].life.holds.tenant_bytes_max = 2 * CELL_BYTES
    world.nodes["a"].put(*CHAIN)
    world.nodes["a"].hold(*CHAIN, replicas=2)
    world.pass_time(2)
    assert (world.sent, world.held(*CHAIN)) == ([], {"a": 3, "b": 0})
    assert world.state("a", 1) is CopyState.DECLINED


def test_a_long_hold_is_copied_part_by_part(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replication, "SURVEY_BYTES_MAX", CELL_BYTES)
    world, _ = copied(make)
    assert [sent.cells for sent in world.sent] == [1, 1, 1]
    world.nodes["b"].evict_all()
    world.pass_time(SURVEY_S + 1)
    assert len(world.sent) == 3


def test_alone_it_says_so_and_goes_on_when_somebody_comes(make: Make) -> None:
    world = make()
    world.kill("b")
    world.nodes["a"].put(*CHAIN)
    world.nodes["a"].hold(*CHAIN, replicas=2)
    world.pass_time(2)
    assert world.state("a", 1) is CopyState.ALONE
    world.restart("b")
    world.pass_time(3)
    assert world.held(*CHAIN) == {"a": 3, "b": 3}


def test_a_node_that_does_not_answer_surveys_is_gone_in_the_end(make: Make) -> None:
    world = make("abc")
    world.nodes["a"].put(*CHAIN)
    world.nodes["a"].hold(*CHAIN, replicas=2, ttl_s=3600)
    world.is_lost = lambda call: call == "carry"
    world.pass_time(GRACE_S)
    assert not world.sent
    assert world.calls < 40, "it is asked less and less often"
    world.is_lost = lambda call: False
    world.pass_time(6)
    assert sorted(world.held(*CHAIN).values()) == [0, 3, 3]


def test_a_silent_node_is_asked_again_where_there_is_no_other(make: Make) -> None:
    world, partner = copied(make)
    world.restart(partner, adopt=False)
    world.is_lost = lambda call: call == "carry"
    world.pass_time(2 * GRACE_S)
    world.is_lost = lambda call: False
    world.pass_time(6)
    assert world.found(*CHAIN) == {"a": 3, "b": 3}
    assert world.state("a", 1) is CopyState.COMPLETE


def test_what_never_arrives_is_tried_less_often_and_then_elsewhere(make: Make) -> None:
    world = make("abc")
    world.nodes["a"].put(*CHAIN)
    world.nodes["a"].hold(*CHAIN, replicas=2, ttl_s=3600)
    world.is_lost = lambda call: call == "commit"
    world.pass_time(60)
    assert world.state("a", 1) in (CopyState.DECLINED, CopyState.UNDER_WAY)
    assert world.calls < 150
    world.is_lost = lambda call: False
    world.pass_time(90)
    assert world.state("a", 1) is CopyState.COMPLETE


def test_no_more_bytes_a_second_than_the_pace_says(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    rate, parcel = 4 * CELL_BYTES, 2 * CELL_BYTES
    monkeypatch.setattr(replication, "PARCEL_BYTES_MAX", parcel)
    chain, alone = tuple(range(1, 21)), (21, 22, 23)
    world = make(arena_pages=128, hold_bytes=64 * PAGE, bytes_per_s=rate)
    world.nodes["a"].put(*chain, *alone)
    assert world.nodes["a"].hold(*chain, replicas=2).outcome is HoldOutcome.GRANTED
    for number in alone:
        world.nodes["a"].hold(number, handle=f"h{number}", replicas=2)
    began_s = world.clock.now_s
    world.pass_time(20)
    assert world.held(*chain, *alone) == {"a": 23, "b": 23}
    assert sum(sent.cells for sent in world.sent) == 23, "nothing is sent twice"
    for first, start in enumerate(world.sent):
        sent_bytes = 0
        for sent in world.sent[first:]:
            sent_bytes += sent.cells * CELL_BYTES
            passed_s = sent.when_s - start.when_s
            assert sent_bytes <= rate * (passed_s + BURST_S) + parcel
    took_s = world.sent[-1].when_s - began_s
    assert 23 / 4 - 1 <= took_s <= 23 / 4 + 2, "and as many as that"


def test_a_release_frees_both_budgets(make: Make) -> None:
    world, _ = copied(make)
    for name in "ab":
        assert world.nodes[name].life.release_hold(TENANT, "h")
    world.pass_time(2 * SURVEY_S)
    assert world.held(*CHAIN) == {"a": 0, "b": 0}
    for name in "ab":
        assert world.nodes[name].node.stats().promised_bytes == 0


@pytest.mark.parametrize("released", ["a", "partner"])
@pytest.mark.parametrize("restarts", [False, True])
def test_a_release_that_one_node_missed_reaches_it(
    make: Make, released: str, restarts: bool
) -> None:
    world, partner = copied(make)
    there, away = ("a", partner) if released == "a" else (partner, "a")
    world.kill(away)
    assert world.nodes[there].life.release_hold(TENANT, "h")
    if restarts:
        world.kill(there)
        world.restart(there)
    world.restart(away)
    world.pass_time(2)
    assert world.held(*CHAIN) == {"a": 0, "b": 0}


def test_the_same_handle_may_be_held_again_after_a_release(make: Make) -> None:
    world, _ = copied(make)
    for name in "ab":
        world.nodes[name].life.release_hold(TENANT, "h")
    world.pass_time(1)
    world.nodes["a"].hold(*CHAIN, replicas=2)
    world.pass_time(2)
    assert world.held(*CHAIN) == {"a": 3, "b": 3}
    assert world.state("a", 1) is CopyState.COMPLETE


def test_what_is_added_to_a_hold_is_copied_as_well(make: Make) -> None:
    world, _ = copied(make)
    world.nodes["a"].put(4)
    world.nodes["a"].hold(4, replicas=2)
    assert world.state("a", 1) is CopyState.UNDER_WAY
    world.pass_time(2)
    assert world.held(*CHAIN, 4) == {"a": 4, "b": 4}
    assert world.state("a", 1) is CopyState.COMPLETE


def test_a_longer_hold_lasts_longer_on_both(make: Make) -> None:
    world, partner = copied(make)
    world.nodes["a"].hold(*CHAIN, replicas=2, ttl_s=7200)
    world.pass_time(2)
    (mark,) = world.nodes[partner].life.holds_of(TENANT)
    assert mark.remaining_ms > 7_000_000
    world.pass_time(1)
    writes = world.nodes[partner].files.operations
    world.pass_time(2 * SURVEY_S)
    assert world.nodes[partner].files.operations == writes, "a survey is no change"


def test_a_copy_ends_with_its_hold(make: Make) -> None:
    world = make()
    world.nodes["a"].put(*CHAIN)
    world.nodes["a"].hold(*CHAIN, replicas=2, ttl_s=40)
    world.pass_time(5)
    assert world.held(*CHAIN) == {"a": 3, "b": 3}
    world.pass_time(40)
    assert world.held(*CHAIN) == {"a": 0, "b": 0}
    assert pins(world, "a") == pins(world, "b") == 0


def pins(world: ReplicaWorld, name: str) -> int:
    return int(world.nodes[name].host._pins.sum())


def test_a_delete_goes_before_every_copy(make: Make) -> None:
    world, _ = copied(make)
    world.delete("b", 2)
    assert world.found(*CHAIN) == world.held(*CHAIN) == {"a": 2, "b": 2}
    world.pass_time(2 * SURVEY_S)
    assert world.found(2) == {"a": 0, "b": 0}


def test_a_copy_of_what_was_deleted_is_refused(make: Make) -> None:
    world = make()
    world.nodes["a"].put(*CHAIN)
    world.nodes["b"].put(*CHAIN)
    world.delete("b", 2, forward=False)
    world.nodes["a"].hold(*CHAIN, replicas=2, ttl_s=3600)
    world.pass_time(20)
    assert world.found(*CHAIN) == {"a": 3, "b": 2}, "a has not heard of it yet"
    assert world.state("a", 1) is not CopyState.COMPLETE
    world.gossip()
    world.pass_time(90)
    assert world.found(*CHAIN) == {"a": 2, "b": 2}
    assert world.state("a", 1) is CopyState.COMPLETE


def test_a_block_that_was_put_again_after_its_delete_is_copied(make: Make) -> None:
    world = make()
    world.nodes["a"].put(*CHAIN)
    world.delete("b", *CHAIN)
    world.nodes["a"].put(*CHAIN)
    world.nodes["a"].hold(*CHAIN, replicas=2)
    world.pass_time(2)
    assert world.found(*CHAIN) == {"a": 3, "b": 3}


def test_a_delete_while_the_copy_is_written_dooms_it(make: Make) -> None:
    world = make()
    world.nodes["a"].put(*CHAIN)
    world.during_parcel = lambda: None if "b" in told else told.update(world.delete("b", 2))
    told: set[str] = set()
    world.nodes["a"].hold(*CHAIN, replicas=2)
    world.pass_time(30)
    assert world.found(*CHAIN) == {"a": 2, "b": 2}
    assert world.found(2) == {"a": 0, "b": 0}


def test_a_delete_that_is_not_buried_yet_refuses_copies(make: Make) -> None:
    world = make()
    world.nodes["a"].put(*CHAIN)
    deletion = world.nodes["b"].life.delete(keys_of(2))
    world.nodes["a"].hold(*CHAIN, replicas=2)
    world.pass_time(3)
    assert world.found(*CHAIN) == {"a": 3, "b": 2}
    assert world.nodes["b"].life.bury(deletion)
    assert world.nodes["b"].life.newest_deletes(keys_of(2, 3)).tolist() == [deletion.id, 0]


def test_an_erased_tenant_has_no_copies(make: Make) -> None:
    world, partner = copied(make)
    world.cut.add(frozenset("ab"))
    world.nodes[partner].life.erase(TENANT)
    assert world.held(*CHAIN) == {"a": 3, partner: 0}
    world.cut.clear()
    world.pass_time(2 * SURVEY_S)  # no gossip: a survey says so as well
    assert world.held(*CHAIN) == {"a": 0, partner: 0}


def test_a_copy_of_the_new_epoch_is_taken_whichever_node_has_heard_of_it(make: Make) -> None:
    for late in "ab":
        world = make()
        world.nodes["a"].put(*CHAIN)
        world.nodes["a"].hold(*CHAIN, ttl_s=3600, replicas=2, tenant_epoch=1)
        knowing = "b" if late == "a" else "a"
        world.nodes[knowing].life.erase(TENANT)
        world.pass_time(3)
        assert world.held(*CHAIN) == {"a": 3, "b": 3}
        world.gossip()
        world.pass_time(2 * SURVEY_S)
        assert world.held(*CHAIN) == {"a": 3, "b": 3}


def test_a_sealed_node_neither_sends_nor_takes(make: Make) -> None:
    world, partner = copied(make, "abc")
    (third,) = {"b", "c"} - {partner}
    world.kill(third)
    world.kill(partner)
    world.restart(partner)
    assert world.nodes[partner].life.is_sealed, "the third node has not said what it knows"
    sent = len(world.sent)
    world.pass_time(GRACE_S + 5)
    assert len(world.sent) == sent
    assert world.state("a", 1) is CopyState.ALONE
    world.restart(third)
    world.unseal()
    world.pass_time(5)
    assert world.state("a", 1) is CopyState.COMPLETE


def test_what_is_on_the_disk_only_is_copied_too(make: Make) -> None:
    world = make(has_disk=True)
    world.nodes["a"].put_twice(*CHAIN)
    world.nodes["a"].evict_all()
    assert not any(world.nodes["a"].above(number) for number in CHAIN)
    world.nodes["a"].hold(*CHAIN, replicas=2)
    world.pass_time(3)
    assert world.found(*CHAIN) == {"a": 3, "b": 3}
    assert world.held(*CHAIN) == {"a": 3, "b": 3}


def test_what_cannot_be_read_for_a_while_gives_nobody_another_copy(make: Make) -> None:
    world = make("abcd", has_disk=True)
    node = world.nodes["a"]
    node.put_twice(2)
    node.evict_all()
    node.put(1)
    assert node.hold(1, 2, replicas=2, ttl_s=3600).outcome is HoldOutcome.GRANTED
    node.disk.steps.faults["read"] = errno.EIO
    node.acquire(2)
    assert node.found(1, 2) == [True, False]
    world.pass_time(200)
    assert world.state("a", 1) is CopyState.UNDER_WAY
    assert sum(world.held(1).values()) == 2
    assert len(world.sent) < 20
    node.disk.steps.faults.clear()
    world.pass_time(60)
    assert world.state("a", 1) is CopyState.COMPLETE
    assert sum(world.held(2).values()) == sum(world.found(2).values()) == 2


def test_every_call_of_a_copy_may_fail(make: Make) -> None:
    """The N-th call fails, once or from then on for a while; in the end the copy is there."""
    for fails_for_good in (False, True):
        for fail_at in range(1, 12):
            world = make()
            world.nodes["a"].put(*CHAIN)
            world.fail_at, world.fails_for_good = fail_at, fails_for_good
            world.nodes["a"].hold(*CHAIN, replicas=2, ttl_s=3600)
            world.pass_time(5)
            was_reached = world.calls >= fail_at
            world.fail_at = 0
            world.pass_time(40)
            assert world.held(*CHAIN) == {"a": 3, "b": 3}, (fail_at, fails_for_good)
            assert world.state("a", 1) is CopyState.COMPLETE
            if not was_reached:
                break
        else:
            pytest.fail("a copy takes more calls than the sweep has")


@pytest.mark.parametrize("at", [40, HEADER_BYTES + 900], ids=["header", "payload"])
def test_a_damaged_cell_is_dropped_and_not_copied(make: Make, at: int) -> None:
    world = make("abc")
    world.nodes["a"].put(*CHAIN)
    flip(world, "a", 2, at)
    world.nodes["a"].hold(*CHAIN, replicas=2)
    world.pass_time(10)
    assert sorted(world.found(*CHAIN).values()) == [0, 2, 2]
    assert world.nodes["a"].host.stats.damaged == 1
    assert world.state("a", 1) is CopyState.COMPLETE


def test_a_cell_that_was_damaged_comes_back_from_the_copy(make: Make) -> None:
    world, partner = copied(make)
    flip(world, "a", 2, HEADER_BYTES + 900)
    found = world.nodes["a"].lease(world.nodes["a"].session, keys_of(2), cells_of(0), 1000)
    world.nodes["a"].node.release(world.nodes["a"].session, found.lease)
    damage = Damage(keys_of(2).tobytes(), 0, (int(found.lengths[0]),))
    assert world.nodes["a"].node.discard([damage]) == 1
    world.pass_time(SURVEY_S + 2)
    assert world.found(*CHAIN) == world.held(*CHAIN) == {"a": 3, partner: 3}
    assert world.nodes["a"].above(2), "its bytes are right"


def flip(world: ReplicaWorld, name: str, number: int, at: int) -> None:
    tier = world.nodes[name].host
    found = tier.find(keys_of(number), cells_of(0))
    tier.arena.view(int(found.offsets[0]) + at, 1)[0] ^= 1


@pytest.mark.parametrize("replicas", [0, 3])
def test_more_copies_than_there_can_be_are_a_callers_bug(make: Make, replicas: int) -> None:
    world = make("a")
    with pytest.raises(UsageError, match="1 to 2 copies"):
        world.nodes["a"].life.hold(HoldRequest(TENANT, "h", keys_of(1), 1, 1000, replicas))
