"""The rules of `tests/conftest.py`, each on a small test run of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.source_tree import ROOT

SKIPS = """
import pytest

def test_passes():
    pass

@pytest.mark.parametrize("lacking", ["namespaces"])
def test_skips(lacking):
    pytest.skip(lacking)

@pytest.mark.xfail(strict=True)
def test_fails_as_expected():
    assert False
"""
ALONE = "import pytest\n\npytest.skip('nothing here', allow_module_level=True)\n"
IMPORTS = """
import pytest

MARK
def test_imports():
    import torch
"""


def run(folder: Path, test: str, allowed: str) -> tuple[int, str]:
    """The exit status and output of a run of one file under the project's conftest."""
    (folder / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n    engine\n    cluster\n")
    (folder / "test_small.py").write_text(test)
    (folder / "allowed").write_text(allowed)
    (folder / "torch.py").write_text("")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--allowed-skips=allowed"]
    alone = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # other plugins take a second
    done = subprocess.run(
        command, cwd=folder, env=alone, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout


@pytest.mark.parametrize(
    "allowed",
    [
        "test_small.py::test_skips[namespaces]  # a kernel with user namespaces\n",
        "# every parameter\ntest_small.py::test_skips\n",
        "test_small.py\n",
    ],
)
def test_allowed_skips_pass(tmp_path: Path, allowed: str) -> None:
    status, output = run(tmp_path, SKIPS, allowed)
    assert status == 0, output
    assert "1 passed, 1 skipped, 1 xfailed" in output


@pytest.mark.parametrize("allowed", ["", "# test_small.py\n", "test_small.py::test_skip\n"])
def test_other_skips_fail_the_run(tmp_path: Path, allowed: str) -> None:
    status, output = run(tmp_path, SKIPS, allowed)
    assert status == 1
    assert "NOT ALLOWED TO SKIP: test_small.py::test_skips[namespaces]" in output
    assert "1 passed, 1 skipped, 1 xfailed" in output


def test_skipped_modules_are_skips(tmp_path: Path) -> None:
    status, output = run(tmp_path, ALONE, "")
    assert status != 0
    assert "NOT ALLOWED TO SKIP: test_small.py" in output


def test_run_in_which_nothing_passes_fails(tmp_path: Path) -> None:
    status, output = run(tmp_path, ALONE, "test_small.py\n")
    assert status != 0
    assert "NO TEST PASSED" in output


def test_only_marked_tests_import_engines(tmp_path: Path) -> None:
    assert run(tmp_path, IMPORTS.replace("MARK", "@pytest.mark.engine"), "")[0] == 0
    assert run(tmp_path, IMPORTS.replace("MARK", ""), "")[0] == 1
