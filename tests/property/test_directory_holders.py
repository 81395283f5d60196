"""The packed holder table against a dict, with few keys, many of which share their buckets."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.changes import Words
from kvstore.holders import HolderTable

KEYS = 40
NODES = 5

Batch = tuple[int, dict[int, tuple[int, int]]]
masks = st.sampled_from([0, 1, 2, 3, 1 << 63, (1 << 64) - 1])
batches = st.tuples(
    st.integers(0, NODES - 1),
    st.dictionaries(st.integers(0, KEYS - 1), st.tuples(masks, masks), max_size=KEYS),
)


def words_of(keys: list[int]) -> Words:
    """Keys that differ in one word only, whichever that is: nothing may rest on randomness."""
    words = np.zeros((len(keys), 4), np.uint64)
    for row, key in enumerate(keys):
        words[row, key % 4] = key + 1
    return words


def check_equal(table: HolderTable, model: dict[tuple[int, int], int]) -> None:
    located = table.locate(words_of(list(range(KEYS))), NODES)
    rows = np.repeat(np.arange(KEYS), located.counts).tolist()
    found = list(zip(rows, located.nodes.tolist(), located.masks.tolist(), strict=True))
    assert {(key, node): mask for key, node, mask in found} == model
    assert len(found) == len(model) == len(table)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(batches, st.integers(0, NODES - 1)), max_size=12))
def test_equals_a_dict(steps: list[Batch | int]) -> None:
    table = HolderTable()
    model: dict[tuple[int, int], int] = {}
    for step in steps:
        if isinstance(step, int):
            table.drop(step)
            model = {pair: mask for pair, mask in model.items() if pair[1] != step}
        else:
            node, edits = step
            gained = [gain for gain, _ in edits.values()]
            lost = [loss for _, loss in edits.values()]
            before, after = table.update(
                words_of(list(edits)), node, np.array(gained, np.uint64), np.array(lost, np.uint64)
            )
            for row, (key, (gain, loss)) in enumerate(edits.items()):
                old = model.pop((key, node), 0)
                new = (old | gain) & ~loss
                assert (int(before[row]), int(after[row])) == (old, new)
                if new:
                    model[key, node] = new
        check_equal(table, model)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 3000))
def test_growth_and_shrinking_lose_nothing(seed: int, count: int) -> None:
    random = np.random.default_rng(seed)
    words = random.integers(0, 1 << 63, (count, 4)).astype(np.uint64)
    table = HolderTable()
    one, none = np.ones(count, np.uint64), np.zeros(count, np.uint64)
    table.update(words, 1, one, none)
    table.update(words[::2], 2, one[::2] * np.uint64(6), none[::2])
    full_bytes = table.nbytes
    table.drop(1)
    located = table.locate(words, 4)
    assert (located.counts == (np.arange(count) % 2 == 0)).all()
    assert (located.nodes == 2).all()
    assert (located.masks == 6).all()
    table.update(words[::2], 2, none[::2], one[::2] * np.uint64(6))
    assert len(table) == 0
    assert table.nbytes <= min(full_bytes, 16_384)
