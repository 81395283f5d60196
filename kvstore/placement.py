"""Placement: which nodes' directories are the homes of a span.

Rendezvous hashing: every node scores every span, the highest scores win. A node that joins or
leaves moves only the spans that it wins or held, and two clients with one map always agree.

    score(span, node) = mix64(span ^ XXH3-64(node_id))

Spans are pieces of BLAKE3 keys already, so a mix of the XOR is all that the score needs. Each
span has two homes: with one, a dead node would cut the prefix of every long prompt.
"""

import numpy as np
import numpy.typing as npt

from kvstore.changes import Spans
from kvstore.cluster_map import ClusterMap
from kvstore.mix import mix64

HOMES = 2
_SCORES_AT_ONCE = 1 << 20


def homes_of(spans: Spans, cluster_map: ClusterMap, k: int = HOMES) -> npt.NDArray[np.uint16]:
    """The homes of many spans, best first: uint16 ``[n, min(k, nodes)]`` of node indexes."""
    width = min(k, len(cluster_map.nodes))
    homes = np.empty((len(spans), width), np.uint16)
    step = max(1, _SCORES_AT_ONCE // max(1, len(cluster_map.nodes)))
    for start in range(0, len(spans), step):
        part = spans[start : start + step]
        scores = mix64(part[:, None] ^ cluster_map.name_hashes)
        # The complement turns ascending into descending; stable, so equal scores go by index.
        ranked = np.argsort(~scores, axis=1, kind="stable")[:, :width]
        homes[start : start + step] = cluster_map.indexes[ranked]
    return homes


def homes(span: int, cluster_map: ClusterMap, k: int = HOMES) -> tuple[int, ...]:
    """The homes of one span, best first; none in an empty map."""
    return tuple(homes_of(np.array([span], np.uint64), cluster_map, k)[0].tolist())
