"""Placement: agreed, spread, and moved by nothing but a node that comes or goes."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.cluster_map import ClusterMap, NodeInfo
from kvstore.placement import homes, homes_of

SPANS = np.random.default_rng(7).integers(0, 1 << 63, 2000).astype(np.uint64)


def node(index: int, incarnation: int = 1) -> NodeInfo:
    return NodeInfo(index, f"node-{index}", "host", incarnation, "h:1", f"h:{1 + index}", "/a")


indexes = st.sets(st.integers(0, 60), min_size=1, max_size=12)


@settings(max_examples=50, deadline=None)
@given(indexes, st.integers(0, 2**64 - 1), st.integers(1, 4))
def test_scalar_and_vector_agree(chosen: set[int], span: int, k: int) -> None:
    cluster_map = ClusterMap.of(1, map(node, chosen))
    alone = homes(span, cluster_map, k)
    among = homes_of(np.append(SPANS[:5], np.uint64(span)), cluster_map, k)
    assert alone == tuple(among[-1].tolist())
    assert len(set(alone)) == min(k, len(chosen))
    assert set(alone) <= chosen


@settings(max_examples=30, deadline=None)
@given(indexes, st.integers(61, 70))
def test_a_joining_node_takes_only_its_share(chosen: set[int], joining: int) -> None:
    before = homes_of(SPANS, ClusterMap.of(1, map(node, chosen)))
    after = homes_of(SPANS, ClusterMap.of(2, map(node, chosen | {joining})))
    for old, new in zip(before.tolist(), after.tolist(), strict=True):
        assert set(new) - {joining} <= set(old)
    share = float((after == joining).any(axis=1).mean())
    expected = min(1.0, 2 / (len(chosen) + 1))
    assert abs(share - expected) < 0.08


@settings(max_examples=20, deadline=None)
@given(indexes)
def test_a_restart_moves_nothing(chosen: set[int]) -> None:
    before = homes_of(SPANS, ClusterMap.of(1, map(node, chosen)))
    after = homes_of(SPANS, ClusterMap.of(9, [node(index, 5) for index in chosen]))
    assert (before == after).all()
