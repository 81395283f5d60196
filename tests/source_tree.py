"""The project's own files, parsed, for the style tests.

Covers: which files there are, their modules, imports and functions. Does not cover: the rules (see
`tests/test_tidy.py`). Generated stubs are left out.
"""

import ast
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("kvstore", "worker")


@dataclass(frozen=True, slots=True)
class Module:
    """One source file, parsed."""

    name: str
    path: Path
    tree: ast.Module
    lines: int

    def at(self, node: ast.stmt | ast.expr) -> str:
        return f"{self.path.relative_to(ROOT)}:{node.lineno}"


@dataclass(frozen=True, slots=True)
class Import:
    """One imported thing: `target` is the module, `names` what is taken out of it."""

    node: ast.Import | ast.ImportFrom
    target: str
    names: tuple[str, ...]


@cache
def project_files() -> tuple[Path, ...]:
    """Every file that is or would be committed, but for what others wrote and generators make."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode == 0:
        paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    else:
        folders = ("kvstore", "worker", "proto", "native", "tests", "benchmarks", "docs", "deploy")
        paths = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    foreign = re.compile(r"_pb2(_grpc)?\.pyi?$|/__pycache__/|/native/xxhash\.h$")
    return tuple(sorted(p for p in paths if p.is_file() and not foreign.search(str(p))))


@cache
def modules(*folders: str) -> tuple[Module, ...]:
    """The Python modules below these folders of the repository."""
    found = []
    for path in project_files():
        relative = path.relative_to(ROOT)
        if path.suffix == ".py" and relative.parts[0] in folders:
            parts = relative.with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            text = path.read_text()
            found.append(Module(name, path, ast.parse(text, str(path)), len(text.splitlines())))
    return tuple(found)


def imports(module: Module) -> Iterator[Import]:
    """All imports, those inside functions and for type checkers too."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node, alias.name, ())
        elif isinstance(node, ast.ImportFrom):
            yield Import(node, node.module or "", tuple(alias.name for alias in node.names))


def imported_modules(found: Import) -> tuple[str, ...]:
    """The modules of ours that an import loads: `from kvstore.rpc import x` loads kvstore.rpc.x."""
    children = [f"{found.target}.{name}" for name in found.names]
    submodules = tuple(child for child in children if module_file(child) is not None)
    return submodules or (found.target,)


def module_file(name: str) -> Path | None:
    base = ROOT.joinpath(*name.split("."))
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.is_file():
            return path
    return None


def is_within(name: str, owner: str) -> bool:
    return name == owner or name.startswith(owner + ".")


def is_ours(name: str) -> bool:
    return name.split(".")[0] in (*PACKAGES, "benchmarks")


def functions(module: Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def unannotated(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """What of a signature has no annotation; the first argument may be self or cls."""
    arguments = function.args
    positional = [*arguments.posonlyargs, *arguments.args]
    named = [a for a in positional if positional.index(a) > 0 or a.arg not in ("self", "cls")]
    extra = [a for a in (arguments.vararg, arguments.kwarg) if a is not None]
    bare = [a.arg for a in (*named, *arguments.kwonlyargs, *extra) if a.annotation is None]
    return bare + (["the result"] if function.returns is None else [])
