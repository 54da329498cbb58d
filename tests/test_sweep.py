"""Sweeps: every cell once, nothing repeated, and no cell's failure or death in the way of the others."""

import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from multiprocessing import Pipe
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib import experiments, paths, results, sweep
from lib.base import InputError
from lib.config import RunConfig
from lib.experiments import SIZES, Search


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def runs(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("ITL_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


def _snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in sorted(folder.rglob("*"))}


def _base(**groups) -> RunConfig:
    return RunConfig.parse(
        {"training": {"steps": 10}, "evaluation": {"every": None}, "facts": {"n_people": 2}, **groups}
    )


def _cell(seed: int = 0, **groups) -> Search:
    """A search of one run."""
    return Search(_base(seed=seed, **groups), threshold=None, sizes=(4,))


def _plan(monkeypatch, *plan: Search) -> None:
    for module in (sweep, results):
        monkeypatch.setattr(module, "searches", lambda section, profile: list(plan))


# ---- Real processes


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The smoke sweep, run once: its folder and its report."""
    folder = tmp_path_factory.mktemp("smoke")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ITL_RUNS", str(folder))
        patch.setenv("OMP_NUM_THREADS", "1")
        report = sweep.sweep("05_1", "smoke", jobs=2)
    return folder, report


def test_a_sweep_ends_with_a_row_for_every_cell(smoke, monkeypatch):
    folder, report = smoke
    monkeypatch.setenv("ITL_RUNS", str(folder))
    assert (report.done_now, report.done_before, report.missing, report.failed) == (2, 0, [], {})
    rows = results.read_rows("05_1", "smoke")
    planned = [config.run_id for search in experiments.searches("05_1", "smoke") for config in search.pending({})]
    assert sorted(rows.run_id) == sorted(planned)
    assert set(rows["mode"]) == {"in-weight", "in-tool"} and (rows.steps == 20).all()


def test_a_second_sweep_does_nothing_and_says_so_quickly(smoke, monkeypatch):
    folder, _ = smoke
    monkeypatch.setenv("ITL_RUNS", str(folder))
    monkeypatch.setattr(sweep, "_Worker", None)
    before, start = _snapshot(folder), time.monotonic()
    report = sweep.sweep("05_1", "smoke")
    assert time.monotonic() - start < 2
    assert (report.done_now, report.done_before, report.runs_ahead, report.hours_ahead) == (0, 2, 0, 0.0)
    assert str(report) == "0 runs done now, 2 before; nothing is missing"
    assert _snapshot(folder) == before


@pytest.mark.slow
def test_a_failing_cell_is_reported_and_the_others_go_on(runs, monkeypatch):
    bad, good = _cell(facts={"csv": "nobody.csv"}), _cell(seed=1)
    _plan(monkeypatch, bad, good)
    report = sweep.sweep("05_1", "smoke", jobs=1)
    (config,) = bad.pending({})
    assert list(report.failed) == [config.run_id]
    assert "InputError: cannot read people from nobody.csv" in report.failed[config.run_id]
    assert (report.done_now, [c.run_id for c in report.missing]) == (1, [config.run_id])
    assert f"failed: {config.run_id}" in str(report)
    assert list(results.read_rows("05_1", "smoke").seed) == [1]


@pytest.mark.slow
def test_a_worker_that_is_killed_loses_nothing(runs, monkeypatch):
    training = {"steps": 120, "checkpoint_every": 10}
    first, second = _cell(training=training), _cell(seed=1, training=training)
    _plan(monkeypatch, first, second)
    killed = []

    def kill_one_that_trains() -> None:
        while not killed:
            time.sleep(0.05)
            if list((runs / "smoke" / "05_1").glob("*/checkpoints/step_*")):
                worker = multiprocessing.active_children()[0]
                os.kill(worker.pid, signal.SIGKILL)
                killed.append(worker.pid)

    killer = Thread(target=kill_one_that_trains, daemon=True)
    killer.start()
    report = sweep.sweep("05_1", "smoke", jobs=2)
    killer.join(timeout=1)
    assert killed and not report.failed
    assert report.done_now == 2
    assert sorted(results.read_rows("05_1", "smoke").seed) == [0, 1]


def _children(pid: int) -> list[int]:
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    return [int(child) for child in listed.split()]


def _is_running(pid: int) -> bool:
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return bool(state) and not state.startswith("Z")


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_workers_do_not_outlive_a_sweep_that_is_killed_or_interrupted(runs, how):
    command = [sys.executable, "-m", "lib", "sweep", "05_1", "--profile", "laptop", "--jobs", "1"]
    environment = {**os.environ, "PYTHONPATH": str(paths.ROOT)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while not list(runs.glob("laptop/05_1/*/metrics.jsonl")) and time.monotonic() < deadline:
            time.sleep(0.1)
        workers = _children(process.pid)
        assert workers
        process.send_signal(how)
        _, err = process.communicate(timeout=150)
    finally:
        process.kill()
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert [line for line in err.splitlines() if "05_1: " not in line] == [
            "itl: interrupted: the same command goes on from here"
        ]
    deadline = time.monotonic() + 30
    while any(map(_is_running, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(_is_running, workers))


# ---- The order of things, without processes


class FakeWorkers:
    """Stands in for `_Worker`: answers at once, and remembers what it was asked."""

    def __init__(self, answer):
        self.answer, self.asked, self.busy, self.most_busy, self.closed = answer, [], 0, 0, 0

    def __call__(self, device: str) -> SimpleNamespace:
        ours, theirs = Pipe()

        def submit(config: RunConfig, directory: Path) -> None:
            assert directory.name == config.run_id
            self.asked.append(config.run_id)
            self.busy += 1
            self.most_busy = max(self.busy, self.most_busy)
            theirs.send(self.answer(config))

        def result():
            self.busy -= 1
            return ours.recv()

        def close() -> None:
            self.closed += 1

        process = SimpleNamespace(is_alive=lambda: True)
        return SimpleNamespace(pipe=ours, process=process, submit=submit, result=result, close=close, theirs=theirs)


def _sweep_with(patch, workers: FakeWorkers, plan: list[Search], **options) -> sweep.Report:
    patch.setenv("ITL_PROGRESS", "off")
    patch.setattr(sweep, "_Worker", workers)
    _plan(patch, *plan)
    return sweep.sweep("05_1", "smoke", **options)


@given(st.lists(st.lists(st.floats(0, 1), min_size=6, max_size=6), min_size=1, max_size=5), st.integers(1, 4))
def test_any_searches_end_with_every_point_known_and_no_cell_run_twice(tables, jobs):
    sizes = SIZES[:6]
    plan = [Search(_base(seed=seed), start=2, sizes=sizes) for seed in range(len(tables))]
    plan.append(plan[0])  # two searches may share their runs

    def answer(config: RunConfig) -> tuple[float, None]:
        return tables[config.seed][sizes.index(config.model.d_model)], None

    workers = FakeWorkers(answer)
    with pytest.MonkeyPatch.context() as patch:
        report = _sweep_with(patch, workers, plan, jobs=jobs)
    assert len(workers.asked) == len(set(workers.asked)) == report.done_now
    assert not report.missing and not report.failed and report.runs_ahead == 0
    assert 1 <= workers.most_busy <= jobs
    finished = {
        search.config(size).run_id: tables[search.base.seed][i] for search in plan for i, size in enumerate(sizes)
    }
    recalls = {run_id: finished[run_id] for run_id in workers.asked}
    assert all(not search.pending(recalls) for search in plan)


def test_a_failing_cell_is_tried_twice_and_then_left(runs, monkeypatch):
    plan = [_cell(seed=seed) for seed in range(3)]
    (bad,) = plan[1].pending({})
    workers = FakeWorkers(lambda config: (None, "ValueError: no") if config.run_id == bad.run_id else (0.5, None))
    report = _sweep_with(monkeypatch, workers, plan, jobs=2)
    assert [workers.asked.count(search.pending({})[0].run_id) for search in plan] == [1, 2, 1]
    assert report.failed == {bad.run_id: "in-weight, 8 facts, d = 4, seed 1: ValueError: no"}
    assert (report.done_now, report.missing) == (2, [bad])


def test_a_cell_that_fails_once_is_no_failure(runs, monkeypatch):
    answers = iter([(None, "OSError: busy"), (0.5, None)])
    workers = FakeWorkers(lambda config: next(answers))
    report = _sweep_with(monkeypatch, workers, [_cell()], jobs=1)
    assert (report.failed, report.done_now, len(workers.asked)) == ({}, 1, 2)
    assert workers.closed == 1


def test_a_search_goes_on_from_the_rows_there_are(runs, monkeypatch):
    search = Search(_base(), start=0, sizes=(4, 8, 12))
    for size, recall in ((4, 0.1), (8, 0.2)):
        row = {"run_id": search.config(size).run_id, "recall": recall}
        row |= {"steps": 10, "steps_budget": 10, "train_seconds": 1.0, "config": search.config(size).canonical_json()}
        folder = results.sweep_dir("05_1", "smoke") / row["run_id"]
        folder.mkdir(parents=True)
        (folder / "row.json").write_text(json.dumps(row))
    workers = FakeWorkers(lambda config: (1.0, None))
    report = _sweep_with(monkeypatch, workers, [search], jobs=1)
    assert workers.asked == [search.config(12).run_id]
    assert (report.done_before, report.done_now, report.missing) == (2, 1, [])


def test_after_the_time_is_up_no_cell_starts(runs, monkeypatch):
    workers = FakeWorkers(lambda config: (0.5, None))
    report = _sweep_with(monkeypatch, workers, [_cell()], jobs=1, max_hours=0)
    assert workers.asked == []
    assert (report.done_now, len(report.missing), report.runs_ahead) == (0, 1, 1)
    assert "about 1 runs" in str(report) and "in-weight, 8 facts, d = 4, seed 0" in str(report)


def test_what_finishes_in_time_is_kept_when_the_time_is_up(runs, monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(sweep, "time", SimpleNamespace(monotonic=lambda: clock.now))

    def answer(config: RunConfig) -> tuple[float, None]:
        clock.now += 1800
        return 0.5, None

    report = _sweep_with(monkeypatch, FakeWorkers(answer), [_cell(seed=s) for s in range(5)], jobs=1, max_hours=0.9)
    assert (report.done_now, len(report.missing)) == (2, 3)


def test_an_interrupted_sweep_ends_its_workers(runs, monkeypatch):
    def interrupt(config: RunConfig):
        raise KeyboardInterrupt

    answers = iter([lambda config: (0.5, None), interrupt])
    workers = FakeWorkers(lambda config: next(answers)(config))
    with pytest.raises(KeyboardInterrupt):
        _sweep_with(monkeypatch, workers, [_cell(), _cell(seed=1)], jobs=2)
    assert workers.closed >= 1


# ---- Looking ahead


@pytest.mark.parametrize("profile", paths.PROFILES)
def test_a_dry_run_tells_what_is_ahead_and_writes_nothing(runs, monkeypatch, profile):
    monkeypatch.setattr(paths, "PAPER_DATA", runs.parent / "no_paper_data")
    monkeypatch.setattr(sweep, "_Worker", None)
    report = sweep.sweep("05_1", profile, dry_run=True)
    plan = experiments.searches("05_1", profile)
    assert len(report.missing) == sum(len(search.pending({})) for search in plan)
    assert report.runs_ahead == sum(search.expected_runs() for search in plan)
    assert 0 < report.hours_ahead < math.inf
    listed = str(report).splitlines()
    assert f"about {report.runs_ahead:,} runs" in listed[0] and len(listed) <= 1 + sweep.LISTED + 1
    assert not runs.exists()


def test_hours_ahead_follow_the_speed_of_the_rows_there_are(smoke, monkeypatch):
    monkeypatch.setenv("ITL_RUNS", str(smoke[0]))
    rows = results.read_rows("05_1", "smoke")
    again = [RunConfig.parse(json.loads(config)) for config in rows.config]
    assert 3600 * sweep._hours(again, rows) == pytest.approx(rows.train_seconds.sum())  # they take as long as they took
    assert sweep._hours(again * 3, rows) == pytest.approx(3 * sweep._hours(again, rows))


def test_a_sweep_on_a_device_that_is_not_there_is_refused_before_anything_starts(runs, monkeypatch):
    monkeypatch.setattr(sweep, "_Worker", None)
    with pytest.raises(InputError, match="no device 'abacus'"):
        sweep.sweep("05_1", "smoke", jobs=1, device="abacus")
    assert not runs.exists()


@pytest.mark.parametrize("jobs", [0, -1])
def test_a_sweep_without_a_process_is_refused(runs, jobs):
    with pytest.raises(InputError, match=f"jobs = {jobs}: a sweep takes at least one process"):
        sweep.sweep("05_1", "smoke", jobs=jobs)
    assert not runs.exists()
