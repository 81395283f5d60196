"""Cluster maps: what is refused, look-ups, and who sits beside whom on the ring."""

import pytest

from kvstore.cluster_map import ClusterMap, NodeInfo
from kvstore.errors import UsageError


def node(index: int, name: str | None = None, incarnation: int = 1) -> NodeInfo:
    return NodeInfo(
        index, name or f"node-{index}", "host", incarnation, "[::1]:4000", "h:4001", "/dev/shm/a"
    )


def ring(*indexes: int) -> ClusterMap:
    return ClusterMap.of(1, [node(index) for index in indexes])


def test_sorts_and_finds_nodes() -> None:
    cluster_map = ring(9, 2, 5)
    assert [info.index for info in cluster_map.nodes] == [2, 5, 9]
    assert cluster_map.by_index(5) == cluster_map.by_id("node-5") == node(5)
    assert cluster_map.by_index(3) is None
    assert cluster_map.by_id("node-3") is None


def test_refuses_a_map_that_names_a_node_twice() -> None:
    with pytest.raises(UsageError, match="distinct indexes"):
        ring(1, 1)
    with pytest.raises(UsageError, match="same node_id"):
        ClusterMap.of(1, [node(1, "a"), node(2, "a")])
    with pytest.raises(UsageError, match="sorted"):
        ClusterMap(1, (node(2), node(1)))
    with pytest.raises(UsageError, match="epoch"):
        ClusterMap(-1, ())


def test_says_how_many_tokens_a_block_has() -> None:
    assert ClusterMap(1, ()).block_tokens == 64
    assert ClusterMap.of(1, [node(1)], block_tokens=16).block_tokens == 16
    with pytest.raises(UsageError, match="power of two"):
        ClusterMap(1, (), block_tokens=48)


def test_a_newer_map_of_the_same_tier_replaces_one() -> None:
    of = {name: ClusterMap(5, (), tier_id=name) for name in ("", "ours", "theirs")}
    for held, taken in ((of["ours"], "ours"), (of[""], "ours"), (of[""], "")):
        assert ClusterMap(6, (), tier_id=taken).replaces(held)
        assert not ClusterMap(5, (), tier_id=taken).replaces(held)
    for taken in ("theirs", ""):
        assert not ClusterMap(6, (), tier_id=taken).replaces(of["ours"])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("index", -1),
        ("index", 1 << 16),
        ("node_id", ""),
        ("host_id", ""),
        ("incarnation", 1 << 24),
        ("control", "localhost"),
        ("control", ":80"),
        ("bulk", "h:0"),
        ("bulk", "h:65536"),
    ],
)
def test_refuses_a_malformed_node(field: str, value: object) -> None:
    fields: dict[str, object] = {
        "index": 1,
        "node_id": "a",
        "host_id": "b",
        "incarnation": 0,
        "control": "h:1",
        "bulk": "h:2",
        "arena_folder": "/dev/shm/a",
    }
    NodeInfo(**fields)  # type: ignore[arg-type]
    with pytest.raises(UsageError):
        NodeInfo(**{**fields, field: value})  # type: ignore[arg-type]


def test_ring_neighbours_are_two_on_each_side() -> None:
    cluster_map = ring(*range(10, 20))
    assert cluster_map.ring_neighbours(10) == (11, 12, 18, 19)
    assert cluster_map.ring_neighbours(15) == (13, 14, 16, 17)


def test_small_rings_name_each_other_once() -> None:
    assert ring(4).ring_neighbours(4) == ()
    assert ring(4, 7).ring_neighbours(4) == (7,)
    assert ring(1, 2, 3, 4, 5).ring_neighbours(3) == (1, 2, 4, 5)


def test_ring_reaches_over_skipped_nodes() -> None:
    cluster_map = ring(*range(10))
    assert cluster_map.ring_neighbours(5, frozenset({6, 7})) == (3, 4, 6, 7, 8, 9)
    assert cluster_map.ring_neighbours(5, frozenset(range(10)) - {5}) == (0, 1, 2, 3, 4, 6, 7, 8, 9)


def test_ring_neighbours_are_mutual() -> None:
    cluster_map = ring(1, 3, 4, 9, 12, 13, 20)
    for info in cluster_map.nodes:
        for other in cluster_map.ring_neighbours(info.index):
            assert info.index in cluster_map.ring_neighbours(other)


def test_ring_of_a_stranger_is_refused() -> None:
    with pytest.raises(UsageError, match="not in the map"):
        ring(1, 2).ring_neighbours(3)
