"""Sweeps: every cell once, nothing repeated, and no cell's failure or death in the way of the others.

And cells that train as one stack end as they do alone.
"""

import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import cycle
from multiprocessing import Pipe
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib import paths
from lib.base import InputError
from lib.config import RunConfig
from lib.experiments import plan, sweep, tables
from lib.experiments.search import SIZES, Search
from lib.training import devices
from lib.training.distributed import Preempted
from lib.training.run import run


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
    for module in (sweep, tables):
        monkeypatch.setattr(module, "searches", lambda section, profile, tokenizer="bytes": list(plan))


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
    rows = tables.read_rows("05_1", "smoke")
    planned = [config.run_id for search in plan.searches("05_1", "smoke") for config in search.pending({})]
    assert sorted(rows.run_id) == sorted(planned)
    assert set(rows["mode"]) == {"in-weight", "in-tool"} and (rows.steps == 20).all()


def test_a_second_sweep_does_nothing_and_says_so_quickly(smoke, monkeypatch):
    folder, _ = smoke
    monkeypatch.setenv("ITL_RUNS", str(folder))
    monkeypatch.setattr(sweep, "_Worker", None)
    before, start = _snapshot(folder), time.process_time()  # which others on this machine do not change
    report = sweep.sweep("05_1", "smoke")
    assert time.process_time() - start < 2
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
    assert list(tables.read_rows("05_1", "smoke").seed) == [1]


def _work_where_wide_models_stack(pipe, device: str) -> None:
    """The life of a worker on a machine where stacks of models from d_model = 12 on are faster than one by one."""
    sweep.stacked_speedup = lambda configs, device: 2.0 if configs[0].model.d_model >= 12 else 0.5
    sweep._work(pipe, device)


@pytest.fixture
def submitted(monkeypatch) -> list[list[RunConfig]]:
    """The cells that workers of such a machine are given, as they are given them."""
    groups, submit = [], sweep._Worker.submit

    def record(worker: sweep._Worker, configs: list[RunConfig], directories: list[Path]) -> None:
        groups.append(configs)
        submit(worker, configs, directories)

    monkeypatch.setattr(sweep, "_work", _work_where_wide_models_stack)
    monkeypatch.setattr(sweep._Worker, "submit", record)
    return groups


@pytest.mark.slow
def test_a_sweep_of_stacks_ends_with_the_rows_of_runs_alone(runs, submitted, monkeypatch):
    # One person each: few enough to be learned in seconds, so that recalls differ and some runs end before the others.
    bases = [
        _base(seed=seed, facts={"n_people": 1, "seed": seed}, training={"steps": 60}, evaluation={"every": 5})
        for seed in range(3)
    ]
    _plan(monkeypatch, *(Search(base, threshold=None, sizes=(8, 32)) for base in bases))
    report = sweep.sweep("05_1", "smoke", jobs=1)
    assert (report.done_now, report.missing, report.failed) == (6, [], {})
    sizes = sorted([config.model.d_model for config in group] for group in submitted)
    assert sizes == [[8], [8], [8], [8, 8, 8], [32, 32, 32]]
    rows = tables.read_rows("05_1", "smoke")
    assert len(rows) == 6 and rows.recall.nunique() > 1 and rows.steps.nunique() > 1
    for row in rows.to_dict("records"):
        config = RunConfig.parse(json.loads(row["config"]))
        alone = run(config, runs / "alone" / config.run_id)
        same = ("run_id", "seed", "d_model", "steps", "stopped", "dialogs_seen", "recall", "people_digest")
        assert {name: row[name] for name in same} == {name: alone[name] for name in same}
        assert row["loss"] == pytest.approx(alone["loss"], abs=1e-4)


@pytest.mark.slow
def test_a_worker_that_is_killed_loses_nothing(runs, submitted, monkeypatch):
    training = {"steps": 60, "checkpoint_every": 5}
    plan = [Search(_base(seed=seed, training=training), threshold=None, sizes=(12,)) for seed in range(4)]
    _plan(monkeypatch, *plan)
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
    assert report.done_now == 4
    assert list(map(len, submitted)) == [2, 2, 1, 1]  # two stacks, and the cells of the killed one by one
    assert sorted(tables.read_rows("05_1", "smoke").seed) == [0, 1, 2, 3]


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
    """Stands in for `_Worker`: answers at once, and remembers what it was asked.

    `answer` gives recall or error of one cell; a stack has the first error of its cells. `alone` says which stacks are
    answered with "faster alone". An error ends the process if `dies` says so.
    """

    def __init__(self, answer, alone=lambda configs: False, dies=lambda: False):
        self.answer, self.alone, self.dies = answer, alone, dies
        self.submitted: list[list[RunConfig]] = []
        self.asked: list[str] = []  # ids of the cells that ran
        self.busy, self.most_busy, self.closed = 0, 0, 0

    def __call__(self, device: str) -> SimpleNamespace:
        ours, theirs = Pipe()
        process = SimpleNamespace(is_alive=lambda: process.alive, alive=True)

        def submit(configs: list[RunConfig], directories: list[Path]) -> None:
            assert process.alive
            assert [directory.name for directory in directories] == [config.run_id for config in configs]
            self.submitted.append(configs)
            self.busy += 1
            self.most_busy = max(self.busy, self.most_busy)
            found, error = self._run(configs)
            process.alive = not (error and self.dies())
            theirs.send((found, error))

        def result():
            self.busy -= 1
            return ours.recv()

        def close() -> None:
            self.closed += 1

        return SimpleNamespace(pipe=ours, process=process, submit=submit, result=result, close=close, theirs=theirs)

    def _run(self, configs: list[RunConfig]) -> tuple[dict[str, float] | None, str | None]:
        if len(configs) > 1 and self.alone(configs):
            return None, None
        ids = [config.run_id for config in configs]
        self.asked += ids
        recalls, errors = zip(*map(self.answer, configs), strict=True)
        error = next(filter(None, errors), None)
        return (None, error) if error else (dict(zip(ids, recalls, strict=True)), None)


def _sweep_with(patch, workers: FakeWorkers, plan: list[Search], **options) -> sweep.Report:
    patch.setenv("ITL_PROGRESS", "off")
    patch.setattr(sweep, "_Worker", workers)
    _plan(patch, *plan)
    return sweep.sweep("05_1", "smoke", **options)


@given(
    st.lists(st.lists(st.floats(0, 1), min_size=6, max_size=6), min_size=1, max_size=5),
    st.integers(1, 4),
    st.integers(1, 4),
)
def test_any_searches_end_with_every_point_known_and_no_cell_run_twice(tables, jobs, stack):
    sizes = SIZES[:6]
    plan = [Search(_base(seed=seed), start=2, sizes=sizes) for seed in range(len(tables))]
    plan.append(plan[0])  # two searches may share their runs

    def answer(config: RunConfig) -> tuple[float, None]:
        return tables[config.seed][sizes.index(config.model.d_model)], None

    workers = FakeWorkers(answer)
    with pytest.MonkeyPatch.context() as patch:
        report = _sweep_with(patch, workers, plan, jobs=jobs, stack=stack)
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
    report = _sweep_with(monkeypatch, workers, plan, jobs=2, stack=1)
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
        row |= {
            "steps": 10,
            "steps_budget": 10,
            "train_seconds": 1.0,
            "device": "cpu",
            "config": search.config(size).canonical_json(),
        }
        folder = tables.sweep_dir("05_1", "smoke") / row["run_id"]
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


@pytest.mark.parametrize(("stack", "done"), [(1, 2), (4, 4)])
def test_what_finishes_in_time_is_kept_when_the_time_is_up(runs, monkeypatch, stack, done):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(sweep, "time", SimpleNamespace(monotonic=lambda: clock.now))

    def answer(config: RunConfig) -> tuple[float, None]:
        clock.now += 1800
        return 0.5, None

    plan = [_cell(seed=seed) for seed in range(5)]
    report = _sweep_with(monkeypatch, FakeWorkers(answer), plan, jobs=1, stack=stack, max_hours=0.9)
    assert (report.done_now, len(report.missing)) == (done, 5 - done)


def test_an_interrupted_sweep_ends_its_workers(runs, monkeypatch):
    def interrupt(config: RunConfig):
        raise KeyboardInterrupt

    answers = iter([lambda config: (0.5, None), interrupt])
    workers = FakeWorkers(lambda config: next(answers)(config))
    with pytest.raises(KeyboardInterrupt):
        _sweep_with(monkeypatch, workers, [_cell(), _cell(seed=1)], jobs=2)
    assert workers.closed >= 1


# ---- Cells as one stack, without processes


def _kind(config: RunConfig) -> tuple:
    """What cells of one stack have in common: dialogs of like lengths, and all that a step's arithmetic hangs on."""
    return config.mode, config.model.d_model, config.training.dtype, config.training.grad_accumulation


_kinds = st.tuples(
    st.sampled_from(["in-weight", "in-tool"]),
    st.sampled_from([4, 8]),
    st.sampled_from(["float32", "bfloat16"]),
    st.integers(1, 2),
)


@given(st.lists(_kinds, min_size=1, max_size=12), st.integers(1, 4))
def test_a_stack_holds_as_many_cells_of_one_kind_as_it_may(kinds, stack):
    plan = []
    for seed, (mode, size, dtype, parts) in enumerate(kinds):
        base = _base(seed=seed, mode=mode, training={"steps": 10, "dtype": dtype, "grad_accumulation": parts})
        plan.append(Search(base, threshold=None, sizes=(size,)))
    workers = FakeWorkers(lambda config: (0.5, None))
    with pytest.MonkeyPatch.context() as patch:
        report = _sweep_with(patch, workers, plan, jobs=1, stack=stack)
    assert report.done_now == len(kinds) == len(set(workers.asked)) == len(workers.asked)
    assert all(len(set(map(_kind, group))) == 1 for group in workers.submitted)
    assert max(map(len, workers.submitted)) <= stack
    assert len(workers.submitted) == sum(math.ceil(n / stack) for n in Counter(kinds).values())


@pytest.mark.parametrize(("cells", "jobs", "sizes"), [(4, 2, [2, 2]), (5, 2, [3, 2]), (2, 3, [1, 1]), (9, 1, [8, 1])])
def test_a_stack_leaves_cells_for_the_other_workers(runs, monkeypatch, cells, jobs, sizes):
    workers = FakeWorkers(lambda config: (0.5, None))
    _sweep_with(monkeypatch, workers, [_cell(seed=seed) for seed in range(cells)], jobs=jobs)
    assert list(map(len, workers.submitted)) == sizes


def test_models_that_are_faster_alone_are_measured_once_and_each_run_once(runs, monkeypatch):
    plan = [Search(_base(seed=seed), threshold=None, sizes=(4, 8)) for seed in range(4)]
    workers = FakeWorkers(lambda config: (0.5, None), alone=lambda configs: configs[0].model.d_model == 4)
    report = _sweep_with(monkeypatch, workers, plan, jobs=1, stack=3)
    sizes = [[config.model.d_model for config in group] for group in workers.submitted]
    assert sorted(sizes, key=str) == sorted([[4] * 3, [4], [4], [4], [4], [8] * 3, [8]], key=str)
    assert len(workers.asked) == len(set(workers.asked)) == report.done_now == 8
    assert not report.failed and not report.missing


@pytest.mark.parametrize("dies", [False, True])
def test_a_failing_stack_is_tried_again_cell_by_cell(runs, monkeypatch, dies):
    plan = [_cell(seed=seed) for seed in range(4)]
    (bad,) = plan[1].pending({})

    def answer(config: RunConfig) -> tuple[float | None, str | None]:
        return (None, "ValueError: no") if config == bad else (0.5, None)

    workers = FakeWorkers(answer, dies=lambda: dies)
    report = _sweep_with(monkeypatch, workers, plan, jobs=1)
    assert list(map(len, workers.submitted)) == [4, 1, 1, 1, 1]
    assert report.failed == {bad.run_id: "in-weight, 8 facts, d = 4, seed 1: ValueError: no"}
    assert (report.done_now, report.missing) == (3, [bad])


def test_a_cell_that_failed_joins_no_stack_again(runs, monkeypatch):
    # The first search goes on to the size of the failed cells when these are to be tried again.
    first = Search(_base(), start=1, sizes=(4, 8))
    workers = FakeWorkers(lambda config: (None, "ValueError: no") if config.seed else (1.0, None))
    report = _sweep_with(monkeypatch, workers, [first, _cell(seed=1), _cell(seed=2)], jobs=2)
    groups = [[(config.seed, config.model.d_model) for config in group] for group in workers.submitted]
    assert groups[:2] == [[(0, 8)], [(1, 4), (2, 4)]]
    assert sorted(groups[2:]) == [[(0, 4)], [(1, 4)], [(2, 4)]]
    assert (report.done_now, len(report.failed)) == (2, 2)


_failures = st.sampled_from([0, 0, 0, 0, 1, 2, 3])
_search = st.tuples(
    st.sampled_from(["in-weight", "in-tool"]), st.lists(st.tuples(st.floats(0, 1), _failures), min_size=4, max_size=4)
)


@settings(max_examples=60)
@given(
    st.lists(_search, min_size=1, max_size=6),
    st.integers(1, 3),
    st.integers(2, 5),
    st.lists(st.booleans(), min_size=1, max_size=5),
    st.lists(st.booleans(), min_size=1, max_size=5),
)
def test_whatever_workers_answer_searches_end_as_with_each_cell_alone(searches, jobs, stack, alone, dies):
    sizes = SIZES[:4]
    plan = [Search(_base(seed=i, mode=mode), start=1, sizes=sizes) for i, (mode, _) in enumerate(searches)]

    def end(**options) -> tuple:
        tries, recalls, alone_, dies_ = Counter(), {}, cycle(alone), cycle(dies)

        def answer(config: RunConfig) -> tuple[float | None, str | None]:
            recall, failures = searches[config.seed][1][sizes.index(config.model.d_model)]
            tries[config.run_id] += 1
            if tries[config.run_id] <= failures:
                return None, f"OSError: {config.run_id}"
            recalls[config.run_id] = recall
            return recall, None

        workers = FakeWorkers(answer, lambda configs: next(alone_), lambda: next(dies_))
        with pytest.MonkeyPatch.context() as patch:
            report = _sweep_with(patch, workers, plan, **options)
        assert max(tries.values()) <= sweep.TRIES
        return recalls, report.done_now, report.failed, report.missing, report.runs_ahead

    assert end(jobs=jobs, stack=stack) == end(jobs=1, stack=1)


# ---- In this process, and on GPUs


@pytest.mark.slow
def test_a_plan_is_done_in_this_process(runs, monkeypatch):
    monkeypatch.setattr(sweep, "_Worker", None)
    plan, other = [_cell(seed=1), _cell(facts={"csv": "nobody.csv"}), _cell(seed=2)], _cell(seed=3)
    _plan(monkeypatch, *plan, other)
    report = sweep.sweep("05_1", "smoke", plan=plan, in_process=True)
    (bad,) = plan[1].pending({})
    assert report.done_now == 2 and list(report.failed) == [bad.run_id] and report.missing == [bad]
    assert sorted(tables.read_rows("05_1", "smoke").seed) == [1, 2]
    assert sweep.hours_ahead("05_1", "smoke", plan)[::2] == [0, 0] < sweep.hours_ahead("05_1", "smoke", [other])


def test_a_preempted_run_ends_a_sweep_in_this_process(runs, monkeypatch):
    asked = []

    def preempt(configs, directories, **options):
        asked.append(configs)
        raise Preempted

    monkeypatch.setattr(sweep, "run_together", preempt)
    with pytest.raises(Preempted):
        sweep.sweep("05_1", "smoke", plan=[_cell(), _cell(seed=1)], in_process=True, stack=1)
    assert len(asked) == 1


@given(st.sampled_from(["auto", "cuda"]), st.none() | st.integers(1, 20), st.integers(1, 8), st.integers(1, 64))
def test_processes_share_the_gpus_evenly(device, jobs, n_gpus, n_cores):
    devices = sweep.assign_devices(device, jobs, n_gpus, n_cores)
    assert len(devices) == (jobs or n_gpus)
    counts = Counter(devices)
    assert counts.keys() <= {f"cuda:{i}" for i in range(n_gpus)}
    assert len(counts) == min(len(devices), n_gpus) and max(counts.values()) - min(counts.values()) <= 1


@given(st.none() | st.integers(1, 20), st.integers(1, 8), st.integers(1, 64))
def test_a_device_that_was_named_is_everyones(jobs, n_gpus, n_cores):
    assert sweep.assign_devices("cuda:1", jobs, n_gpus, n_cores) == ["cuda:1"] * (jobs or 1)
    assert sweep.assign_devices("cpu", jobs, 0, n_cores) == ["cpu"] * (jobs or n_cores)
    assert sweep.assign_devices("auto", jobs, 0, n_cores) == ["auto"] * (jobs or n_cores)


def test_each_worker_keeps_its_device_and_so_does_its_successor(runs, monkeypatch):
    devices, answers = [], iter([(None, "died"), *[(0.5, None)] * 9])
    workers = FakeWorkers(lambda config: next(answers), dies=lambda: True)

    def make(device: str):
        devices.append(device)
        return workers(device)

    monkeypatch.setenv("ITL_PROGRESS", "off")
    monkeypatch.setattr(sweep, "_Worker", make)
    monkeypatch.setattr(sweep, "assign_devices", lambda *_: ["cuda:0", "cuda:1"])
    _plan(monkeypatch, *(_cell(seed=seed) for seed in range(6)))
    assert sweep.sweep("05_1", "smoke", stack=1).done_now == 6
    assert sorted(devices) == ["cuda:0", "cuda:0", "cuda:1"]


# ---- Looking ahead


@pytest.mark.parametrize("profile", paths.PROFILES)
def test_a_dry_run_tells_what_is_ahead_and_writes_nothing(runs, monkeypatch, profile):
    monkeypatch.setattr(paths, "PAPER_DATA", runs.parent / "no_paper_data")
    monkeypatch.setattr(sweep, "_Worker", None)
    report = sweep.sweep("05_1", profile, dry_run=True)
    searches = plan.searches("05_1", profile)
    assert len(report.missing) == sum(len(search.pending({})) for search in searches)
    assert report.runs_ahead == sum(search.expected_runs() for search in searches)
    assert 0 < report.hours_ahead < math.inf
    listed = str(report).splitlines()
    assert f"about {report.runs_ahead:,} runs" in listed[0] and len(listed) <= 1 + sweep.LISTED + 1
    assert not runs.exists()


def test_hours_ahead_follow_the_speed_of_the_rows_there_are(smoke, monkeypatch):
    monkeypatch.setenv("ITL_RUNS", str(smoke[0]))
    rows = tables.read_rows("05_1", "smoke")
    again = [RunConfig.parse(json.loads(config)) for config in rows.config]
    speed = sweep._speed(rows, "cpu")
    on_gpu = rows.assign(device="cuda (a fast one)", train_seconds=rows.train_seconds / 50)
    assert sweep._speed(pd.concat([rows, on_gpu]), "cpu") == speed  # a core is no faster for it
    assert sweep._speed(on_gpu, "cuda") == pytest.approx(50 * speed)
    assert 3600 * sweep._hours(again, speed) == pytest.approx(
        rows.train_seconds.sum()
    )  # they take as long as they took
    assert sweep._hours(again * 3, speed) == pytest.approx(3 * sweep._hours(again, speed))


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


@pytest.mark.parametrize("stack", [0, -1])
def test_a_stack_of_no_models_is_refused(runs, stack):
    with pytest.raises(InputError, match=f"stack = {stack}: give how many models may train as one, 1 for each alone"):
        sweep.sweep("05_1", "smoke", stack=stack)
    assert not runs.exists()


# ---- Cores


def test_as_many_cores_as_the_process_may_use(monkeypatch):
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    code = "from lib.training.devices import usable_cores; print(usable_cores())"
    environment = {**os.environ, "PYTHONPATH": str(paths.ROOT)}
    command = ["taskset", "--cpu-list", str(min(os.sched_getaffinity(0))), sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"
    assert 1 <= devices.usable_cores() <= len(os.sched_getaffinity(0))


@pytest.mark.parametrize(("given", "cores"), [("3", 3), ("64", 16), ("0", 1), ("many", 16)])
def test_slurm_says_how_many_cores_a_process_may_use(monkeypatch, given, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setattr(devices, "_quotas", lambda _: iter(()))
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", given)
    assert devices.usable_cores() == cores


@pytest.mark.parametrize(
    ("group", "files", "quotas"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, [1.5]),  # in a container
        ("0::/\n", {"cpu.max": "max 100000\n"}, []),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "200000 100000\n", "cpu.max": "7 1\n"}, [2, 7]),
        ("0::/a\n", {}, []),
        ("3:cpuset:/x\n2:cpu,cpuacct:/a\n", {"cpu/a/cpu.cfs_quota_us": "3", "cpu/a/cpu.cfs_period_us": "1"}, [3]),
        ("2:cpu:/a\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, []),
        ("3:memory:/a\n", {"cpu.max": "1 1"}, []),
        (None, {}, []),
    ],
)  # fmt: skip
def test_quotas_of_cpu_time_are_read_as_linux_writes_them(tmp_path, group, files, quotas):
    for name, content in {f"sys/fs/cgroup/{name}": text for name, text in files.items()}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    if group is not None:
        (tmp_path / "proc" / "self").mkdir(parents=True)
        (tmp_path / "proc" / "self" / "cgroup").write_text(group)
    assert list(devices._quotas(tmp_path)) == quotas
