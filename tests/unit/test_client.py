"""The client on an embedded tier: real arena, real copies, real digests, no server."""

import gc
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvstore.client import Samovar
from kvstore.clock import ManualClock
from kvstore.errors import ConfigError, GeometryError, UsageError
from kvstore.rows import KVRows
from tests.one_prompt import BLOCK, LAYERS, NAMESPACE, PROMPT, Rows, space
from tests.worlds import shared_folder

ARENA_BYTES = 4 << 20


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def tier(clock: ManualClock) -> Iterator[Samovar]:
    with Samovar.open(ARENA_BYTES, clock=clock, block_tokens=BLOCK) as opened:
        yield opened


def got(tier: Samovar, tokens: list[int], boundaries: tuple[int, ...] = ()) -> tuple[int, Rows]:
    rows = Rows(len(tokens))
    plan = tier.longest_prefix(NAMESPACE, tokens, boundaries)
    return tier.get_into(plan, rows).tokens, rows


def test_what_was_put_is_found_and_delivered(tier: Samovar) -> None:
    source = Rows(100, seed=1)
    stored = tier.put(NAMESPACE, PROMPT, source, boundaries=[70])
    assert (stored.stored, stored.blocks, stored.complete) == (7, 7, True)
    tokens, rows = got(tier, PROMPT)
    assert tokens == 96
    assert np.array_equal(rows.kv[:, :, :96], source.kv[:, :, :96])


def test_an_empty_tier_has_no_prefix(tier: Samovar) -> None:
    assert got(tier, PROMPT, (70,))[0] == 0


def test_a_use_that_was_told_in_part_keeps_the_chain_together(tier: Samovar) -> None:
    tier.put(NAMESPACE, PROMPT, Rows(100, seed=1))
    table = tier._routes.own_table()
    assert table is not None
    before = table.slots["stamp"].max()
    tier.touch(tier.longest_prefix(NAMESPACE, PROMPT), start=96)
    assert table.slots["stamp"].max() == before, "nothing is behind it"
    tier.touch(tier.longest_prefix(NAMESPACE, PROMPT), start=50)
    held = np.flatnonzero(table.slots["stamp"])
    assert len(set(table.slots["stamp"][held].tolist())) == 1
    assert table.slots["stamp"][held].min() > before


def test_a_tail_is_found_at_its_boundary_only(tier: Samovar) -> None:
    tier.put(NAMESPACE, PROMPT[:70], Rows(70, seed=1), boundaries=[70])
    asked = [*PROMPT[:70], 1, 2, 3]
    assert got(tier, asked)[0] == 64
    assert got(tier, asked, (70,))[0] == 70
    assert got(tier, asked, (69,))[0] == 64


def test_a_tail_is_stored_although_the_blocks_around_it_were_there(tier: Samovar) -> None:
    source = Rows(100, seed=1)
    tier.put(NAMESPACE, PROMPT, source)
    assert tier.put(NAMESPACE, PROMPT, source, start=96, boundaries=[70]).stored == 1
    assert got(tier, [*PROMPT[:70], 1, 2, 3], (70,))[0] == 70


def test_a_prefix_never_covers_the_whole_prompt(tier: Samovar) -> None:
    tier.put(NAMESPACE, PROMPT[:64], Rows(64, seed=1))
    assert got(tier, PROMPT[:64])[0] == 63


def test_what_is_there_is_not_sent_again(tier: Samovar) -> None:
    tier.put(NAMESPACE, PROMPT, Rows(100, seed=1))
    again = tier.put(NAMESPACE, PROMPT, Rows(100, seed=1))
    assert (again.stored, again.present) == (0, 6)


def test_two_namespaces_with_equal_tokens_do_not_share(tier: Samovar) -> None:
    tier.put(NAMESPACE, PROMPT, Rows(100, seed=1))
    for other in (space(tenant="somebody"), space(weights="v"), space(kv_form="other")):
        assert tier.longest_prefix(other, PROMPT).tokens == 0


def test_ranks_read_and_write_their_own_heads(tier: Samovar) -> None:
    whole = Rows(100, seed=1)
    tier.put(NAMESPACE, PROMPT, whole)
    for rank in range(2):
        heads = range(rank * 2, rank * 2 + 2)
        mask = NAMESPACE.grid.mask_for(range(LAYERS), heads)
        rows = Rows(100, heads=2)
        plan = tier.longest_prefix(NAMESPACE, PROMPT, mask=mask)
        assert tier.get_into(plan, rows).tokens == 96
        assert np.array_equal(rows.kv[:, :, :96], whole.kv[:, heads.start : heads.stop, :96])


def test_a_block_is_warm_only_when_all_cells_asked_for_are(tier: Samovar) -> None:
    mask = NAMESPACE.grid.mask_for(range(LAYERS), range(2))
    tier.put(NAMESPACE, PROMPT, Rows(100, heads=2, seed=1), mask=mask)
    assert tier.longest_prefix(NAMESPACE, PROMPT).tokens == 0
    assert tier.longest_prefix(NAMESPACE, PROMPT, mask=mask).tokens == 96


def test_expired_blocks_are_a_miss(tier: Samovar, clock: ManualClock) -> None:
    tier.put(NAMESPACE, PROMPT, Rows(100, seed=1), ttl_s=10)
    clock.advance(9.0)
    assert got(tier, PROMPT)[0] == 96
    clock.advance(60.0)
    assert got(tier, PROMPT)[0] == 0


def test_what_was_read_lives_longer_than_what_was_not(tier: Samovar) -> None:
    tier.put(NAMESPACE, PROMPT, Rows(100, seed=1))
    tier.put(NAMESPACE, [0, *PROMPT], Rows(101, seed=2))
    for seed in range(2, 60):
        assert got(tier, PROMPT)[0] == 96
        tier.touch(tier.longest_prefix(NAMESPACE, PROMPT))
        tier.put(NAMESPACE, [seed, *PROMPT], Rows(101, seed=seed))
    assert got(tier, PROMPT)[0] == 96
    assert got(tier, [0, *PROMPT])[0] == 0


def test_a_full_tier_keeps_the_newest_prompts(tier: Samovar) -> None:
    prompts = [[seed, *PROMPT] for seed in range(60)]
    for prompt in prompts:
        assert tier.put(NAMESPACE, prompt, Rows(101, seed=prompt[0])).complete
    stats = tier.stats().host
    assert stats.held_bytes <= ARENA_BYTES
    assert stats.evicted > 0
    tokens, rows = got(tier, prompts[-1])
    assert tokens == 96
    assert np.array_equal(rows.kv[:, :, :96], Rows(101, seed=59).kv[:, :, :96])
    assert got(tier, prompts[0])[0] == 0


def test_a_plan_that_was_evicted_meanwhile_delivers_less(tier: Samovar) -> None:
    tier.put(NAMESPACE, PROMPT, Rows(100, seed=1))
    plan = tier.longest_prefix(NAMESPACE, PROMPT)
    for seed in range(60):
        tier.put(NAMESPACE, [seed, *PROMPT], Rows(101, seed=seed))
    fetched = tier.get_into(plan, Rows(100))
    assert fetched.tokens == 0
    assert fetched.failures == {"GONE": 12}


def test_a_read_under_a_closing_client_still_answers(tier: Samovar) -> None:
    tier.put(NAMESPACE, PROMPT, Rows(100, seed=1))
    tier._workers.shutdown()
    assert got(tier, PROMPT)[0] == 96


def test_an_arena_that_does_not_fit_leaves_nothing_behind(tmp_path: Path) -> None:
    with shared_folder() as folder:
        with pytest.raises(ConfigError, match="no room"):
            Samovar.open(1 << 44, folder)
        assert list(folder.iterdir()) == []
    with pytest.raises(UsageError, match="cannot make a folder in"):
        Samovar.open(ARENA_BYTES, tmp_path / "absent")


@pytest.mark.parametrize("block_tokens", [8, 48, 8192])
def test_blocks_of_an_impossible_size_are_refused(tmp_path: Path, block_tokens: int) -> None:
    with pytest.raises(UsageError, match="power of two"):
        Samovar.open(ARENA_BYTES, tmp_path, block_tokens=block_tokens)


def test_a_grid_of_other_blocks_than_the_tiers_is_refused(tier: Samovar) -> None:
    assert tier.block_tokens == BLOCK
    other = replace(NAMESPACE, grid=replace(NAMESPACE.grid, block_tokens=32))
    refused = pytest.raises(UsageError, match="blocks of 32 tokens, this tier 16")
    with refused:
        tier.longest_prefix(other, PROMPT)
    with refused:
        tier.put(other, PROMPT, Rows(100))


@pytest.mark.parametrize("ttl_s", [-1, 1 << 32])
def test_impossible_lives_are_refused(tier: Samovar, ttl_s: int) -> None:
    with pytest.raises(UsageError, match="ttl_s must be"):
        tier.put(NAMESPACE, PROMPT, Rows(100, seed=1), ttl_s=ttl_s)


@pytest.mark.parametrize(
    ("tokens", "boundaries"),
    [([2**31], ()), ([-1], ()), ([0.5], ()), (PROMPT, (101,)), (PROMPT, (0,))],
)
def test_bad_prompts_are_refused(
    tier: Samovar, tokens: list[int], boundaries: tuple[int, ...]
) -> None:
    with pytest.raises(GeometryError):
        tier.longest_prefix(NAMESPACE, tokens, boundaries)


def test_rows_of_another_shape_are_refused_before_anything_is_stored(tier: Samovar) -> None:
    with pytest.raises(GeometryError, match="must be uint8"):
        tier.put(NAMESPACE, PROMPT, Rows(100, heads=3, seed=1))
    assert tier.stats().host.held_cells == 0
    assert tier.put(NAMESPACE, PROMPT, Rows(100, seed=1)).stored == 6


@pytest.mark.parametrize(
    ("start", "first"), [(0, 0), (15, 0), (16, 16), (40, 32), (64, 64), (69, 64)]
)
def test_only_blocks_behind_the_callers_own_tokens_are_read(
    tier: Samovar, start: int, first: int
) -> None:
    source = Rows(100, seed=1)
    tier.put(NAMESPACE, PROMPT[:70], source, boundaries=[70])
    own = Rows(100, seed=2)
    before = own.kv.copy()
    plan = tier.longest_prefix(NAMESPACE, PROMPT, boundaries=[70])
    fetched = tier.get_into(plan, own, start=start)
    assert (fetched.start, fetched.tokens, fetched.stop) == (first, 70 - first, 70)
    assert fetched.by_source == {"local": 70 - first, "remote": 0, "nvme": 0}
    assert np.array_equal(own.kv[:, :, :first], before[:, :, :first])
    assert np.array_equal(own.kv[:, :, first:70], source.kv[:, :, first:70])
    assert np.array_equal(own.kv[:, :, 70:], before[:, :, 70:])


@pytest.mark.parametrize("start", [70, 71, 500, np.int64(70)])
def test_nothing_is_read_where_the_caller_has_all_that_was_planned(
    tier: Samovar, start: int
) -> None:
    tier.put(NAMESPACE, PROMPT[:70], Rows(70, seed=1), boundaries=[70])
    own = Rows(100, seed=2)
    before = own.kv.copy()
    fetched = tier.get_into(tier.longest_prefix(NAMESPACE, PROMPT, [70]), own, start=start)
    assert (fetched.start, fetched.tokens, fetched.stop) == (start, 0, start)
    assert np.array_equal(own.kv, before)


def test_what_is_gone_behind_the_callers_own_tokens_leaves_them(tier: Samovar) -> None:
    tier.put(NAMESPACE, PROMPT, Rows(100, seed=1))
    plan = tier.longest_prefix(NAMESPACE, PROMPT)
    for seed in range(60):
        tier.put(NAMESPACE, [seed, *PROMPT], Rows(101, seed=seed))
    own = Rows(100, seed=2)
    before = own.kv.copy()
    fetched = tier.get_into(plan, own, start=40)
    assert (fetched.start, fetched.tokens) == (32, 0)
    assert fetched.failures == {"GONE": 8}
    assert np.array_equal(own.kv[:, :, :32], before[:, :, :32])


def test_reading_the_end_of_a_prompt_keeps_all_of_it(tier: Samovar) -> None:
    tier.put(NAMESPACE, PROMPT, Rows(100, seed=1))
    for seed in range(60):
        plan = tier.longest_prefix(NAMESPACE, PROMPT)
        assert tier.get_into(plan, Rows(100), start=80).stop == 96
        tier.put(NAMESPACE, [seed, *PROMPT], Rows(101, seed=seed))
    assert got(tier, PROMPT)[0] == 96


@pytest.mark.parametrize("start", [-1, 1.0, "3", None])
def test_a_start_that_is_no_count_is_refused(tier: Samovar, start: Any) -> None:
    plan = tier.longest_prefix(NAMESPACE, PROMPT)
    with pytest.raises(UsageError, match="start must be how many tokens"):
        tier.get_into(plan, Rows(100), start=start)


def test_a_start_outside_the_prompt_is_refused(tier: Samovar) -> None:
    rows: KVRows = Rows(100)
    with pytest.raises(UsageError, match="outside"):
        tier.put(NAMESPACE, PROMPT, rows, start=101)


def test_closing_leaves_nothing_behind(tmp_path: Path) -> None:
    tier = Samovar.open(ARENA_BYTES, tmp_path)
    # Nor does being killed: by now its memory has no name any more.
    assert list(tmp_path.iterdir()) == []
    tier.close()
    tier.close()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UsageError, match="closed"):
        tier.longest_prefix(NAMESPACE, PROMPT)


def test_the_memory_of_a_closed_tier_is_free_at_once(tmp_path: Path) -> None:
    def is_mapped() -> bool:
        return str(tmp_path) in Path("/proc/self/maps").read_text()

    gc.disable()  # not when somebody collects what refers to itself
    try:
        tier = Samovar.open(ARENA_BYTES, tmp_path, block_tokens=BLOCK)
        tier.put(NAMESPACE, PROMPT, Rows(100, seed=1))
        assert got(tier, PROMPT)[0] == 96
        assert is_mapped()
        tier.close()
        del tier
        assert not is_mapped()
    finally:
        gc.enable()


def test_a_forked_child_is_told_to_open_its_own(tier: Samovar) -> None:
    child = os.fork()
    if child == 0:
        try:
            tier.longest_prefix(NAMESPACE, PROMPT)
        except UsageError:
            os._exit(0)
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0, sys.platform
