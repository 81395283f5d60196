"""Namespaces: whatever decides KV changes the digest; nothing else does."""

from dataclasses import replace

import pytest

from kvstore.cell import Grid
from kvstore.errors import GeometryError
from kvstore.namespace import FIELD_BYTES_MAX, Namespace

GRID = Grid((256, 256), kv_heads=4, block_tokens=64, head_groups=2)
PLAIN = Namespace("00ff", "rope:default", "float32", "gqa", GRID)
OTHERS = {
    "weights": replace(PLAIN, weights="00fe"),
    "kv_form": replace(PLAIN, kv_form="rope:linear"),
    "dtype": replace(PLAIN, dtype="bfloat16"),
    "attention": replace(PLAIN, attention="mla"),
    "adapter": replace(PLAIN, adapter="01"),
    "tenant": replace(PLAIN, tenant="a"),
    "tenant epoch": replace(PLAIN, tenant_epoch=1),
    "salt": replace(PLAIN, salt=b"\0"),
    "row bytes": replace(PLAIN, grid=replace(GRID, row_bytes=(256, 255))),
    "layers": replace(PLAIN, grid=replace(GRID, row_bytes=(256, 256, 256))),
    "KV heads": replace(PLAIN, grid=replace(GRID, kv_heads=8)),
    "block tokens": replace(PLAIN, grid=replace(GRID, block_tokens=32)),
    "layer ranges": replace(PLAIN, grid=replace(GRID, layer_ranges=2)),
    "head groups": replace(PLAIN, grid=replace(GRID, head_groups=4)),
}


@pytest.mark.parametrize("what", OTHERS)
def test_every_field_separates(what: str) -> None:
    assert OTHERS[what].digest != PLAIN.digest


def test_equal_fields_share() -> None:
    assert replace(PLAIN).digest == PLAIN.digest
    assert len({namespace.digest for namespace in OTHERS.values()}) == len(OTHERS)


def test_text_does_not_move_between_fields() -> None:
    one = replace(PLAIN, adapter="ab", tenant="c")
    two = replace(PLAIN, adapter="a", tenant="bc")
    three = replace(PLAIN, adapter="", tenant="abc")
    assert len({one.digest, two.digest, three.digest}) == 3


def test_salt_is_not_shown() -> None:
    assert "geheim" not in repr(replace(PLAIN, salt=b"geheim"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weights": ""}, "needs weights"),
        ({"dtype": ""}, "needs dtype"),
        ({"tenant_epoch": -1}, "tenant_epoch"),
        ({"tenant_epoch": 1 << 63}, "tenant_epoch"),
        ({"kv_form": "x" * (FIELD_BYTES_MAX + 1)}, "use its digest"),
        ({"tenant": "ü" * (FIELD_BYTES_MAX // 2 + 1)}, "use its digest"),
        ({"salt": bytes(FIELD_BYTES_MAX + 1)}, "use its digest"),
    ],
)
def test_impossible_namespaces_are_refused(change: dict[str, object], words: str) -> None:
    with pytest.raises(GeometryError, match=words):
        replace(PLAIN, **change)  # type: ignore[arg-type]
