"""Free ranges: best fit, lowest first, joined to their neighbours."""

import pytest

from kvstore.ranges import Ranges


def ranges_of(*free: tuple[int, int]) -> Ranges:
    ranges = Ranges()
    for start, length in free:
        ranges.free(start, length)
    return ranges


def test_empty_has_nothing() -> None:
    ranges = Ranges()
    assert ranges.allocate(1) is None
    assert ranges.largest_bytes() == 0


def test_smallest_range_that_fits_is_taken() -> None:
    ranges = ranges_of((0, 100), (200, 10), (300, 20))
    assert ranges.allocate(10) == 200
    assert ranges.allocate(15) == 300
    assert ranges.free_bytes == 105


def test_lowest_offset_among_equals() -> None:
    assert ranges_of((500, 10), (100, 10), (300, 10)).allocate(10) == 100


def test_plenty_in_pieces_is_not_enough() -> None:
    ranges = ranges_of((0, 10), (20, 10), (40, 10))
    assert ranges.allocate(11) is None
    assert ranges.free_bytes == 30


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (0, 2, 1), (1, 0, 2)])
def test_neighbours_become_one(order: tuple[int, ...]) -> None:
    ranges = ranges_of(*((10 * i, 10) for i in order))
    assert ranges.largest_bytes() == 30
    assert ranges.allocate(30) == 0


@pytest.mark.parametrize("again", [(10, 10), (5, 10), (19, 2), (0, 40)])
def test_freeing_twice_is_a_bug(again: tuple[int, int]) -> None:
    with pytest.raises(AssertionError, match="freed twice"):
        ranges_of((10, 10)).free(*again)
