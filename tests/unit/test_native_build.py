"""Compiling the native libraries: what an install does where the compiler is missing or fails."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.source_tree import ROOT


@pytest.fixture
def build() -> ModuleType:
    """`native/compile.py`, which is a script and in no package."""
    spec = importlib.util.spec_from_file_location("native_compile", ROOT / "native" / "compile.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("compiler", "complaint"),
    [
        (["no-such-compiler"], "no-such-compiler cannot be run: No such file or directory"),
        ([sys.executable, "-c", "raise SystemExit('no vectors')"], "ended with status 1"),
    ],
)
def test_a_failed_compilation_is_a_sentence_and_leaves_no_old_library(
    tmp_path: Path, build: ModuleType, compiler: list[str], complaint: str
) -> None:
    (tmp_path / "libleaves.so").write_bytes(b"of an older source")
    made, said = build.compile_all(compiler, tmp_path)
    assert made == []
    assert complaint in said
    assert list(tmp_path.iterdir()) == []


def test_a_fault_with_one_library_is_not_forgotten_over_the_next(
    tmp_path: Path, build: ModuleType
) -> None:
    script = (
        "import sys; from pathlib import Path\n"
        "target = Path(sys.argv[sys.argv.index('-o') + 1])\n"
        "sys.exit('not this one') if target.stem == 'libleaves' else target.touch()\n"
    )
    made, said = build.compile_all([sys.executable, "-c", script], tmp_path)
    assert "not this one" in said
    assert [path for path in tmp_path.iterdir() if path not in made] == []
    assert tmp_path / "libleaves.so" not in made
