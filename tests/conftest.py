"""For all tests: results go to a temporary folder, few threads are used, and in CI a skipped test is a failure."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# On a busy machine an example may take long; pytest's timeout is the limit that counts.
settings.register_profile("itl", deadline=None)
settings.register_profile("fuzz", deadline=None, max_examples=5_000)  # `make fuzz`
settings.load_profile("itl")

# One thread: small models gain little from a second, and wait for it where cores are busy. Before torch is imported,
# here and in the kernels and commands that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")


# Where the tests run in the background SIGINT is ignored, and so it would be in the processes that they interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder that takes the place of runs/."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ITL_RUNS", str(folder))
        yield folder


@pytest.fixture(autouse=True)
def no_figure_stays_open() -> Iterator[None]:
    """What a test has drawn is closed after it."""
    yield
    if pyplot := sys.modules.get("matplotlib.pyplot"):
        pyplot.close("all")


def _fail_if_skipped_in_ci(report):
    if os.environ.get("CI") and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome, report.longrepr = "failed", f"skipped, which is a failure in CI: {report.longrepr[2]}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    return _fail_if_skipped_in_ci((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    return _fail_if_skipped_in_ci((yield))
