"""Readers that pause while what they read is evicted: less than planned, never other bytes."""

from itertools import count

import pytest

from tests.hold.processes import Client, Tier, settles, stats_of
from tests.served import eventually

TOKENS = 160


def press_out(writer: Client, prompt: int) -> None:
    """Fill the arena with other prompts until nothing is left of one."""
    others = count(100)

    def pressed() -> bool:
        writer.stores(next(others), 1024)
        return bool(writer("plan", prompt, TOKENS)["tokens"] == 0)

    eventually(pressed)


@pytest.mark.parametrize("host", ["host-0", "elsewhere"])
@pytest.mark.parametrize("point", ["read", "check"])
def test_hold_a_stopped_reader_whose_blocks_are_evicted_reads_less(
    tier: Tier, point: str, host: str
) -> None:
    node = tier.node()
    tier.publish(node.info)
    writer, reader = tier.client(node), tier.client(node, host)
    writer.stores(1, TOKENS)
    reader.finds(1, TOKENS)
    reader.order("fetch", 1, TOKENS, pause=(point, 2 if point == "check" else 1))
    reader.paused(point)
    reader.freeze()
    press_out(writer, 1)
    reader.thaw()
    fetched = reader.go_on()
    assert fetched["right"]
    if (point, host) == ("check", "elsewhere"):
        assert fetched["tokens"] <= TOKENS  # what was on its way already may count
    else:
        assert fetched["tokens"] == 0
        assert fetched["failures"].get("CORRUPT", 0) == 0, "gone is not damaged"
    writer.stores(1, TOKENS)
    reader.finds(1, TOKENS)
    assert settles(node).host.damaged == 0


def test_hold_a_leased_read_keeps_its_blocks_under_pressure(tier: Tier) -> None:
    node = tier.node()
    tier.publish(node.info)
    writer, reader = tier.client(node), tier.client(node, "elsewhere")
    writer.stores(1, TOKENS)
    reader.finds(1, TOKENS)
    reader.order("fetch", 1, TOKENS, pause=("read", 1), leased=True)
    reader.paused("read")
    for prompt in range(2, 18):
        writer.stores(prompt, 1024)
    assert stats_of(node).host.evicted > 512
    fetched = reader.go_on()
    assert fetched["right"]
    assert fetched["by_source"] == {"local": 0, "remote": TOKENS, "nvme": 0}
    assert settles(node).host.retired == 0
