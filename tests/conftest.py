"""For all tests: results go to a temporary folder, few threads are used, and in CI a skipped test is a failure."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import settings

# On a busy machine an example may take long; pytest's timeout is the limit that counts.
settings.register_profile("itl", deadline=None, max_examples=50)
settings.register_profile("fuzz", deadline=None, max_examples=5_000)  # `make fuzz`
settings.load_profile("itl")

# One thread: small models gain little from a second, and wait for it where cores are busy. Before torch is imported,
# here and in the kernels and commands that tests start.
os.environ["OMP_NUM_THREADS"] = "1"


# Where the tests run in the background SIGINT is ignored, and so it would be in the processes that they interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder that takes the place of runs/."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ITL_RUNS", str(folder))
        yield folder


@pytest.fixture
def server() -> Iterator[Callable]:
    """A function that starts a server of chat completions with a script (see chat_server.py)."""
    from chat_server import Scripted

    started = []

    def start(script: Callable) -> Scripted:
        started.append(Scripted(script))
        threading.Thread(target=started[-1].serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return started[-1]

    yield start
    for one in started:
        one.shutdown()
        one.server_close()


class Answer(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def itl(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., Answer]:
    """A function that runs `itl` in this process and returns what it answered."""
    from lib.cli import app

    def run(*arguments: object) -> Answer:
        capsys.readouterr()
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit_:
            patch.setattr(sys, "argv", ["itl", *map(str, arguments)])
            app.main()
        return Answer(exit_.value.code or 0, *capsys.readouterr())

    return run


@pytest.fixture
def own_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of runs for this test alone, which is not there yet."""
    monkeypatch.setenv("ITL_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


@pytest.fixture
def paper_data(own_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty paper_data and an empty runs/ for this test alone."""
    from lib import paths

    (tmp_path / "paper_data").mkdir()
    monkeypatch.setattr(paths, "PAPER_DATA", tmp_path / "paper_data")
    return tmp_path / "paper_data"


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
