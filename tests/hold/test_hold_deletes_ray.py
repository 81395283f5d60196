"""On a tier of a real Ray: what was deleted while a node stood still, and after it was killed."""

import os
import signal
from functools import partial
from pathlib import Path

import pytest

from kvstore.client import Samovar
from kvstore.key import Chain
from tests.hold import prompts
from tests.hold.prompts import fetched, right
from tests.hold.two_prompts import GONE, KEPT, SPACE, TOKENS, finds_what_was_kept
from tests.ray_tier import RayTier, eventually, ray_tier

pytestmark = pytest.mark.cluster

KEYS = Chain.of(SPACE, prompts.token_ids(GONE, TOKENS)).keys


def has_lost_the_rest(client: Samovar) -> bool:
    """With all nodes answering, no token of it is found."""
    return not client.inspect(KEYS).silent and fetched(client, GONE, TOKENS) == 0


def store(tier: RayTier, index: int) -> None:
    with tier.connect(index) as client:
        for prompt in (GONE, KEPT):
            tokens = prompts.token_ids(prompt, TOKENS)
            assert client.put(SPACE, tokens, right(prompt)).complete


def stays_away(tier: RayTier) -> None:
    """Every node shows what was kept, to its own host and to others, and nothing of the rest."""
    for index in (0, 1):
        with tier.connect(index) as client:
            eventually(partial(finds_what_was_kept, client))
            eventually(partial(has_lost_the_rest, client))
            assert has_lost_the_rest(client)


def test_hold_a_delete_on_ray_while_a_node_stands_still_and_is_killed(tmp_path: Path) -> None:
    with ray_tier(tmp_path) as tier:
        for index in (0, 1):
            store(tier, index)
        stopped = tier.storage_pid(1)
        os.kill(stopped, signal.SIGSTOP)
        try:
            with tier.connect(0) as client:
                deleted = client.delete(SPACE, prompts.token_ids(GONE, TOKENS))
            assert deleted.pending == (tier.nodes[1].node_id,)
        finally:
            os.kill(stopped, signal.SIGCONT)
        stays_away(tier)
        for index in (1, 0):
            tier.kill_storage(index)
            stays_away(tier)
