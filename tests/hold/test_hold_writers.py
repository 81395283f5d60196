"""Writers that are stopped, fork, die or race: nothing half-written is seen, no slot is stuck."""

import os
import signal

import pytest

from tests.hold.processes import Tier, settles, stats_of
from tests.served import eventually

TOKENS = 160
BLOCKS = 10


@pytest.mark.parametrize("host", ["host-0", "elsewhere"])
def test_hold_a_writer_stopped_in_the_middle_writes_into_no_reused_slot(
    tier: Tier, host: str
) -> None:
    node = tier.node()
    tier.publish(node.info)
    stopped, other = tier.client(node, host), tier.client(node)
    stopped.order("put", 1, TOKENS, pause=("fill", 2))
    stopped.paused("fill")
    assert other.put(1, TOKENS)["busy"] == BLOCKS
    stopped.freeze()
    eventually(lambda: stats_of(node).host.retired == BLOCKS)
    other.stores(1, TOKENS)
    for prompt in range(2, 18):  # twice the arena: its slots are wanted
        other.stores(prompt, 1024)
    other.stores(1, TOKENS)
    stopped.thaw()
    late = stopped.go_on()
    assert (late["stored"], late["failed"]) == (0, BLOCKS), late
    read = [other.fetch(prompt, 1024)["tokens"] for prompt in range(2, 18)]
    assert read[-1] == 1024
    assert other.fetch(1, TOKENS)["tokens"] == TOKENS
    eventually(lambda: stopped.put(18, 64)["stored"] or stopped.put(18, 64)["present"])
    stopped.finds(18, 64)
    stats = settles(node)
    assert stats.host.retired == BLOCKS
    assert other.fetch(17, 1024)["tokens"] == 1024


def test_hold_a_forked_child_can_not_write_and_its_parent_goes_on(tier: Tier) -> None:
    node = tier.node()
    writer = tier.client(node)
    writer.stores(1, TOKENS)
    writer.order("put", 2, TOKENS, pause=("fill", 5))
    writer.paused("fill")
    writer.say(do="fork", stay=False)
    assert writer.paused("fill")["forked"] == {"refused": 3, "signal": signal.SIGSEGV}
    assert writer.go_on()["stored"] == BLOCKS
    assert [writer.fetch(prompt, TOKENS)["tokens"] for prompt in (1, 2)] == [TOKENS] * 2
    assert settles(node).host.retired == 0


def test_hold_reservations_end_with_their_writer_though_a_fork_has_its_sockets(tier: Tier) -> None:
    node = tier.node()
    writer, other = tier.client(node), tier.client(node)
    other.stores(1, TOKENS)
    writer.order("put", 2, TOKENS, pause=("fill", 5))
    writer.paused("fill")
    writer.say(do="fork", stay=True)
    forked = writer.paused("fill")["forked"]
    assert forked["refused"] == 3
    try:
        writer.kill()
        eventually(lambda: stats_of(node).host.retired == BLOCKS)
        other.stores(2, TOKENS)
        assert [other.fetch(prompt, TOKENS)["tokens"] for prompt in (1, 2)] == [TOKENS] * 2
    finally:
        os.kill(forked["pid"], signal.SIGKILL)
    settles(node)


@pytest.mark.parametrize(
    ("point", "passages", "host"),
    [("rows", 1, "host-0"), ("fill", 5, "host-0"), ("fill", 5, "elsewhere")],
)
def test_hold_when_the_first_of_two_writers_dies_the_second_stores(
    tier: Tier, point: str, passages: int, host: str
) -> None:
    node = tier.node()
    tier.publish(node.info)
    first, second, reader = tier.client(node, host), tier.client(node), tier.client(node)
    second.stores(2, TOKENS)
    first.stores(1, 96)
    first.order("put", 1, TOKENS, pause=(point, passages))
    first.paused(point)
    waiting = second.put(1, TOKENS)
    assert (waiting["present"], waiting["busy"], waiting["refused"]) == (6, 4, 0)
    assert reader.fetch(1, TOKENS)["tokens"] == 96, "only what is whole"
    first.kill()
    eventually(lambda: second.put(1, TOKENS)["busy"] == 0)
    assert reader.fetch(1, TOKENS)["tokens"] == TOKENS
    assert reader.fetch(2, TOKENS)["tokens"] == TOKENS
    stats = settles(node)
    assert (stats.host.held_cells, stats.host.retired) == (2 * BLOCKS, 4)
