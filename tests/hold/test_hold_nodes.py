"""Nodes that are killed, starved, full or started twice: their blocks and clients carry on."""

import subprocess
import sys
import threading
from unittest import mock

import psutil

from kvstore.calls import CellOutcome
from kvstore.cluster_map import ClusterMap
from kvstore.key import Chain
from kvstore.placement import homes
from kvstore.rpc import client as rpc_client
from kvstore.rpc.wire import CHANNEL_OPTIONS
from tests.hold import prompts
from tests.hold.processes import StorageNode, Tier, settles, stats_of
from tests.integration import node_process
from tests.served import eventually, fill, reserve_request, some_keys
from tests.source_tree import ROOT

TOKENS = 160
BLOCKS = 10
STARVED_S = 5.0
STANDSTILL_S = 3.0
"""Longer than a session lives without a beat."""


def test_hold_after_kill_9_a_warm_successor_serves_the_same_clients(tier: Tier) -> None:
    node, other = tier.node(0), tier.node(1)
    tier.publish(node.info, other.info)
    writer, reader, far = tier.client(node), tier.client(node), tier.client(other)
    writer.stores(1, TOKENS)
    writer.stores(2, TOKENS)
    far.finds(2, TOKENS)
    writer.order("put", 3, TOKENS, pause=("fill", 2))
    writer.paused("fill")
    reader.order("fetch", 1, TOKENS, pause=("check", 2))
    reader.paused("check")
    far.order("fetch", 2, TOKENS, pause=("read", 1))
    far.paused("read")
    node.kill()
    successor = tier.started(node.restarted())
    assert (successor.info.incarnation, stats_of(successor).host.adopted) == (2, 2 * BLOCKS)
    tier.publish(successor.info, other.info)
    late = writer.go_on()
    assert (late["stored"], late["failed"]) == (0, BLOCKS)
    assert reader.go_on()["right"]
    assert far.go_on()["right"]
    for client in (writer, reader, far):
        client.finds(1, TOKENS)
        client.finds(2, TOKENS)
    eventually(lambda: writer.put(3, TOKENS)["failed"] == 0)
    reader.finds(3, TOKENS)
    far.finds(3, TOKENS)
    assert settles(successor).host.held_cells == 3 * BLOCKS


def test_hold_a_second_node_on_a_folder_is_refused_in_one_sentence(tier: Tier) -> None:
    node = tier.node()
    worker = tier.client(node)
    worker.stores(1, TOKENS)
    words = ["0", "node-0", str(tier.folder / "state-0"), str(tier.folder / "arena-0"), "host-0"]
    second = subprocess.run(
        [sys.executable, "-m", node_process.__name__, *words, "--patience-s=0"],
        cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (second.returncode, second.stdout) == (2, "")
    (sentence,) = second.stderr.splitlines()
    assert f"is in use by process {node.pid}: give this node another folder" in sentence
    worker.stores(2, TOKENS)
    assert [worker.fetch(prompt, TOKENS)["tokens"] for prompt in (1, 2)] == [TOKENS] * 2
    settles(node)


def prompt_at_home(node: int, choice: int, cluster_map: ClusterMap) -> int:
    """A prompt whose first span has the node as its first or second home."""
    for prompt in range(1, 1000):
        chain = Chain.of(prompts.namespace(), prompts.token_ids(prompt, TOKENS))
        if homes(chain.span(0), cluster_map)[choice] == node:
            return prompt
    raise AssertionError("no prompt has this home")


def test_hold_with_one_home_dead_what_lives_is_still_found(tier: Tier) -> None:
    nodes = [tier.node(index) for index in range(3)]
    cluster_map = tier.publish(*(node.info for node in nodes))
    asked = [prompt_at_home(0, choice, cluster_map) for choice in (0, 1)]
    writer, reader = tier.client(nodes[1]), tier.client(nodes[2])
    for prompt in asked:
        writer.stores(prompt, TOKENS)
        reader.finds(prompt, TOKENS)
    nodes[0].kill()
    for prompt in asked:  # before anybody has noticed
        assert reader.fetch(prompt, TOKENS)["tokens"] == TOKENS
    control = tier.control(nodes[2])
    eventually(lambda: control.unreachable == {0})
    for prompt in asked:
        assert reader.fetch(prompt, TOKENS)["tokens"] == TOKENS
        writer.stores(prompt, TOKENS)
    fresh = prompt_at_home(0, 0, cluster_map) + 1000
    writer.stores(fresh, TOKENS)
    reader.finds(fresh, TOKENS)
    settles(nodes[1])


def test_hold_a_full_arena_takes_a_burst_of_four_times_its_size(tier: Tier) -> None:
    node = tier.node()
    writers = [tier.client(node), tier.client(node)]
    reader = tier.client(node)
    reader.stores(1, TOKENS)
    for first in range(2, 34, 2):
        for prompt, writer in enumerate(writers, first):
            writer.order("put", prompt, 1024)
        fetched = reader.fetch(1, TOKENS)
        assert fetched["tokens"] == TOKENS, "what is used stays"
        for writer in writers:
            stored = writer.hear()
            assert stored["stored"] == 64, stored
        stats = stats_of(node).host
        assert stats.held_bytes + stats.retired_bytes <= stats.capacity_bytes
    assert [reader.fetch(prompt, 1024)["tokens"] for prompt in (32, 33)] == [1024] * 2
    stats = settles(node).host
    assert (stats.retired, stats.aborted) == (0, 0)
    assert stats.stored == stats.held_cells + stats.evicted


def starve(node: StorageNode) -> list[psutil.Process]:
    """Stop a node with the process that moves its bytes."""
    process = psutil.Process(node.pid)
    starved = [process, *process.children()]
    for each in starved:
        each.suspend()
    return starved


def test_hold_a_starved_node_is_back_with_all_its_blocks(tier: Tier) -> None:
    nodes = [tier.node(index) for index in range(3)]
    tier.publish(*(node.info for node in nodes))
    writer, reader = tier.client(nodes[1]), tier.client(nodes[0])
    writer.stores(1, TOKENS)
    reader.finds(1, TOKENS)
    control = tier.control(nodes[0])
    starved = starve(nodes[1])
    eventually(lambda: control.unreachable == {1})
    assert reader.fetch(1, TOKENS)["tokens"] == 0, "passed over for now"
    reader.stores(2, TOKENS)
    threading.Event().wait(STARVED_S)
    for each in starved:
        each.resume()
    eventually(lambda: control.unreachable == frozenset())
    reader.finds(1, TOKENS)
    writer.finds(1, TOKENS)
    writer.finds(2, TOKENS)
    eventually(lambda: writer.put(3, TOKENS)["failed"] == 0)
    stats = settles(nodes[1])
    assert (stats.host.held_cells, stats.host.adopted, stats.host.retired) == (2 * BLOCKS, 0, 0)
    assert tier.control(nodes[1]).hello().identity.incarnation == 1


def test_hold_a_nodes_own_standstill_ends_no_session(tier: Tier) -> None:
    node = tier.node()
    # As a client whose patience with a silent connection is longer than the standstill.
    patient = tuple(option for option in CHANNEL_OPTIONS if "keepalive" not in option[0])
    with mock.patch.object(rpc_client, "CHANNEL_OPTIONS", patient):
        control = tier.control(node)
    request = reserve_request(control.session, some_keys(3))
    reply = control.reserve(request)
    digests = fill(node.arena, request, reply)
    node.freeze()
    threading.Event().wait(STANDSTILL_S)
    node.thaw()
    outcomes = control.commit(request.session, reply.slots, reply.generations, digests)
    assert set(outcomes) == {CellOutcome.STORED}
    assert control.session == request.session
    assert settles(node).host.retired == 0
