"""Published test vectors of keys: `python -m tests.key_vectors` prints docs/key_vectors.json.

The file is the promise that keys never change. It was generated once; `tests/unit/test_key.py`
compares it with what the code computes, and any difference is a new format version.
"""

import json
from typing import Any

from kvstore.cell import Grid
from kvstore.key import Chain
from kvstore.namespace import Namespace

NAMESPACES = {
    "plain": Namespace(
        weights="00" * 32, kv_form="rope:default", dtype="float32", attention="gqa",
        grid=Grid((256,) * 2, kv_heads=2, block_tokens=16),
    ),
    "every field": Namespace(
        weights="0123456789abcdef" * 4, kv_form="rope:llama3/8.0", dtype="bfloat16",
        attention="mla", adapter="fe" * 32, tenant="Müller & Söhne", tenant_epoch=7,
        salt=b"\x00\xffsalt",
        grid=Grid((1152, 64, 1152), kv_heads=4, block_tokens=64, layer_ranges=3, head_groups=2),
    ),
}  # fmt: skip
PROMPTS: dict[str, dict[str, Any]] = {
    "empty": {"tokens": []},
    "one token": {"tokens": [0], "boundaries": [1]},
    "whole blocks": {"tokens": list(range(64)), "boundaries": [64]},
    "ends inside a block": {"tokens": list(range(70)), "boundaries": [3, 17, 69, 70]},
    "limits": {"tokens": [0, 2**31 - 1] * 32, "boundaries": [63]},
    "extra bytes": {
        "tokens": list(range(100)),
        "boundaries": [100],
        "extras": {"0": "00", "1": "deadbeef", "6": "01020304"},
    },
}


def chain_of(namespace: Namespace, prompt: dict[str, Any]) -> Chain:
    """The chain of a prompt as it stands in the file: extras by decimal index, in hex."""
    extras = {int(i): bytes.fromhex(text) for i, text in prompt.get("extras", {}).items()}
    return Chain.of(namespace, prompt["tokens"], prompt.get("boundaries", []), extras)


def vectors() -> list[dict[str, Any]]:
    """Every prompt in every namespace."""
    rows = []
    for name, namespace in NAMESPACES.items():
        for title, prompt in PROMPTS.items():
            chain = chain_of(namespace, prompt)
            rows.append(
                {
                    "namespace": name,
                    "prompt": title,
                    **prompt,
                    "namespace_digest": namespace.digest.hex(),
                    "block_keys": [key.tobytes().hex() for key in chain.keys],
                    "tail_keys": {str(end): key.hex() for end, key in chain.tails.items()},
                    "first_span": f"{chain.first_span:016x}",
                }
            )
    return rows


def as_json(rows: list[dict[str, Any]]) -> str:
    """One vector a line, so that a difference is easy to see."""
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    return f"[\n{lines}\n]\n"


if __name__ == "__main__":
    print(as_json(vectors()), end="")
