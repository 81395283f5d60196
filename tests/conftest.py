"""Rules for the whole test run: who may import what, which skips count, what runs in a row.

A test without the marker `engine` finds torch and transformers unimportable, one without the
marker `cluster` finds ray so, whatever an earlier test imported. With `--allowed-skips=FILE` a skip
that FILE does not name fails the run, and so does a run in which no test passed. Several processes
share a run by `tests/shares.py`.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Helpers assert as well; what they found is to be said, and not only that it was wrong.
pytest.register_assert_rewrite(
    *(f"tests.{path.stem}" for path in Path(__file__).parent.iterdir() if path.stem != "conftest")
)

ENGINE_MODULES = ("torch", "transformers")
CLUSTER_MODULES = ("ray",)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--allowed-skips", type=Path, help="file with the tests that may be skipped")


def pytest_configure(config: pytest.Config) -> None:
    path: Path | None = config.getoption("--allowed-skips")
    if path is not None:
        config.pluginmanager.register(SkipGate(allowed_names(path.read_text())), "skip-gate")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    from tests.shares import Shares  # it imports xdist, which only a shared run needs

    return Shares(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Takes modules away for set-up, call and teardown of the tests that do not ask for them."""
    away: list[str] = []
    if item.get_closest_marker("engine") is None:
        away += ENGINE_MODULES
    if item.get_closest_marker("cluster") is None:
        away += CLUSTER_MODULES
    imported = {name: sys.modules[name] for name in away if name in sys.modules}
    # None in sys.modules makes `import name` raise ModuleNotFoundError.
    sys.modules.update(dict.fromkeys(away))  # type: ignore[arg-type]
    try:
        return (yield)
    finally:
        for name in away:
            del sys.modules[name]
        sys.modules.update(imported)


def allowed_names(text: str) -> frozenset[str]:
    """The node ids in an allowed-skips file, without comments."""
    lines = (line.split("#")[0].strip() for line in text.splitlines())
    return frozenset(line for line in lines if line)


class SkipGate:
    """Fails a run for skips that are not allowed by name, and for running nothing."""

    def __init__(self, allowed: frozenset[str]) -> None:
        self.allowed = allowed
        self.passed = 0
        self.refused: list[str] = []

    def is_allowed(self, node_id: str) -> bool:
        test = node_id.split("[")[0]
        return not self.allowed.isdisjoint((node_id, test, test.split("::")[0]))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.passed += report.when == "call" and report.passed
        expected_to_fail = hasattr(report, "wasxfail")
        if report.skipped and not expected_to_fail and not self.is_allowed(report.nodeid):
            self.refused.append(report.nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped and not self.is_allowed(report.nodeid):
            self.refused.append(report.nodeid)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if session.exitstatus == pytest.ExitCode.OK and (self.refused or not self.passed):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for node_id in self.refused:
            terminalreporter.write_line(f"NOT ALLOWED TO SKIP: {node_id}", red=True)
        if not self.passed:
            terminalreporter.write_line("NO TEST PASSED", red=True)
