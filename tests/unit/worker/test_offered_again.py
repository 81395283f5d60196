"""What a connector's offers are to a node with a disk: one use for each request, however often.

Real client, node and tiers; the disk is simulated and the clock still. Does not cover: engines.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import numpy as np
import pytest

from kvstore.cell import Grid
from kvstore.client import Samovar
from kvstore.config import ClientConfig
from kvstore.fs import LinuxFileSystem
from kvstore.key import Chain, Tokens
from kvstore.namespace import Namespace
from kvstore.plan import Plan
from kvstore.routes import OneNode
from kvstore.table import SlotState
from kvstore.transport.local import LocalTransport
from tests.behind_world import World, empty_world
from tests.property.client_world import Access
from tests.property.client_world import World as ClientWorld
from tests.unit.worker.fakes import ArrayRows
from tests.worlds import shared_folder
from worker.connector import Connector, Matched, Request
from worker.staging import HostStaging

BLOCK, LAYERS, HEADS, ROW_BYTES = 16, 1, 1, 16
NAMESPACE = Namespace("w", "form", "float32", "gqa", Grid((ROW_BYTES,) * LAYERS, HEADS, BLOCK))
ANSWERED: Tokens = np.arange(100, 100 + 4 * BLOCK, dtype=np.int32)
PROMPT = ANSWERED[: 2 * BLOCK + 5]
BOUNDARY = 2 * BLOCK + 3


@dataclass
class Engines:
    """As many engines as there are caches, on the host of one node with a disk."""

    world: World
    tier: Samovar
    connector: Connector[Plan]
    requests: int = 0

    def request(self, tokens: Tokens = PROMPT, resident: int = 0) -> Request:
        self.requests += 1
        cache = ArrayRows(LAYERS, HEADS, 2 * len(ANSWERED), ROW_BYTES)
        staging = HostStaging(cache)
        return Request(str(self.requests), tokens, staging, (BOUNDARY,), resident)

    def match(self, request: Request) -> Matched:
        matched = self.connector.match_now(request)
        assert isinstance(matched, Matched)
        return matched

    def offer(self, request: Request, tokens: Tokens) -> None:
        self.connector.save(request, tokens)
        self.connector.settle()
        self.world.pass_time(2.0)

    def answer(self, resident: int = 0) -> None:
        """One request as an engine answers it: offered with its first token and at its end."""
        request = self.request(resident=resident)
        self.match(request)
        self.offer(request, PROMPT)
        self.offer(request, ANSWERED)

    def below(self) -> int:
        """How many blocks of the answered prompt are on the disk."""
        keys = Chain.of(NAMESPACE, ANSWERED, [BOUNDARY])
        every = np.concatenate(
            [keys.keys, *(np.frombuffer(k, np.uint8)[None] for k in keys.tails.values())]
        )
        return int(self.world.nvme.find(every, np.zeros(len(every), np.uint8)).held.sum())


@pytest.fixture
def engines() -> Iterator[Engines]:
    with shared_folder() as folder:
        world = empty_world(folder)
        access = Access(cast(ClientWorld, world))
        routes = OneNode(
            access, LocalTransport.open(LinuxFileSystem(), folder), world.host.table, BLOCK
        )
        with Samovar(routes, world.clock, ClientConfig()) as tier:
            connector = Connector(tier, NAMESPACE, world.clock)
            yield Engines(world, tier, connector)
            connector.close()


def test_an_answered_prompt_is_not_written_to_the_disk_for_that(engines: Engines) -> None:
    engines.answer()
    assert engines.world.node.stats().host.held_cells == 5
    assert engines.below() == 0


def test_what_another_request_reads_is_written(engines: Engines) -> None:
    engines.answer()
    assert engines.match(engines.request()).tokens == BOUNDARY
    engines.tier.close()  # waits for the touch, which a reader does not wait for
    engines.world.pass_time(2.0)
    assert engines.below() == 3


def test_what_another_request_has_itself_is_written(engines: Engines) -> None:
    engines.answer()
    engines.answer(resident=len(PROMPT) - 1)
    assert engines.below() == 5


def test_what_is_offered_behind_a_known_prefix_is_not_written(engines: Engines) -> None:
    engines.offer(engines.request(), PROMPT)
    engines.offer(engines.request(ANSWERED), ANSWERED)
    assert engines.below() == 3


def test_a_prompt_stays_as_young_as_its_answer(engines: Engines) -> None:
    request = engines.request()
    engines.offer(request, PROMPT)
    engines.offer(engines.request(ANSWERED + 1), ANSWERED + 1)
    engines.offer(request, ANSWERED)
    records = engines.world.host.table.slots
    chain = Chain.of(NAMESPACE, ANSWERED)
    found = engines.world.host.find(chain.keys, np.zeros(chain.blocks, np.uint8))
    stamps = records["stamp"][found.slots].tolist()
    assert (records["state"][found.slots] == SlotState.COMMITTED).all()
    assert stamps == sorted(stamps, reverse=True), "a child is never younger than its parent"
