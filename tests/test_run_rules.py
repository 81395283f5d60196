"""The rules of `tests/conftest.py`, each on a small test run of its own, and `tests/shares.py`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.shares import share_of
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
NO_MODULE = "import pytest\n\npytest.skip('nothing here', allow_module_level=True)\n"
IMPORTS = """
import pytest

MARK
def test_imports():
    import torch
"""


SHARED = ("-p", "xdist.plugin", "-n", "2")
ALONE_AND_SHARED = pytest.mark.parametrize("how", [(), SHARED], ids=["alone", "shared"])


def run(folder: Path, test: str, allowed: str, how: tuple[str, ...] = ()) -> tuple[int, str]:
    """The exit status and output of a run of one file under the project's conftest."""
    (folder / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n    engine\n    cluster\n")
    (folder / "test_small.py").write_text(test)
    (folder / "allowed").write_text(allowed)
    (folder / "torch.py").write_text("")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--allowed-skips=allowed"]
    # Other plugins take a second; what a shared run tells its processes is not for these.
    kept = {name: value for name, value in os.environ.items() if "PYTEST" not in name}
    alone = kept | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, *how], cwd=folder, env=alone, capture_output=True, text=True, check=False
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


def test_skips_count_in_a_run_that_processes_share(tmp_path: Path) -> None:
    status, output = run(tmp_path, SKIPS, "", SHARED)
    assert status == 1
    assert output.count("NOT ALLOWED TO SKIP: test_small.py::test_skips[namespaces]") == 1
    assert "1 passed, 1 skipped, 1 xfailed" in output
    assert run(tmp_path, SKIPS, "test_small.py\n", SHARED)[0] == 0


@ALONE_AND_SHARED
def test_skipped_modules_are_skips(tmp_path: Path, how: tuple[str, ...]) -> None:
    status, output = run(tmp_path, NO_MODULE, "", how)
    assert status != 0
    assert output.count("NOT ALLOWED TO SKIP: test_small.py") == 1


@ALONE_AND_SHARED
def test_run_in_which_nothing_passes_fails(tmp_path: Path, how: tuple[str, ...]) -> None:
    status, output = run(tmp_path, NO_MODULE, "test_small.py\n", how)
    assert status != 0
    assert "NO TEST PASSED" in output


def test_only_marked_tests_import_engines(tmp_path: Path) -> None:
    assert run(tmp_path, IMPORTS.replace("MARK", "@pytest.mark.engine"), "")[0] == 0
    assert run(tmp_path, IMPORTS.replace("MARK", ""), "")[0] == 1


def test_a_process_gets_whole_files_all_of_ray_and_single_worlds() -> None:
    ray = ("tests/hold/test_hold_head.py", "tests/hold/test_warm_answers.py")
    assert {share_of(f"{file}::test_hold_it", ROOT) for file in ray} == {"ray"}
    file = "tests/hold/test_hold_nvme.py"
    assert {share_of(f"{file}::{test}", ROOT) for test in ("test_a[::1]", "test_b")} == {file}
    worlds = [f"tests/sim/test_worlds.py::test_worlds[{seeds}]" for seeds in ("0-9", "10-19")]
    assert [share_of(test, ROOT) for test in worlds] == worlds
