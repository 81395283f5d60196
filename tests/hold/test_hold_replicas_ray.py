"""On a tier of a real Ray: a chain that is held with a replica outlives its node."""

from functools import partial
from pathlib import Path

import pytest

from kvstore.calls import CopyState
from kvstore.client import Samovar
from kvstore.key import Chain
from tests.hold import prompts
from tests.hold.prompts import right
from tests.hold.two_prompts import KEPT, SPACE, TOKENS, finds_what_was_kept
from tests.ray_tier import eventually, ray_tier

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

KEYS = Chain.of(SPACE, prompts.token_ids(KEPT, TOKENS)).keys


def has_both_copies(client: Samovar) -> bool:
    nodes = client.inspect(KEYS).nodes.values()
    marks = [[mark.state for block in blocks for mark in block.holds] for blocks in nodes]
    return marks == [[CopyState.COMPLETE] * len(KEYS)] * 2


def test_hold_a_replica_on_ray_is_read_when_its_owner_is_killed(tmp_path: Path) -> None:
    with ray_tier(tmp_path) as tier:
        with tier.connect(0) as client:
            tokens = prompts.token_ids(KEPT, TOKENS + 1)
            assert client.put(SPACE, tokens[:TOKENS], right(KEPT)).complete
            assert client.hold(SPACE, tokens, "contract", 3600, replicas=2).granted
            eventually(partial(has_both_copies, client))
        tier.kill_storage(0)
        with tier.connect(1) as client:
            eventually(partial(finds_what_was_kept, client))
