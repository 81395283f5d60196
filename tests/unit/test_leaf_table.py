"""Where leaves lie: what is computed for a cell is what its arrays say."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from kvstore.block import Leaf, payload_leaves
from kvstore.errors import GeometryError
from kvstore.leaf_table import Leaves

SHAPES = ((2, 16, 24), (1, 16, 8), (3, 16, 40))


def somewhere(shapes: Sequence[tuple[int, int, int]] = SHAPES) -> list[Leaf]:
    """Leaves with something between their heads, the last head first."""
    return [np.zeros((2 * h, t + 3, r), np.uint8)[::-2, 1 : 1 + t] for h, t, r in shapes]


def places(leaves: Leaves) -> list[tuple[int, ...]]:
    """Address, heads, bytes of a head, stride; of a single head the stride says nothing."""
    return [
        (address, heads, head_bytes, stride if heads > 1 else 0)
        for address, stride, heads, head_bytes in leaves.places.tolist()
    ]


def expected(arrays: Sequence[Leaf]) -> Iterator[tuple[int, ...]]:
    for array in arrays:
        heads, tokens, row_bytes = array.shape
        stride = array.strides[0] % (1 << 64) if heads > 1 else 0
        yield array.ctypes.data, heads, tokens * row_bytes, stride


def test_leaves_are_where_their_arrays_are() -> None:
    arrays = somewhere()
    leaves = Leaves.of(arrays)
    assert places(leaves) == list(expected(arrays))
    assert leaves.sizes.tolist() == [array.nbytes for array in arrays]
    assert all(leaf is array for leaf, array in zip(leaves, arrays, strict=True))


def test_a_payload_is_its_leaves() -> None:
    sizes = (48, 16, 120)
    payload = np.zeros(sum(sizes), np.uint8)
    leaves = Leaves.packed(payload, sizes)
    assert places(leaves) == list(expected(payload_leaves(payload, [(1, 1, s) for s in sizes])))
    assert places(leaves) == list(expected(list(leaves)))
    for wrong in ((48, 16, 121), (48, 16), ()):
        with pytest.raises(AssertionError, match="disagree"):
            Leaves.packed(payload, wrong)


def test_parts_and_what_is_put_together_are_leaves_as_well() -> None:
    some, others = somewhere(), somewhere(SHAPES[1:])
    both = Leaves.joined([Leaves.of(some), Leaves.of(others)])
    assert len(both) == 5
    assert places(both) == list(expected([*some, *others])) == list(expected(list(both)))
    part = both[2:4]
    assert len(part) == 2
    assert places(part) == list(expected([some[2], others[0]])) == list(expected(list(part)))


def test_none_are_leaves_as_well() -> None:
    assert len(Leaves.of(())) == 0
    assert list(Leaves.of(())) == []


def test_only_what_may_be_written_is_writeable() -> None:
    fixed = np.frombuffer(bytes(96), np.uint8)
    assert not Leaves.packed(fixed, [96]).is_writeable
    mixed = Leaves.of([*somewhere(), fixed.reshape(2, 3, 16)])
    assert not mixed.is_writeable
    assert not mixed[:1].is_writeable
    assert not Leaves.joined([Leaves.of(somewhere()), mixed]).is_writeable
    assert Leaves.of(somewhere()).is_writeable


@pytest.mark.parametrize(
    "bad",
    [
        np.zeros((2, 16, 48), np.uint8)[:, :, ::2],
        np.zeros((2, 32, 24), np.uint8)[:, ::2],
        np.zeros((2, 16, 6), np.float32),
        np.zeros((2, 16 * 24), np.uint8),
    ],
    ids=["bytes apart", "tokens apart", "no bytes", "no heads"],
)
def test_what_is_no_leaf_is_the_callers_bug(bad: npt.NDArray[Any]) -> None:
    with pytest.raises(GeometryError, match="each head contiguous"):
        Leaves.of([*somewhere(), bad])
