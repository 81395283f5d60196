"""One home's directory: streams, digests, refusals and its size."""

import numpy as np
import pytest

from kvstore.changes import Changes, Digest, as_words
from kvstore.cluster_map import ClusterMap, NodeInfo
from kvstore.directory import (
    ANNOUNCEMENT_CHANGES_MAX,
    LOCATE_KEYS_MAX,
    Announcement,
    Answer,
    Directory,
    Reception,
)
from kvstore.errors import UsageError
from kvstore.key import Keys

KEYS: Keys = np.random.default_rng(11).integers(0, 256, (20_000, 32), np.uint8)
BYTES_PER_BLOCK_HELD = 200
HOMES = 2


def changes(keys: list[int], cells: list[int] | None = None, added: bool = True) -> Changes:
    count = len(keys)
    return Changes(
        KEYS[keys],
        np.array(cells or [0] * count, np.uint8),
        np.zeros(count, np.uint64),
        np.full(count, added),
    )


def say(
    directory: Directory,
    sequence: int,
    what: Changes,
    node: int = 3,
    incarnation: int = 1,
    stream: int = 1,
) -> Answer:
    return directory.apply(Announcement(node, incarnation, stream, sequence, what))


def holders(directory: Directory, key: int) -> dict[int, int]:
    located = directory.locate(KEYS[[key]])
    return dict(zip(located.nodes.tolist(), located.masks.tolist(), strict=True))


def test_tells_who_holds_which_cells() -> None:
    directory = Directory()
    say(directory, 0, changes([1, 1, 2], [0, 5, 63]))
    say(directory, 0, changes([2, 4]), node=9)
    located = directory.locate(KEYS[[4, 1, 7, 2]])
    assert located.counts.tolist() == [1, 1, 0, 2]
    assert located.nodes.tolist() == [9, 3, 9, 3]
    assert located.masks.tolist() == [1, 0b100001, 1, 1 << 63]
    assert directory.locate(KEYS[:0]).counts.tolist() == []
    assert len(directory) == 4


def test_answers_are_bounded_and_name_the_newest() -> None:
    directory = Directory()
    for node in range(30):
        say(directory, 0, changes([1]), node=node)
    located = directory.locate(KEYS[[1, 1]], holders_max=2)
    assert located.counts.tolist() == [2, 2]
    assert located.nodes.tolist() == [29, 28, 29, 28]
    assert int(directory.locate(KEYS[[1]]).counts[0]) == 16


def test_hides_unreachable_nodes_without_forgetting_them() -> None:
    directory = Directory()
    for node in (3, 4):
        say(directory, 0, changes([1, 2]), node=node)
    located = directory.locate(KEYS[[1, 5, 2]])
    seen = located.without(frozenset({4}))
    assert seen.counts.tolist() == [1, 0, 1]
    assert seen.nodes.tolist() == [3, 3]
    assert located.without(frozenset()) is located
    assert holders(directory, 1) == {3: 1, 4: 1}


def test_changes_of_one_message_are_taken_in_order() -> None:
    directory = Directory()
    what = Changes.concat(
        [changes([1, 2]), changes([1, 2], added=False), changes([2]), changes([1], [4])]
    )
    answer = say(directory, 0, what)
    assert holders(directory, 1) == {3: 1 << 4}
    assert holders(directory, 2) == {3: 1}
    assert answer.digest.cells == 2


def test_a_repeated_message_changes_nothing() -> None:
    directory = Directory()
    say(directory, 0, changes([1]))
    first = say(directory, 1, changes([1], added=False))
    assert first.reception is Reception.APPLIED
    again = say(directory, 0, changes([1]))
    assert again == Answer(Reception.REPEATED, 1, 1, 2, Digest())
    assert holders(directory, 1) == {}


def test_a_gap_changes_nothing_and_says_what_is_missing() -> None:
    directory = Directory()
    say(directory, 0, changes([1]))
    answer = say(directory, 2, changes([2]))
    assert (answer.reception, answer.expected) == (Reception.GAP, 1)
    assert holders(directory, 2) == {}
    assert holders(directory, 1) == {3: 1}


def test_an_unknown_node_must_start_at_the_start() -> None:
    answer = say(Directory(), 7, changes([1]), stream=4)
    assert (answer.reception, answer.stream, answer.expected) == (Reception.GAP, 0, 0)


def test_a_new_stream_starts_over() -> None:
    directory = Directory()
    say(directory, 0, changes([1]))
    assert say(directory, 1, changes([2]), stream=2).reception is Reception.GAP
    assert holders(directory, 1) == {3: 1}
    assert say(directory, 0, changes([2]), stream=2).reception is Reception.APPLIED
    assert holders(directory, 1) == {}
    assert say(directory, 1, changes([1])).reception is Reception.STALE
    assert holders(directory, 1) == {}


def test_a_new_incarnation_forgets_the_old_one_only() -> None:
    directory = Directory()
    say(directory, 0, changes([1]))
    say(directory, 0, changes([1]), node=4)
    assert say(directory, 5, changes([2]), incarnation=2).reception is Reception.GAP
    assert holders(directory, 1) == {4: 1}
    late = say(directory, 0, changes([1]), stream=8)
    assert (late.reception, late.incarnation) == (Reception.STALE, 2)


def test_follows_the_map() -> None:
    directory = Directory()
    for node in (3, 4, 5):
        say(directory, 0, changes([1]), node=node)
    nodes = [
        NodeInfo(index, str(index), "host", incarnation, "h:1", "h:2", "/arena")
        for index, incarnation in ((3, 1), (4, 2))
    ]
    directory.follow(ClusterMap.of(2, nodes))
    assert holders(directory, 1) == {3: 1}
    assert say(directory, 0, changes([1]), node=4).reception is Reception.STALE
    assert directory.digest(5) == Digest()


def test_drop_forgets_the_stream_too() -> None:
    directory = Directory()
    say(directory, 0, changes([1]))
    directory.drop(3)
    directory.drop(3)
    assert (len(directory), directory.digest(3)) == (0, Digest())
    assert say(directory, 1, changes([2])).reception is Reception.GAP


def test_a_refused_cell_is_removed_and_seen_in_the_digest() -> None:
    directory = Directory()
    before = say(directory, 0, changes([1, 1, 2], [0, 1, 0])).digest
    directory.remove(3, KEYS[[1, 7]], np.array([1, 0], np.uint8))
    assert holders(directory, 1) == {3: 1}
    assert directory.digest(3) != before
    assert directory.digest(3).cells == 2
    directory.remove(8, KEYS[[1]], np.array([0], np.uint8))
    say(directory, 1, changes([1], [1]))
    assert directory.digest(3) == before


def test_digest_is_of_what_is_held_whatever_the_way_there() -> None:
    one, other = Directory(), Directory()
    say(one, 0, changes([1, 2, 3], [0, 1, 2]))
    say(other, 0, changes([3, 9, 2], [2, 0, 1]))
    say(other, 1, changes([9, 3], [0, 2], added=False))
    assert say(other, 2, changes([3, 1], [2, 0])).digest == one.digest(3)
    held = changes([2, 3, 1], [1, 2, 0])
    assert Digest().after(as_words(held.keys), held.cells, held.added) == one.digest(3)
    swapped = changes([2, 3, 1], [1, 0, 2])
    assert Digest().after(as_words(swapped.keys), swapped.cells, swapped.added) != one.digest(3)


def test_a_block_held_costs_at_most_its_budget_at_any_size() -> None:
    """100,000 blocks, each on two homes: twice a home's bytes, also just after it has grown."""
    keys = np.random.default_rng(5).integers(0, 256, (100_000, 32), np.uint8)
    step = ANNOUNCEMENT_CHANGES_MAX
    directory = Directory()
    for sequence, start in enumerate(range(0, len(keys), step)):
        part = keys[start : start + step]
        count = len(part)
        what = Changes(
            part, np.zeros(count, np.uint8), np.zeros(count, np.uint64), np.ones(count, np.bool_)
        )
        assert say(directory, sequence, what).reception is Reception.APPLIED
        if len(directory) > 10_000:
            assert HOMES * directory.nbytes <= BYTES_PER_BLOCK_HELD * len(directory)
    assert len(directory) == len(keys)
    assert (directory.locate(keys[:4096]).counts == 1).all()
    directory.drop(3)
    assert directory.nbytes < 100_000


def test_refuses_what_is_over_its_limits() -> None:
    count = ANNOUNCEMENT_CHANGES_MAX + 1
    with pytest.raises(UsageError, match="split them"):
        Announcement(1, 1, 1, 0, changes(list(range(count))))
    with pytest.raises(UsageError, match="index"):
        Announcement(1 << 16, 1, 1, 0, Changes.empty())
    with pytest.raises(UsageError, match="streams start at 1"):
        Announcement(1, 1, 0, 0, Changes.empty())
    with pytest.raises(UsageError, match="split them"):
        Directory().locate(KEYS[: LOCATE_KEYS_MAX + 1])
    with pytest.raises(UsageError, match="holders_max"):
        Directory().locate(KEYS[:1], 0)


def test_refuses_malformed_changes() -> None:
    good = changes([1, 2])
    with pytest.raises(UsageError, match="keys must be"):
        Changes(KEYS[:2, :31], good.cells, good.spans, good.added)
    with pytest.raises(UsageError, match="spans of 2 changes"):
        Changes(good.keys, good.cells, good.spans[:1], good.added)
    with pytest.raises(UsageError, match="cell 64"):
        changes([1], [64])
    assert len(Changes.concat([])) == len(Changes.empty()) == 0
