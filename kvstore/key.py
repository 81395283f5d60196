"""Block keys: the same tokens give the same key in every process, forever.

A key is BLAKE3 in keyed mode. The key of the hash is the parent block's key (for the first block
the namespace digest). The message of a full block is its token ids, int32 little-endian, and
nothing else: this is the hot loop of every look-up. A tail, or a block with extra bytes, has a
frame behind its tokens:

    token ids | extra bytes | number of tokens, u32 | length of extra, u32 | zeros

with as many zeros as make the message's length 1 modulo 4, which no full block's is. So a block's
key stands for all tokens before it too, a tail never collides with a full block, and no extra can
be mistaken for tokens. ``docs/key_vectors.json`` publishes test vectors.

    tokens   0 ......... B ......... 2B ......... 3B ... boundary
    blocks   [   key 0   ][   key 1   ][   key 2   ][ tail ]      tail: ends a named boundary
                                                                  exactly and has no children

A chain is also cut into *spans*, whose first tokens double from 512: [0, 512), [512, 1024),
[1024, 2048), ... A span is what the directory places, so a prompt of any length asks few homes.
A span is named by the key before it, which a tail and a full block at its start have in common;
the first span, which has only the namespace before it, by its first 16 tokens.
"""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NewType

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from kvstore.cell import BLOCK_TOKENS_MIN
from kvstore.errors import GeometryError
from kvstore.namespace import Namespace

KEY_BYTES = 32
SPAN_FIRST_TOKENS = 512
PROMPT_TOKENS_MAX = 1 << 24
EXTRA_BYTES_MAX = 4096
BOUNDARIES_MAX = 64

BlockKey = NewType("BlockKey", bytes)
Tokens = npt.NDArray[np.int32]
Keys = npt.NDArray[np.uint8]
"""Packed keys, uint8 ``[n, 32]``."""


def as_keys(packed: bytes) -> Keys:
    """Keys that lie one behind the other."""
    return np.frombuffer(packed, np.uint8).reshape(-1, KEY_BYTES)


def as_tokens(tokens: Sequence[int] | npt.NDArray[np.integer]) -> Tokens:
    """Token ids as int32; refuses what does not fit instead of wrapping it."""
    array = np.asarray(tokens)
    if array.ndim != 1:
        raise GeometryError(f"token ids must be one-dimensional, got shape {array.shape}")
    if array.size == 0:
        return np.empty(0, np.int32)
    if array.dtype.kind not in "iu":
        raise GeometryError(f"token ids must be integers, got {array.dtype}")
    if array.size > PROMPT_TOKENS_MAX:
        raise GeometryError(f"a prompt of {array.size} tokens is over {PROMPT_TOKENS_MAX}")
    low, high = int(array.min()), int(array.max())
    if low < 0 or high > np.iinfo(np.int32).max:
        raise GeometryError(f"token ids must be 0 to 2**31 - 1, got {low if low < 0 else high}")
    return np.ascontiguousarray(array, dtype="<i4")


def framed_key(parent: bytes, tokens: Tokens, extra: bytes = b"") -> BlockKey:
    """The key of the tail (or block with extra bytes) of ``tokens`` that follows ``parent``."""
    body = tokens.tobytes() + extra + struct.pack("<II", len(tokens), len(extra))
    zeros = (1 - len(body)) % 4
    return BlockKey(blake3(body + bytes(zeros), key=parent).digest())


@dataclass(frozen=True, slots=True)
class BlockSpan:
    """Where a block stands in its prompt: ``index`` in the chain, tokens ``[start, stop)``."""

    index: int
    start: int
    stop: int


@dataclass(frozen=True)
class Chain:
    """The keys of one prompt: full blocks in order, then tails by their boundary.

    ``keys`` is uint8 ``[blocks, 32]``; ``tails`` maps a boundary (in tokens) that is not a whole
    number of blocks to the key of the tail that ends there; ``first_span`` names the first span.
    """

    block_tokens: int
    tokens: int
    keys: Keys
    tails: Mapping[int, BlockKey]
    first_span: int

    @classmethod
    def of(
        cls,
        namespace: Namespace,
        tokens: Sequence[int] | npt.NDArray[np.integer],
        boundaries: Sequence[int] = (),
        extras: Mapping[int, bytes] | None = None,
    ) -> "Chain":
        """Hash a prompt. ``extras`` gives block indexes the digests of what is not a token."""
        ids = as_tokens(tokens)
        size = namespace.grid.block_tokens
        extras = extras or {}
        if any(len(extra) > EXTRA_BYTES_MAX for extra in extras.values()):
            raise GeometryError(f"extra bytes of a block are over {EXTRA_BYTES_MAX}: digest them")
        blocks = _full_block_keys(namespace.digest, ids, size, extras)
        tails = {}
        for boundary in _checked(boundaries, len(ids)):
            index, rest = divmod(boundary, size)
            if rest:
                parent = blocks[index - 1] if index else namespace.digest
                start = index * size
                tails[boundary] = framed_key(parent, ids[start:boundary], extras.get(index, b""))
        first_span = _span_name(framed_key(namespace.digest, ids[:BLOCK_TOKENS_MIN]))
        return cls(size, len(ids), as_keys(b"".join(blocks)), tails, first_span)

    @property
    def blocks(self) -> int:
        """How many full blocks the prompt has."""
        return len(self.keys)

    def block(self, index: int) -> BlockSpan:
        """Where full block ``index`` stands."""
        return BlockSpan(index, index * self.block_tokens, (index + 1) * self.block_tokens)

    def tail(self, boundary: int) -> BlockSpan:
        """Where the tail that ends at ``boundary`` stands."""
        index = boundary // self.block_tokens
        return BlockSpan(index, index * self.block_tokens, boundary)

    def span(self, index: int) -> int:
        """The 64-bit name of the span that block (or tail) ``index`` is in."""
        head = span_head(index, self.block_tokens)
        return self.first_span if head == 0 else _span_name(self.keys[head - 1].tobytes())

    def spans(self, indexes: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
        """``span`` of many blocks, uint64 ``[n]``."""
        if not len(indexes):
            return np.empty(0, np.uint64)
        heads = [0]
        after, last = SPAN_FIRST_TOKENS, int(indexes.max()) * self.block_tokens
        while after <= last:
            heads.append(-(-after // self.block_tokens))
            after *= 2
        names = np.array([self.span(head) for head in heads], np.uint64)
        return names[np.searchsorted(heads, indexes, "right") - 1]


def span_head(index: int, block_tokens: int) -> int:
    """The first block of the span that block ``index`` is in."""
    token = index * block_tokens
    if token < SPAN_FIRST_TOKENS:
        return 0
    return (1 << token.bit_length() - 1) // block_tokens


def _span_name(key: bytes) -> int:
    return int.from_bytes(key[:8], "little")


def _full_block_keys(
    root: bytes, ids: Tokens, size: int, extras: Mapping[int, bytes]
) -> list[bytes]:
    """One hash per block, nothing else."""
    parent = root
    messages = struct.iter_unpack(f"{size * 4}s", ids[: len(ids) // size * size].tobytes())
    if not extras:  # the hot loop of every look-up
        return [parent := blake3(message, key=parent).digest() for (message,) in messages]
    keys: list[bytes] = []
    for index, (message,) in enumerate(messages):
        if extra := extras.get(index):
            parent = framed_key(parent, ids[index * size : (index + 1) * size], extra)
        else:
            parent = blake3(message, key=parent).digest()
        keys.append(parent)
    return keys


def _checked(boundaries: Sequence[int], tokens: int) -> list[int]:
    if len(boundaries) > BOUNDARIES_MAX:
        raise GeometryError(f"{len(boundaries)} boundaries are over {BOUNDARIES_MAX}")
    for boundary in boundaries:
        if not 0 < boundary <= tokens:
            raise GeometryError(f"boundary {boundary} is outside the prompt of {tokens} tokens")
    return sorted(set(boundaries))
