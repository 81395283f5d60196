"""Which worlds are run: those of ``make test``, or one seed by name (``--sim-seed=123``)."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--sim-seed", type=int, help="run this one simulated world and no other")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with ``seeds`` runs all of its module's; with ``--sim-seed`` the first runs that."""
    if "seeds" not in metafunc.fixturenames:
        return
    # Not there when the whole suite is run: pytest then finds this file too late to ask it.
    chosen: int | None = metafunc.config.getoption("--sim-seed", default=None)
    ranges: list[range] = metafunc.function.seed_ranges
    if chosen is not None:
        ranges = [range(chosen, chosen + 1)]
    metafunc.parametrize("seeds", ranges, ids=lambda r: f"{r.start}-{r.stop - 1}")
