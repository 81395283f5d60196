"""A chain that is held with a replica outlives any one node, and a delete outlives the replica.

The nodes are real processes, the bytes go over real ports, sent by a process that may be killed. A
node is given up after a second here, so that nobody waits for ten.
"""

from functools import partial
from pathlib import Path

import psutil
import pytest

from kvstore import copier
from kvstore.calls import CopyState, HoldMark
from kvstore.client import Samovar
from kvstore.clock import SystemClock
from kvstore.cluster_map import ClusterMap
from kvstore.key import Chain
from tests.hold import prompts
from tests.hold.processes import StorageNode, Tier, client_of, settles, stats_of
from tests.hold.prompts import right
from tests.served import eventually

TOKENS = 160
BLOCKS = 10
HELD, OTHER = 1, 2
SPACE = prompts.namespace()
TTL_S = 3600
GRACE_S = 1.0
LOOK_UP_S, GET_DEADLINE_S = 2.0, 5.0
SLOW = pytest.mark.slow


def fetched(node: StorageNode, prompt: int) -> int:
    """How many tokens a stranger can read there; their bytes are right, and came in time."""
    clock = SystemClock()
    with client_of(node, "another host") as client:
        began_s = clock.monotonic_s()
        tokens = prompts.fetched(client, prompt, TOKENS, GET_DEADLINE_S)
        assert clock.monotonic_s() - began_s < LOOK_UP_S + GET_DEADLINE_S + 1
        return tokens


def nodes_of(tier: Tier, count: int, folder: Path | None = None) -> list[StorageNode]:
    nodes = [
        tier.node(
            index,
            copy_grace_s=GRACE_S,
            nvme_folder=None if folder is None else folder / str(index),
        )
        for index in range(count)
    ]
    tier.publish(*(node.info for node in nodes))
    return nodes


def hold(node: StorageNode, prompt: int = HELD) -> None:
    with client_of(node) as client:
        tokens = prompts.token_ids(prompt, TOKENS + 1)
        assert client.put(SPACE, tokens[:TOKENS], right(prompt)).complete
        assert client.hold(SPACE, tokens, "contract", TTL_S, replicas=2).granted


def keys_of(prompt: int) -> Chain:
    return Chain.of(SPACE, prompts.token_ids(prompt, TOKENS))


def marks(node: StorageNode) -> list[HoldMark]:
    """The promise as a node knows it, on each block."""
    with client_of(node) as client:
        blocks = client.inspect(keys_of(HELD).keys).nodes[node.info.node_id]
        return [mark for block in blocks for mark in block.holds]


def is_complete(*nodes: StorageNode) -> bool:
    found = [marks(node) for node in nodes]
    return all(
        len(one) == BLOCKS and {mark.state for mark in one} == {CopyState.COMPLETE} for one in found
    )


def carriers(nodes: list[StorageNode], owner: StorageNode) -> list[StorageNode]:
    return [node for node in nodes if node is not owner and len(marks(node)) == BLOCKS]


def has_a_carrier(nodes: list[StorageNode], owner: StorageNode) -> bool:
    return len(carriers(nodes, owner)) == 1 and is_complete(owner, *carriers(nodes, owner))


def test_hold_a_held_chain_outlives_its_node(tier: Tier) -> None:
    nodes = nodes_of(tier, 2)
    hold(nodes[0])
    eventually(partial(is_complete, *nodes))
    assert stats_of(nodes[0]).copied_cells == BLOCKS
    assert stats_of(nodes[1]).host.held_cells == BLOCKS
    children = psutil.Process(nodes[0].pid).children()
    assert nodes[0].child(copier.__name__).pid in {child.pid for child in children}
    nodes[0].kill()
    eventually(lambda: fetched(nodes[1], HELD) == TOKENS)
    eventually(lambda: all(has_ended(child) for child in children))
    eventually(lambda: marks(nodes[1])[0].state is CopyState.ALONE)
    settles(nodes[1])


def test_hold_a_get_uses_the_replica_of_a_node_that_is_dead(tier: Tier) -> None:
    """Asked of a node that has no copy, right after the death: the rest of the tier knows one."""
    nodes = nodes_of(tier, 3)
    hold(nodes[0])
    eventually(partial(has_a_carrier, nodes, nodes[0]))
    (carrier,) = carriers(nodes, nodes[0])
    (asked,) = {*nodes[1:]} - {carrier}
    assert fetched(asked, HELD) == TOKENS
    nodes[0].kill()
    eventually(lambda: fetched(asked, HELD) == TOKENS)


@pytest.mark.parametrize("dies", ["owner", pytest.param("carrier", marks=SLOW)])
def test_hold_a_third_node_gets_the_copy(tier: Tier, dies: str) -> None:
    nodes = nodes_of(tier, 3)
    hold(nodes[0])
    eventually(partial(has_a_carrier, nodes, nodes[0]))
    (carrier,) = carriers(nodes, nodes[0])
    dead, left = (nodes[0], carrier) if dies == "owner" else (carrier, nodes[0])
    (third,) = {*nodes} - {dead, left}
    dead.kill()
    eventually(partial(is_complete, left, third))
    left.kill()
    eventually(lambda: fetched(third, HELD) == TOKENS)


@pytest.mark.slow
def test_hold_the_copying_process_may_be_killed(tier: Tier) -> None:
    nodes = nodes_of(tier, 2)
    hold(nodes[0])
    eventually(partial(is_complete, *nodes))
    for _ in range(2):
        nodes[0].child(copier.__name__).kill()
        nodes[1].kill()
        Path(nodes[1].info.arena_folder, "table").unlink()
        tier.restart(nodes, 1)
        eventually(partial(is_complete, *nodes))
        assert stats_of(nodes[1]).host.held_cells == BLOCKS
    settles(nodes[1])


@pytest.mark.parametrize("on_disk", [False, pytest.param(True, marks=SLOW)])
@pytest.mark.parametrize(
    "down", [pytest.param(0, id="owner down"), pytest.param(1, id="carrier down", marks=SLOW)]
)
def test_hold_a_delete_with_a_replica_elsewhere(
    tier: Tier, tmp_path: Path, down: int, on_disk: bool
) -> None:
    nodes = nodes_of(tier, 2, tmp_path if on_disk else None)
    hold(nodes[0])
    eventually(partial(is_complete, *nodes))
    nodes[down].kill()
    with client_of(nodes[1 - down]) as client:
        tokens = prompts.token_ids(HELD, TOKENS)
        assert client.delete(SPACE, tokens).pending == (f"node-{down}",)
    tier.restart(nodes, down)
    stays_away(nodes)
    for order in ((0, 1), (1, 0)):
        tier.restart_all(nodes, *order)
        stays_away(nodes)


def has_ended(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def is_shown(node: StorageNode) -> bool:
    return not stats_of(node).is_sealed


def stays_away(nodes: list[StorageNode]) -> None:
    for node in nodes:
        eventually(partial(is_shown, node))
        assert fetched(node, HELD) == 0
        assert marks(node) == []
        assert stats_of(node).promised_bytes == 0


def test_hold_a_release_frees_both_budgets_of_a_tier_with_a_secret(
    tier: Tier, tmp_path: Path
) -> None:
    secret = tmp_path / "token"
    secret.write_text("s" * 32)
    secret.chmod(0o600)
    nodes = [tier.node(index, token_file=secret) for index in (0, 1)]
    cluster_map = ClusterMap.of(1, [node.info for node in nodes], prompts.BLOCK_TOKENS)
    for node in nodes:
        tier.control(node, token="s" * 32).set_map(cluster_map)
    with Samovar.connect(
        nodes[0].info.control, host_id=nodes[0].info.host_id, token_file=secret
    ) as client:
        tokens = prompts.token_ids(HELD, TOKENS + 1)
        assert client.put(SPACE, tokens[:TOKENS], right(HELD)).complete
        assert client.hold(SPACE, tokens, "contract", TTL_S, replicas=2).granted
        keys = keys_of(HELD).keys

        def is_held_on_both() -> bool:
            found = client.inspect(keys).nodes.values()
            return [sum(bool(block.holds) for block in blocks) for blocks in found] == [BLOCKS] * 2

        eventually(is_held_on_both)
        assert client.release("contract").found
        assert not any(
            block.holds for blocks in client.inspect(keys).nodes.values() for block in blocks
        )
