"""Placement: fixed vectors, so that two versions of the program agree on the homes of a span."""

import numpy as np

from kvstore.cluster_map import ClusterMap, NodeInfo
from kvstore.placement import homes, homes_of


def cluster(*names: str) -> ClusterMap:
    nodes = [
        NodeInfo(index, name, "host", 1, "h:1", "h:2", "/arena") for index, name in enumerate(names)
    ]
    return ClusterMap(1, tuple(nodes))


def test_published_vectors() -> None:
    cluster_map = cluster("alpha", "beta", "gamma", "delta")
    spans = [0, 1, 2**63, 2**64 - 1, 0x0123456789ABCDEF]
    assert [homes(span, cluster_map) for span in spans] == [(0, 2), (1, 2), (1, 0), (1, 3), (3, 1)]


def test_no_nodes_no_homes() -> None:
    assert homes(5, ClusterMap(0, ())) == ()
    assert homes_of(np.arange(3, dtype=np.uint64), ClusterMap(0, ())).shape == (3, 0)


def test_one_node_is_every_home() -> None:
    assert homes(5, cluster("only")) == (0,)


def test_many_spans_in_parts_equal_them_at_once() -> None:
    cluster_map = cluster(*(f"node-{number}" for number in range(300)))
    spans = np.arange(5000, dtype=np.uint64) << np.uint64(50)
    together = homes_of(spans, cluster_map)
    assert together.shape == (5000, 2)
    assert (together[-7:] == homes_of(spans[-7:], cluster_map)).all()


def test_homes_are_spread() -> None:
    cluster_map = cluster(*(f"node-{number}" for number in range(8)))
    spans = np.random.default_rng(1).integers(0, 1 << 63, 8000).astype(np.uint64)
    held = np.bincount(homes_of(spans, cluster_map).ravel(), minlength=8)
    assert held.min() > 1800
    assert held.max() < 2200
