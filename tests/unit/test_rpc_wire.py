"""Packed arrays and conversions: what comes out is what went in, and nothing broken gets in."""

from dataclasses import fields, replace

import numpy as np
import pytest

from kvstore.calls import (
    MAX_CELLS_PER_CALL,
    CarryReply,
    CarryRequest,
    HoldOutcome,
    NodeIdentity,
    NodeStats,
)
from kvstore.changes import Changes, Digest
from kvstore.cluster_map import ClusterMap
from kvstore.directory import Announcement, Answer, Reception
from kvstore.errand import Done, Errand
from kvstore.holders import Located
from kvstore.membership import Heartbeat
from kvstore.rpc import cluster_pb2, convert, directory_pb2, life_messages, wire
from kvstore.tiers.nvme.spill import NvmeStats
from kvstore.tiers.stats import HostStats
from tests.served import reserve_request, some_keys, two_nodes


def test_arrays_are_little_endian_whatever_their_layout() -> None:
    array = np.array([1, 2, 1 << 40, 4], np.uint64)
    assert wire.pack(array, np.uint64) == b"".join(int(x).to_bytes(8, "little") for x in array)
    assert wire.pack(array[::2], np.uint64) == wire.pack(array[::2].copy(), np.uint64)
    assert wire.pack(array.astype(">u8"), np.uint64) == wire.pack(array, np.uint64)
    assert wire.unpack(wire.pack(array, np.uint64), np.uint64, 4, "x").tolist() == array.tolist()


@pytest.mark.parametrize("size", [0, 7, 9, 16])
def test_a_wrong_number_of_bytes_is_invalid(size: int) -> None:
    with pytest.raises(wire.WireFault, match="slots has") as fault:
        wire.unpack(bytes(size), np.uint64, 1, "slots")
    assert fault.value.outcome == cluster_pb2.INVALID


def test_keys_are_whole_and_bounded() -> None:
    keys = some_keys(3)
    assert np.array_equal(wire.unpack_keys(wire.pack(keys, np.uint8), 3), keys)
    with pytest.raises(wire.WireFault) as fault:
        wire.unpack_keys(bytes(33), 3)
    assert fault.value.outcome == cluster_pb2.INVALID
    with pytest.raises(wire.WireFault) as fault:
        wire.unpack_keys(bytes(4 * 32), 3)
    assert fault.value.outcome == cluster_pb2.TOO_MANY_KEYS


def test_the_largest_messages_fit() -> None:
    cell_bytes = 32 + 1 + 4 + 4 + 4 + 8 + 1 + 1 + 4 + 8 + 8
    assert MAX_CELLS_PER_CALL * cell_bytes < wire.MESSAGE_BYTES_MAX
    assert wire.PROBES_MAX * 32 < wire.MESSAGE_BYTES_MAX


def test_maps_go_there_and_back() -> None:
    for cluster_map in (ClusterMap(0, ()), two_nodes(5), ClusterMap(1, (), block_tokens=16)):
        assert convert.map_from_message(convert.map_to_message(cluster_map)) == cluster_map


def test_a_map_that_cannot_be_is_invalid() -> None:
    message = convert.map_to_message(two_nodes(5))
    message.nodes[1].index = message.nodes[0].index
    with pytest.raises(wire.WireFault, match="distinct indexes"):
        convert.map_from_message(message)
    message.nodes[1].index = 1 << 20
    with pytest.raises(wire.WireFault, match="index"):
        convert.map_from_message(message)
    message = convert.map_to_message(two_nodes(5))
    message.block_tokens = 0
    with pytest.raises(wire.WireFault, match="block_tokens"):
        convert.map_from_message(message)


def test_node_sets_heartbeats_and_hellos_go_there_and_back() -> None:
    assert convert.nodes_from_bytes(convert.nodes_to_bytes({9, 0, 65535})) == {0, 9, 65535}
    beat = Heartbeat(3, 4, 5, ((1, 2), (6, 1 << 23)))
    assert convert.beacon_from_message(convert.beacon_to_message(beat)) == beat
    identity = NodeIdentity("n", 2, "h", "/folder")
    hello = convert.Hello(identity, 1 << 40, "127.0.0.1:5", two_nodes(1), has_disk=True)
    assert convert.hello_from_message(convert.hello_to_message(hello)) == hello


def test_suspects_without_incarnations_are_invalid() -> None:
    message = convert.beacon_to_message(Heartbeat(3, 4, 5, ((1, 2),)))
    message.suspect_incarnations = b""
    with pytest.raises(wire.WireFault, match="suspect_incarnations"):
        convert.beacon_from_message(message)


def test_reserve_requests_go_there_and_back() -> None:
    request = reserve_request(5, some_keys(4))
    back = convert.reserve_from_message(convert.reserve_to_message(request, incarnation=9))
    assert (back.session, back.operation) == (5, 1)
    for name in ("keys", "cells", "lengths", "tokens", "depths", "spans"):
        assert np.array_equal(getattr(back, name), getattr(request, name)), name


@pytest.mark.parametrize("ttl_s", [None, 0, 10])
def test_no_word_about_a_blocks_life_is_not_the_same_as_no_end(ttl_s: int | None) -> None:
    request = replace(reserve_request(5, some_keys(1)), ttl_s=ttl_s)
    message = convert.reserve_to_message(request, incarnation=9)
    assert convert.reserve_from_message(message).ttl_s == ttl_s


@pytest.mark.parametrize("name", ["keys", "cells", "lengths", "tokens", "depths", "spans"])
def test_a_short_column_is_invalid(name: str) -> None:
    message = convert.reserve_to_message(reserve_request(5, some_keys(4)), incarnation=9)
    setattr(message, name, getattr(message, name)[:-1])
    with pytest.raises(wire.WireFault) as fault:
        convert.reserve_from_message(message)
    assert fault.value.outcome == cluster_pb2.INVALID


def test_burials_go_with_copies_only() -> None:
    request = reserve_request(5, some_keys(3))
    message = convert.reserve_to_message(request, incarnation=9)
    assert convert.reserve_from_message(message).burials is None
    copies = replace(request, burials=np.array([0, 7, (1 << 64) - 1], np.uint64))
    message = convert.reserve_to_message(copies, incarnation=9)
    back = convert.reserve_from_message(message).burials
    assert back is not None
    assert back.tolist() == [0, 7, (1 << 64) - 1]
    message.burials = message.burials[:-8]
    with pytest.raises(wire.WireFault, match="burials"):
        convert.reserve_from_message(message)


def test_what_is_carried_goes_there_and_back() -> None:
    request = CarryRequest(
        b"t" * 16, "räder", "node-ü", some_keys(2), np.array([0, 63], np.uint8),
        np.array([1, 1 << 40], np.uint64), 5, 6, "node-é", (1 << 64) - 1, 8, 9,
    )  # fmt: skip
    message = life_messages.carry_to_message(request)
    back = life_messages.carry_from_message(message)
    for field in fields(CarryRequest):
        name = field.name
        assert np.array_equal(getattr(back, name), getattr(request, name)), name
    message.sizes_bytes = message.sizes_bytes[:-1]
    with pytest.raises(wire.WireFault, match="sizes_bytes"):
        life_messages.carry_from_message(message)
    reply = CarryReply(HoldOutcome.SEALED, np.array([True, False]))
    answer = life_messages.carried_to_message(reply)
    back_reply = life_messages.carried_from_message(answer, 2)
    assert back_reply.outcome is HoldOutcome.SEALED
    assert back_reply.wanted.tolist() == [True, False]
    with pytest.raises(wire.WireFault, match="wanted"):
        life_messages.carried_from_message(answer, 3)
    answer.outcome = 99
    with pytest.raises(wire.WireFault, match="outcome 99"):
        life_messages.carried_from_message(answer, 2)


def test_errands_go_there_and_back() -> None:
    burials = np.array([0, (1 << 63) - 1], np.uint64)
    errand = Errand("h:1", "h:2", some_keys(2), np.array([0, 63], np.uint8), burials)
    line = errand.pack()
    assert line.count(b"\n") == 1
    back = Errand.unpack(line)
    assert (back.control, back.bulk) == ("h:1", "h:2")
    for name in ("keys", "cells", "burials"):
        assert np.array_equal(getattr(back, name), getattr(errand, name)), name
    done = Done(3, "no\nanswer")
    assert done.pack().count(b"\n") == 1
    assert Done.unpack(done.pack()) == done


def test_a_cell_outside_any_grid_is_invalid() -> None:
    with pytest.raises(wire.WireFault, match="cell 64"):
        convert.cells_from_bytes(bytes([63, 64]), 2)


def test_announcements_and_answers_go_there_and_back() -> None:
    changes = Changes(
        some_keys(3),
        np.array([0, 5, 63], np.uint8),
        np.array([1, 2, (1 << 64) - 1], np.uint64),
        np.array([True, False, True]),
    )
    message = convert.announcement_to_message(Announcement(2, 3, 4, 5, changes), map_epoch=6)
    back = convert.announcement_from_message(message)
    assert (back.node, back.incarnation, back.stream, back.sequence) == (2, 3, 4, 5)
    for name in ("keys", "cells", "spans", "added"):
        assert np.array_equal(getattr(back.changes, name), getattr(changes, name)), name
    answer = Answer(Reception.GAP, 3, 4, 5, Digest(6, bytes(range(32))))
    assert convert.answer_from_message(convert.answer_to_message(answer)) == answer


def test_an_unknown_reception_is_invalid() -> None:
    with pytest.raises(wire.WireFault, match="reception 99"):
        convert.answer_from_message(directory_pb2.AnnounceReply(reception=99))


def test_locations_go_there_and_back() -> None:
    located = Located(
        np.array([2, 0, 1], np.uint16),
        np.array([1, 9, 65535], np.uint16),
        np.array([1, 1 << 63, 3], np.uint64),
    )
    message = convert.located_to_message(located)
    back = convert.located_from_message(message, 3)
    for name in ("counts", "nodes", "masks"):
        assert np.array_equal(getattr(back, name), getattr(located, name)), name
    message.counts = wire.pack([2, 0, 2], np.uint16)
    with pytest.raises(wire.WireFault, match="nodes"):
        convert.located_from_message(message, 3)


def test_counters_of_another_release_do_no_harm() -> None:
    stats = NodeStats(HostStats(capacity_bytes=1 << 40, stored=3), NvmeStats(loaded=5), 1, 2, 4)
    message = convert.stats_to_message(stats)
    assert convert.stats_from_message(message) == stats
    message.counters["of_the_future"] = 1
    del message.counters["stored"]
    assert convert.stats_from_message(message).host == HostStats(capacity_bytes=1 << 40)
