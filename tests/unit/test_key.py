"""Keys: published vectors, no collisions by construction, the same in every process."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.cell import Grid
from kvstore.errors import GeometryError
from kvstore.key import (
    BOUNDARIES_MAX,
    EXTRA_BYTES_MAX,
    PROMPT_TOKENS_MAX,
    SPAN_FIRST_TOKENS,
    Chain,
    as_tokens,
    framed_key,
    span_head,
)
from kvstore.namespace import Namespace
from tests.key_vectors import NAMESPACES, chain_of, vectors
from tests.source_tree import ROOT

PLAIN = NAMESPACES["plain"]
B = PLAIN.grid.block_tokens
SMALL_TOKENS = st.lists(st.integers(0, 2), max_size=3 * B)


def block_keys(chain: Chain) -> list[bytes]:
    return [key.tobytes() for key in chain.keys]


def test_published_vectors_hold() -> None:
    published = json.loads((ROOT / "docs" / "key_vectors.json").read_text())
    assert published == vectors()


def test_published_vectors_can_be_computed_from_what_is_published() -> None:
    for row in json.loads((ROOT / "docs" / "key_vectors.json").read_text()):
        chain = chain_of(NAMESPACES[row["namespace"]], row)
        assert [key.hex() for key in block_keys(chain)] == row["block_keys"]


def test_keys_are_the_same_in_another_process() -> None:
    command = [sys.executable, "-m", "tests.key_vectors"]
    environment = {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "12345"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=True)
    assert json.loads(done.stdout) == vectors()


def test_a_key_stands_for_every_token_before_it() -> None:
    tokens = list(range(4 * B))
    keys = block_keys(Chain.of(PLAIN, tokens))
    for changed in range(4 * B):
        other = tokens.copy()
        other[changed] += 1
        same = [a == b for a, b in zip(keys, block_keys(Chain.of(PLAIN, other)), strict=True)]
        assert same == [index < changed // B for index in range(4)]


def test_namespaces_with_equal_tokens_share_nothing() -> None:
    tokens = list(range(3 * B))
    mine = Chain.of(PLAIN, tokens, [5])
    other = Chain.of(replace(PLAIN, tenant="another"), tokens, [5])
    keys = [{*block_keys(chain), *chain.tails.values()} for chain in (mine, other)]
    assert not keys[0] & keys[1]
    assert mine.first_span != other.first_span


@settings(max_examples=60, deadline=None, derandomize=True)
@given(SMALL_TOKENS, st.data())
def test_tails_and_blocks_never_share_a_key(tokens: list[int], data: st.DataObject) -> None:
    ends = data.draw(st.lists(st.integers(1, len(tokens)), max_size=9)) if tokens else []
    chain = Chain.of(PLAIN, tokens, ends)
    assert sorted(chain.tails) == sorted({end for end in ends if end % B})
    keys = [*block_keys(chain), *chain.tails.values()]
    assert len(set(keys)) == len(keys) == len(tokens) // B + len(chain.tails)


def test_no_two_framed_messages_are_equal() -> None:
    """Tokens and extras whose bytes run into each other, in every alignment."""
    seen: dict[bytes, tuple[bytes, bytes]] = {}
    pieces = [b"", b"\0", b"\1", b"\0\1", b"\0\0\0", b"\0\0\0\0", b"\1\0\0\0", bytes(5), bytes(8)]
    for count in range(5):
        for value in (0, 1, 256):
            ids = np.full(count, value, np.int32)
            for extra in [*pieces, *(bytes(n) for n in (9, 12, 256))]:
                key = framed_key(PLAIN.digest, ids, extra)
                named = (ids.tobytes(), extra)
                assert seen.setdefault(key, named) == named
    for value in (0, 1):  # and none is that of a full block
        full = Chain.of(PLAIN, [value] * B).keys[0].tobytes()
        assert full not in seen
        assert full != framed_key(PLAIN.digest, np.full(B, value, np.int32))


def test_extra_bytes_separate_and_are_inherited() -> None:
    tokens = list(range(3 * B + 2))
    plain = Chain.of(PLAIN, tokens, [3 * B + 2])
    first = Chain.of(PLAIN, tokens, [3 * B + 2], {1: b"image"})
    second = Chain.of(PLAIN, tokens, [3 * B + 2], {1: b"picture"})
    assert block_keys(plain)[0] == block_keys(first)[0] == block_keys(second)[0]
    for a, b in ((plain, first), (first, second)):
        assert not set(block_keys(a)[1:]) & set(block_keys(b)[1:])
        assert a.tails[3 * B + 2] != b.tails[3 * B + 2]


def test_no_extra_bytes_are_like_none() -> None:
    tokens = list(range(2 * B + 2))
    plain = Chain.of(PLAIN, tokens, [2 * B + 2])
    empty = Chain.of(PLAIN, tokens, [2 * B + 2], {0: b"", 2: b""})
    assert block_keys(plain) == block_keys(empty)
    assert plain.tails == empty.tails


def test_kinds_of_integers_do_not_matter() -> None:
    tokens = [1, 2, 3] * B
    wanted = block_keys(Chain.of(PLAIN, tokens))
    for kind in (np.int32, np.int64, np.uint8, np.uint64, ">i4"):
        assert block_keys(Chain.of(PLAIN, np.array(tokens, kind))) == wanted
    strided = np.repeat(np.array(tokens, np.int64), 2)[::2]
    assert block_keys(Chain.of(PLAIN, strided)) == wanted


@pytest.mark.parametrize(
    "tokens",
    [
        [-1],
        [2**31],
        [2**63],
        [2**70],
        [0, 2**32],
        [1.0],
        [True],
        [[1, 2]],
        ["1"],
        np.array([2**31], np.uint32),
        np.array([2**64 - 1], np.uint64),
        np.array([-1], np.int8),
    ],
)
def test_what_is_not_an_int32_token_is_refused(tokens: list[int]) -> None:
    with pytest.raises(GeometryError, match="token ids"):
        as_tokens(tokens)


def test_too_long_prompts_are_refused() -> None:
    with pytest.raises(GeometryError, match="is over"):
        as_tokens(np.zeros(PROMPT_TOKENS_MAX + 1, np.int8))


@pytest.mark.parametrize("boundary", [0, -1, 33])
def test_boundaries_outside_the_prompt_are_refused(boundary: int) -> None:
    with pytest.raises(GeometryError, match="outside the prompt"):
        Chain.of(PLAIN, [0] * 32, [boundary])


def test_limits_of_boundaries_and_extras() -> None:
    Chain.of(PLAIN, [0] * 100, range(1, BOUNDARIES_MAX + 1), {0: bytes(EXTRA_BYTES_MAX)})
    with pytest.raises(GeometryError, match="boundaries are over"):
        Chain.of(PLAIN, [0] * 100, range(1, BOUNDARIES_MAX + 2))
    with pytest.raises(GeometryError, match="digest them"):
        Chain.of(PLAIN, [0] * 100, extras={0: bytes(EXTRA_BYTES_MAX + 1)})


@pytest.mark.parametrize("block_tokens", [16, 64, 512, 1024, 4096])
def test_spans_double(block_tokens: int) -> None:
    for index in range(8192 // block_tokens * 4):
        token = index * block_tokens
        head = span_head(index, block_tokens) * block_tokens
        assert head <= token
        if token >= SPAN_FIRST_TOKENS:
            assert head & (head - 1) == 0
            assert token < 2 * head
        else:
            assert head == 0


def test_a_tail_is_in_the_span_of_the_block_that_would_be_there() -> None:
    namespace = NAMESPACES["every field"]
    size = namespace.grid.block_tokens
    tokens = np.arange(40 * size)
    whole = Chain.of(namespace, tokens)
    for index in range(1, 40):
        cut = Chain.of(namespace, tokens[: index * size + 5], [index * size + 5])
        assert cut.span(cut.tail(index * size + 5).index) == whole.span(index)
    names = whole.spans(np.arange(40)).tolist()
    assert names == [whole.span(index) for index in range(40)]
    assert len(set(names)) == 4, "0, 512, 1024 and 2048 tokens"


def test_a_long_prompt_has_few_spans() -> None:
    chain = Chain.of(PLAIN, np.arange(200_000))
    assert len(set(chain.spans(np.arange(chain.blocks)).tolist())) <= 16


def test_prompts_with_another_first_block_are_in_other_spans() -> None:
    mine, other = (Chain.of(PLAIN, [start] * 2048) for start in (1, 2))
    blocks = np.arange(128)
    assert not set(mine.spans(blocks).tolist()) & set(other.spans(blocks).tolist())


def test_long_prompts_have_all_their_keys() -> None:
    grid = Grid((256,), kv_heads=1, block_tokens=64)
    chain = Chain.of(Namespace("w", "", "float32", "gqa", grid), np.arange(100_000) % 32_000)
    assert len(np.unique(chain.keys, axis=0)) == chain.blocks == 100_000 // 64
