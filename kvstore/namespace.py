"""Namespaces: everything besides the token ids that decides what a KV block contains.

Two engines share blocks exactly when their namespaces are equal, because the root of every key
chain is the namespace's digest. What may be put into a namespace, and when two engines may be
given the same one, is the engine side's business (see ``worker.weights`` and ``worker.geometry``).
"""

import struct
from dataclasses import dataclass, field
from functools import cached_property

from blake3 import blake3

from kvstore.cell import Grid
from kvstore.errors import GeometryError

NAMESPACE_VERSION = 1
FIELD_BYTES_MAX = 1024


@dataclass(frozen=True)
class Namespace:
    """What besides the tokens determines KV, and whose it is.

    ``weights``    digest of the tensor files and the KV-relevant configuration, hex
    ``kv_form``    resolved RoPE, channel basis, quantisation mode, numerics family of the engine
    ``dtype``      element type of K and V, by name ("float32", "bfloat16", "fp8_e4m3", ...)
    ``attention``  kind of attention ("gqa", "mla", ...)
    ``grid``       shape of a block and its cells
    ``adapter``    digest of the adapter's content, "" for none
    ``tenant``     whose blocks these are, and ``tenant_epoch``, which erasing a tenant raises
    ``salt``       separates callers who must not share
    """

    weights: str
    kv_form: str
    dtype: str
    attention: str
    grid: Grid
    adapter: str = ""
    tenant: str = ""
    tenant_epoch: int = 0
    salt: bytes = field(default=b"", repr=False)

    def __post_init__(self) -> None:
        for name, value in (("weights", self.weights), ("dtype", self.dtype)):
            if not value:
                raise GeometryError(f"a namespace needs {name}: an empty one would match anything")
        if not 0 <= self.tenant_epoch < 1 << 63:
            raise GeometryError(f"tenant_epoch must be 0 to 2**63 - 1, got {self.tenant_epoch}")
        for encoded in self._texts():
            if len(encoded) > FIELD_BYTES_MAX:
                raise GeometryError(
                    f"a namespace field of {len(encoded)} bytes is over {FIELD_BYTES_MAX}: "
                    "use its digest"
                )

    def _texts(self) -> tuple[bytes, ...]:
        words = (self.weights, self.kv_form, self.dtype, self.attention, self.adapter, self.tenant)
        return (*(word.encode() for word in words), self.salt)

    @cached_property
    def digest(self) -> bytes:
        """32 bytes: the root of the namespace's key chains, the same in every process."""
        grid = self.grid
        parts = [struct.pack("<I", NAMESPACE_VERSION)]
        parts += [struct.pack("<I", len(text)) + text for text in self._texts()]
        parts.append(struct.pack("<Q", self.tenant_epoch))
        shape = (grid.layers, grid.kv_heads, grid.block_tokens, grid.layer_ranges, grid.head_groups)
        parts.append(struct.pack("<5I", *shape))
        parts.append(struct.pack(f"<{grid.layers}I", *grid.row_bytes))
        return blake3(b"".join(parts), derive_key_context="samovar 2026 namespace v1").digest()
