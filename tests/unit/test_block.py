"""The cell format: what is written is read, whatever else is a fault and never an exception."""

import struct
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.block import (
    FORMAT_VERSION,
    HEADER_BYTES,
    FormatFault,
    Header,
    header_digest,
    leaf_digest,
    leaf_digests,
    leaf_seeds,
    parse_header,
    payload_leaves,
)
from kvstore.cell import BLOCK_TOKENS_MAX, CELL_BYTES_MAX, CELLS_MAX, LAYERS_MAX
from tests.worlds import key_number

U32 = (1 << 32) - 1
U64 = (1 << 64) - 1
HEADER = Header(
    key=key_number(1), cell=5, tokens=64, payload_bytes=9216, depth=77, span=0x0123456789ABCDEF,
    leaf_digests=(1, 2, U64),
)  # fmt: skip
PINNED = ["abdc8ec1142c6db3", "0d355792fab28c19"]
PINNED_HEADER = "58bef80954797a67"
HEADERS = st.builds(
    Header,
    key=st.binary(min_size=32, max_size=32),
    cell=st.integers(0, CELLS_MAX - 1),
    tokens=st.integers(1, BLOCK_TOKENS_MAX),
    payload_bytes=st.integers(1, CELL_BYTES_MAX),
    depth=st.integers(0, U32),
    span=st.integers(0, U64),
    leaf_digests=st.lists(st.integers(0, U64), min_size=1, max_size=40).map(tuple),
)


def page_of(header: Header) -> bytearray:
    return bytearray(header.pack().ljust(HEADER_BYTES, b"\0"))


def with_field(offset: int, kind: str, value: int) -> bytes:
    page = page_of(HEADER)
    struct.pack_into(kind, page, offset, value)
    return bytes(page)


def random_leaf(shape: tuple[int, int, int], seed: int = 0) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(HEADERS)
def test_what_is_packed_is_parsed(header: Header) -> None:
    page = page_of(header)
    assert parse_header(bytes(page)) == header
    assert parse_header(memoryview(page), header_digest(header.pack())) == header


def test_layout_is_the_published_one() -> None:
    page = bytes(page_of(HEADER))
    assert page[:8] == b"SMVR" + bytes([1, 0, 5, 0])
    assert struct.unpack_from("<IIIIQ", page, 8) == (64, 9216, 77, 3, 0x0123456789ABCDEF)
    assert page[32:64] == key_number(1)
    assert struct.unpack_from("<3Q", page, 64) == (1, 2, U64)
    assert not any(page[64 + 24 :])


def test_the_largest_header_fits_its_page() -> None:
    header = replace(HEADER, leaf_digests=tuple(range(LAYERS_MAX)))
    assert len(header.pack()) <= HEADER_BYTES
    assert parse_header(bytes(page_of(header))) == header


FAULTS = {
    FormatFault.TOO_SHORT: [b"", bytes(page_of(HEADER))[:63], bytes(page_of(HEADER))[:87]],
    FormatFault.BAD_MAGIC: [bytes(HEADER_BYTES), with_field(0, "<I", 1)],
    FormatFault.BAD_VERSION: [with_field(4, "<H", v) for v in (0, FORMAT_VERSION + 1, 65535)],
    FormatFault.BAD_CELL: [with_field(6, "<H", v) for v in (CELLS_MAX, 65535)],
    FormatFault.BAD_TOKENS: [with_field(8, "<I", v) for v in (0, BLOCK_TOKENS_MAX + 1, U32)],
    FormatFault.BAD_LENGTH: [with_field(12, "<I", v) for v in (0, CELL_BYTES_MAX + 1, U32)],
    FormatFault.BAD_LEAVES: [with_field(20, "<I", v) for v in (0, LAYERS_MAX + 1, U32)],
    FormatFault.BAD_DIGEST: [with_field(16, "<I", 78), with_field(64, "<Q", 0)],
}


@pytest.mark.parametrize("fault", FormatFault)
def test_every_fault_is_found(fault: FormatFault) -> None:
    digest = header_digest(HEADER.pack())
    for page in FAULTS[fault]:
        assert parse_header(page, digest) is fault
        if fault is not FormatFault.BAD_DIGEST:
            assert parse_header(page) is fault


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.binary(max_size=200), st.booleans(), st.one_of(st.none(), st.integers(0, U64)))
def test_any_bytes_parse_or_fault(tail: bytes, magic: bool, digest: int | None) -> None:
    page = (b"SMVR\x01\x00" if magic else b"") + tail
    parsed = parse_header(page, digest)
    assert isinstance(parsed, Header | FormatFault)
    if isinstance(parsed, Header):
        assert page.startswith(parsed.pack())


def test_every_flipped_bit_of_a_header_is_found() -> None:
    packed = HEADER.pack()
    digest = header_digest(packed)
    page = page_of(HEADER)
    for bit in range(8 * len(packed)):
        page[bit // 8] ^= 1 << bit % 8
        assert isinstance(parse_header(bytes(page), digest), FormatFault), f"bit {bit}"
        page[bit // 8] ^= 1 << bit % 8
    assert parse_header(bytes(page), digest) == HEADER


def test_every_flipped_bit_of_a_leaf_is_found() -> None:
    leaf = random_leaf((2, 3, 5))
    right = leaf_digest(leaf, 7)
    flat = leaf.reshape(-1)
    for bit in range(8 * flat.size):
        flat[bit // 8] ^= 1 << bit % 8
        assert leaf_digest(leaf, 7) != right, f"bit {bit}"
        flat[bit // 8] ^= 1 << bit % 8


def test_equal_bytes_elsewhere_have_another_digest() -> None:
    leaf = random_leaf((2, 16, 8))
    digests = [
        digest
        for key in (key_number(1), key_number(2))
        for cell in (0, 1, 63)
        for digest in leaf_digests(key, cell, [leaf] * LAYERS_MAX)
    ]
    assert len(set(digests)) == 2 * 3 * LAYERS_MAX


def test_seeds_stay_64_bits_wide() -> None:
    for number in range(50):
        assert all(0 <= seed <= U64 for seed in leaf_seeds(key_number(number), 63, LAYERS_MAX))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 300), st.integers(0, U64))
def test_where_heads_lie_does_not_matter(heads: int, tokens: int, row: int, seed: int) -> None:
    leaf = random_leaf((heads, tokens, row))
    pool = np.zeros((3 * heads, tokens + 2, row), np.uint8)
    apart = pool[1::3, 1 : 1 + tokens]
    apart[:] = leaf
    assert leaf_digest(apart, seed) == leaf_digest(leaf, seed)
    backwards = leaf[::-1].copy()[::-1]
    assert leaf_digest(backwards, seed) == leaf_digest(leaf, seed)


def test_digests_are_pinned() -> None:
    """A digest that changed would make every stored cell unreadable."""
    leaf = (np.arange(2 * 16 * 8) % 251).astype(np.uint8).reshape(2, 16, 8)
    assert [f"{d:016x}" for d in leaf_digests(bytes(range(32)), 3, [leaf, leaf])] == PINNED
    assert f"{header_digest(replace(HEADER, key=bytes(range(32))).pack()):016x}" == PINNED_HEADER


def test_a_payload_is_its_leaves_one_after_the_other() -> None:
    shapes = [(2, 3, 4), (1, 3, 8), (2, 3, 1)]
    payload = np.arange(24 + 24 + 6, dtype=np.uint8)
    leaves = payload_leaves(payload, shapes)
    assert [leaf.shape for leaf in leaves] == shapes
    assert np.concatenate([leaf.reshape(-1) for leaf in leaves]).tolist() == payload.tolist()
    leaves[1][0, 0, 0] = 200
    assert payload[24] == 200, "views, not copies"
    with pytest.raises(AssertionError, match="disagree"):
        payload_leaves(payload, shapes[:2])
