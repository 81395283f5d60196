"""Generates the gRPC stubs in `kvstore/rpc/` from the contract in `proto/`.

One file, two uses: a step of every wheel and editable install (`hatch_build.py`), and a script for
whoever changes a `.proto` (`python proto/generate.py`, with grpcio-tools 1.76.0 installed; `make`
does it through an install).

The path below `proto/` mirrors the package, so protoc writes `from kvstore.rpc import ...` and
nothing has to be patched. The stubs are git-ignored: there is no copy that could drift.
"""

import tempfile
from importlib import resources
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path("kvstore/rpc")
#: The first line of every stub. mypy knows no pattern for `*_pb2` in its own settings.
UNTYPED = b"# mypy: ignore-errors\n"


def generate(root: Path) -> list[Path]:
    """Replaces all stubs below `root` by those of the present contract; raises if protoc fails.

    The old stubs stay until the new ones are whole, so a broken `.proto` breaks no checkout.
    """
    protos = sorted((root / "proto" / PACKAGE).glob("*.proto"))
    with tempfile.TemporaryDirectory() as folder:
        staged = Path(folder)
        if protos:
            run_protoc(root / "proto", protos, staged)
        fresh = {path.name: path.read_bytes() for path in (staged / PACKAGE).glob("*_pb2*.py*")}
    target = root / PACKAGE
    for stale in target.glob("*_pb2*.py*"):
        if stale.name not in fresh:
            stale.unlink()
    for name, content in fresh.items():
        (target / name).write_bytes(UNTYPED + content)
    return [target / name for name in sorted(fresh)]


def run_protoc(include: Path, protos: list[Path], output: Path) -> None:
    """Messages with their types (`.pyi`), services without: protoc has no types for those."""
    well_known = resources.files("grpc_tools") / "_proto"
    status = protoc.main(
        [
            "protoc",
            f"-I{include}",
            f"-I{well_known}",
            f"--python_out={output}",
            f"--pyi_out={output}",
            f"--grpc_python_out={output}",
            *map(str, protos),
        ]
    )
    if status != 0:
        raise SystemExit(f"protoc failed with status {status} on {', '.join(map(str, protos))}")


if __name__ == "__main__":
    for stub in generate(ROOT):
        print(stub.relative_to(ROOT))
