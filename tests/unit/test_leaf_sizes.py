"""How long leaves are is found out from their digests, and for damaged cells it is not."""

import numpy as np
import numpy.typing as npt
import pytest

from kvstore import leaf_sizes
from kvstore.block import Header, leaf_digests, payload_leaves
from kvstore.leaf_sizes import LeafSizes, Unmeasured, is_whole

TOKENS = 16


def cell(
    rows: tuple[int, ...], tokens: int = TOKENS, seed: int = 1
) -> tuple[Header, npt.NDArray[np.uint8], tuple[int, ...]]:
    """A cell whose leaves have so many bytes a token."""
    sizes = tuple(row * tokens for row in rows)
    payload = np.random.default_rng(seed).integers(0, 256, sum(sizes), np.uint8)
    key = bytes([seed]) * 32
    leaves = payload_leaves(payload, [(1, 1, size) for size in sizes])
    digests = tuple(leaf_digests(key, 3, leaves))
    return Header(key, 3, tokens, len(payload), 0, 7, digests), payload, sizes


@pytest.mark.parametrize(
    "rows", [(24,), (8, 8, 8), (24, 8, 40), (1, 1, 2), (300, 1), (1, 300)], ids=str
)
def test_leaves_of_any_lengths_are_found(rows: tuple[int, ...]) -> None:
    header, payload, sizes = cell(rows)
    found = LeafSizes().of(header, payload)
    assert found == sizes
    assert is_whole(header, payload, sizes)


@pytest.mark.parametrize("tokens", [1, 5, 16])
def test_a_tail_has_leaves_as_well(tokens: int) -> None:
    header, payload, sizes = cell((24, 8, 40), tokens)
    assert LeafSizes().of(header, payload) == sizes


@pytest.mark.parametrize("rows", [(8, 8, 8), (24, 8, 40)], ids=str)
def test_one_bit_anywhere_and_there_is_no_such_cell(rows: tuple[int, ...]) -> None:
    sizes_of = LeafSizes()
    header, payload, _ = cell(rows)
    for at in range(0, len(payload), 97):
        for knows_the_shape in (False, True):
            payload[at] ^= 1
            measure = sizes_of if knows_the_shape else LeafSizes()
            assert measure.of(header, payload) is Unmeasured.DAMAGED
            payload[at] ^= 1
            assert isinstance(sizes_of.of(header, payload), tuple)


def test_what_was_found_once_is_not_searched_again(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes_of = LeafSizes()
    header, payload, _ = cell((24, 8, 40))
    assert isinstance(sizes_of.of(header, payload), tuple)
    monkeypatch.setattr(leaf_sizes, "STEPS_MAX", 0)
    for tokens in (1, TOKENS):
        header, payload, sizes = cell((24, 8, 40), tokens, seed=2)
        assert sizes_of.of(header, payload) == sizes
    header, payload, _ = cell((24, 8, 41))
    assert sizes_of.of(header, payload) is Unmeasured.UNKNOWN, "of another shape, and too long"


def test_shapes_do_not_grow_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaf_sizes, "SHAPES_MAX", 2)
    sizes_of = LeafSizes()
    for row in range(1, 6):
        header, payload, sizes = cell((row, 9))
        assert sizes_of.of(header, payload) == sizes
    assert len(sizes_of._rows) == 2
