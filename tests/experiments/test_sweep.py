"""Sweeps: every run once, nothing repeated, and no run's failure or death in the way of the others."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from finished import FINISHED
from hypothesis import given, settings
from hypothesis import strategies as st
from waiting import is_running, wait_for

from lib import paths
from lib.base import InputError, WorkError
from lib.config import RunConfig
from lib.experiments import plan, sweep, tables
from lib.experiments.plan import SIZES, Search
from lib.experiments.rows import table_path
from lib.training.distributed import Preempted


def _snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in sorted(folder.rglob("*"))}


def _base(**groups) -> RunConfig:
    return RunConfig.parse(
        {"training": {"steps": 10}, "evaluation": {"every": None}, "facts": {"n_people": 2}, **groups}
    )


def _single(seed: int = 0, **groups) -> Search:
    """A search of one run."""
    return Search(_base(seed=seed, **groups), threshold=None, sizes=(4,))


# ---- Real processes


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The smoke sweep, run once: its folder and its report."""
    folder = tmp_path_factory.mktemp("smoke")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ITL_RUNS", str(folder))
        report = sweep.sweep("05_1", "smoke", jobs=2)
    return folder, report


def test_a_sweep_ends_with_a_row_for_every_run(smoke, monkeypatch):
    folder, report = smoke
    monkeypatch.setenv("ITL_RUNS", str(folder))
    assert (report.done_now, report.done_before, report.missing, report.failed) == (2, 0, [], {})
    rows = tables.read_rows("05_1", "smoke")
    planned = [config.run_id for search in plan.searches("05_1", "smoke") for config in search.pending({})]
    assert sorted(rows.run_id) == sorted(planned)
    assert set(rows["mode"]) == {"in-weight", "in-tool"} and (rows.steps == 20).all() and (rows.threads == 1).all()


def test_a_second_sweep_does_nothing_and_says_so_quickly(smoke, monkeypatch):
    folder, _ = smoke
    monkeypatch.setenv("ITL_RUNS", str(folder))
    before, start = _snapshot(folder), time.process_time()  # which others on this machine do not change
    report = sweep.sweep("05_1", "smoke")
    assert time.process_time() - start < 2
    assert (report.done_now, report.done_before, report.runs_ahead, report.hours_ahead) == (0, 2, 0, 0.0)
    assert str(report) == "0 runs done now, 2 before; nothing is missing"
    assert _snapshot(folder) == before


def test_a_damaged_row_harms_its_own_run_alone(smoke, tmp_path, monkeypatch, capsys):
    folder, _ = smoke
    shutil.copytree(folder, tmp_path / "runs")
    monkeypatch.setenv("ITL_RUNS", str(tmp_path / "runs"))
    first, _ = sorted((tmp_path / "runs").glob("smoke/05_1/*/row.json"))
    first.write_text("{")
    report = sweep.sweep("05_1", "smoke", dry_run=True)
    assert (report.done_before, report.runs_ahead) == (1, 1)
    assert f"{first} is damaged" in capsys.readouterr().err
    report = sweep.sweep("05_1", "smoke", in_process=True)
    assert report.done_now == 0 and f"{first} is damaged" in "".join(report.failed.values())
    assert len(tables.read_rows("05_1", "smoke")) == 1
    first.unlink()
    assert sweep.sweep("05_1", "smoke", in_process=True).done_now == 1


def _children(pid: int) -> list[int]:
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    return [int(child) for child in listed.split()]


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_runs_do_not_outlive_a_sweep_that_is_killed_or_interrupted(own_runs, how):
    command = [sys.executable, "-m", "lib", "sweep", "05_1", "--profile", "laptop", "--jobs", "1"]
    environment = {**os.environ, "PYTHONPATH": str(paths.ROOT)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: list(own_runs.glob("laptop/05_1/*/metrics.jsonl")))
        children = _children(process.pid)
        assert children
        process.send_signal(how)
        _, err = process.communicate(timeout=150)
    finally:
        process.kill()
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert [line for line in err.splitlines() if "05_1: " not in line] == [
            "itl: interrupted: the same command resumes from what was saved"
        ]
    wait_for(lambda: not any(map(is_running, children)))


# ---- Processes without training: a script in place of Python, which writes a row at once


@pytest.fixture
def script(own_runs, tmp_path, monkeypatch):
    """Make a run of a sweep this shell script. $config and $folder are its, $device is where, $log a file for all."""

    def make(body: str = "") -> Path:
        path, log = tmp_path / "python", tmp_path / "log"
        row = f'mkdir -p "$folder" && echo \'{json.dumps(FINISHED)}\' > "$folder/row.json"'
        path.write_text(f'#!/bin/sh\nconfig=$3 folder=$4 device=$5 log="{log}"\n{body}\n{row}\n')
        path.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(path))
        monkeypatch.setenv("ITL_PROGRESS", "off")
        log.touch()
        return log

    return make


def test_no_more_runs_than_jobs_at_a_time_and_one_on_a_device(script, monkeypatch):
    monkeypatch.setattr(sweep, "assign_devices", lambda *_: ["cuda:0", "cuda:1"])
    log = script('echo "+$device" >> "$log"; sleep 0.3; echo "-$device" >> "$log"')
    assert sweep.sweep("05_1", "smoke", plan=[_single(seed=seed) for seed in range(5)], device="cpu").done_now == 5
    busy, most = Counter(), 0
    for line in log.read_text().split():
        busy[line[1:]] += 1 if line[0] == "+" else -1
        assert busy[line[1:]] in (0, 1)
        most = max(most, busy.total())
    assert most == 2 and busy.keys() == {"cuda:0", "cuda:1"}


def test_when_the_time_is_up_runs_leave_and_one_that_finishes_meanwhile_counts(script):
    script('cat; case "$config" in *\'"seed":1\'*) exit 75;; esac')  # it reads until the sweep asks it to leave
    began, plan = time.monotonic(), [_single(seed=seed) for seed in range(3)]
    report = sweep.sweep("05_1", "smoke", plan=plan, jobs=2, device="cpu", max_hours=1 / 3600)
    assert time.monotonic() - began < sweep.LINE_INTERVAL
    assert (report.done_now, len(report.missing), report.failed) == (1, 2, {})


def test_a_run_that_is_killed_is_started_again_and_harms_no_other(script):
    script('case "$config" in *\'"seed":1\'*) if mkdir "$log.killed"; then kill -9 $$; fi;; esac')
    report = sweep.sweep("05_1", "smoke", plan=[_single(seed=seed) for seed in range(3)], jobs=2, device="cpu")
    assert (report.done_now, report.failed) == (3, {})


def test_what_a_killed_run_leaves_behind_does_not_hold_up_the_sweep(script):
    script('if mkdir "$log.killed"; then sleep 60 & kill -9 $$; fi')
    start = time.monotonic()
    assert sweep.sweep("05_1", "smoke", plan=[_single()], jobs=1, device="cpu").done_now == 1
    assert time.monotonic() - start < 30


def test_a_run_that_fails_twice_is_reported_with_its_last_line(script):
    log = script(
        'echo x >> "$log"; case "$config" in *\'"seed":1\'*) echo "a warning" >&2; echo "ValueError: no" >&2; exit 1;;'
        ' *\'"seed":2\'*) echo "a warning" >&2; kill -9 $$;; esac'
    )
    plan = [_single(seed=seed) for seed in range(4)]
    report = sweep.sweep("05_1", "smoke", plan=plan, jobs=2, device="cpu")
    bad, killed = (plan[seed].pending({})[0] for seed in (1, 2))
    assert report.failed == {
        bad.run_id: "in-weight, 8 facts, d = 4, seed 1: ValueError: no",
        killed.run_id: "in-weight, 8 facts, d = 4, seed 2: its process died with exit code -9",
    }
    assert (report.done_now, report.missing) == (2, [bad, killed])
    assert f"failed: {bad.run_id}: in-weight" in str(report)
    assert log.read_text().count("x") == 2 + 2 * sweep.TRIES
    with pytest.raises(WorkError, match="ValueError: no"):
        report.check()


def test_a_log_says_which_runs_go_and_how_far_they_are(script, monkeypatch, capsys):
    monkeypatch.setattr("lib.progress.LINE_INTERVAL", 0.1)
    monkeypatch.setattr(sweep, "LINE_INTERVAL", 0.1)
    script('mkdir -p "$folder"; echo \'{"step": 3, "loss": 1}\' > "$folder/metrics.jsonl"; sleep 1')
    monkeypatch.setenv("ITL_PROGRESS", "lines")
    sweep.sweep("05_1", "smoke", plan=[_single(seed=seed) for seed in range(2)], jobs=2, device="cpu")
    both = "; ".join(f"in-weight, 8 facts, d = 4, seed {seed}: step 3 of 10" for seed in range(2))
    assert any("smoke 05_1: 0/2" in line and both in line for line in capsys.readouterr().err.splitlines())


def test_a_log_says_how_far_a_run_in_this_process_is(own_runs, monkeypatch, capsys):
    monkeypatch.setattr("lib.progress.LINE_INTERVAL", 0)
    monkeypatch.setenv("ITL_PROGRESS", "lines")
    sweep.sweep("05_1", "smoke", plan=[_single()], in_process=True)
    assert "in-weight, 8 facts, d = 4, seed 0: 3/10" in capsys.readouterr().err


# ---- The order of things, in this process and without training


@pytest.fixture
def outcomes(own_runs, monkeypatch):
    """Replace training: `outcomes(of)` has every run end with the recall `of(config)`, or with what that raises."""
    return lambda of: _replace_training(monkeypatch, of)


def _replace_training(patch, of) -> list[str]:
    asked = []

    def run(config: RunConfig, directory: Path, device: str, description: str) -> None:
        asked.append(config.run_id)
        recall = of(config)
        directory.mkdir(parents=True)
        row = FINISHED | {"run_id": config.run_id, "recall": recall, "config": config.canonical_json()}
        (directory / "row.json").write_text(json.dumps(row))

    patch.setattr("lib.training.run.run", run)
    patch.setenv("ITL_PROGRESS", "off")
    return asked


@settings(max_examples=30)
@given(st.lists(st.lists(st.floats(0, 1), min_size=6, max_size=6), min_size=1, max_size=5))
def test_any_searches_end_with_every_point_known_and_no_run_twice(tmp_path_factory, recalls):
    sizes = SIZES[:6]
    plan = [Search(_base(seed=seed), start=2, sizes=sizes) for seed in range(len(recalls))]
    plan.append(plan[0])  # two searches may share their runs
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ITL_RUNS", str(tmp_path_factory.mktemp("runs")))
        asked = _replace_training(patch, lambda config: recalls[config.seed][sizes.index(config.model.d_model)])
        report = sweep.sweep("05_1", "smoke", plan=plan, in_process=True)
    assert len(asked) == len(set(asked)) == report.done_now
    assert not report.missing and not report.failed and report.runs_ahead == 0
    known = {s.config(size).run_id: recalls[s.base.seed][i] for s in plan for i, size in enumerate(sizes)}
    assert all(not search.pending({run_id: known[run_id] for run_id in asked}) for search in plan)


def test_a_run_that_fails_once_is_no_failure(outcomes):
    answers = iter([OSError("busy"), 0.5])

    def answer(config: RunConfig) -> float:
        if isinstance(given := next(answers), Exception):
            raise given
        return given

    asked = outcomes(answer)
    report = sweep.sweep("05_1", "smoke", plan=[_single()], in_process=True)
    assert (report.failed, report.done_now, len(asked)) == ({}, 1, 2)


def test_a_search_goes_on_from_the_rows_there_are(outcomes):
    search = Search(_base(), start=0, sizes=(4, 8, 12))
    outcomes(lambda config: config.model.d_model / 12)
    first = [Search(_base(), threshold=None, sizes=(size,)) for size in (4, 8)]
    assert sweep.sweep("05_1", "smoke", plan=first, in_process=True).done_now == 2
    asked = outcomes(lambda config: 1.0)
    report = sweep.sweep("05_1", "smoke", plan=[search], in_process=True)
    assert asked == [search.config(12).run_id]
    assert (report.done_before, report.done_now, report.missing) == (2, 1, [])


def test_after_the_time_is_up_no_run_starts(outcomes):
    asked = outcomes(lambda config: 0.5)
    report = sweep.sweep("05_1", "smoke", plan=[_single()], in_process=True, max_hours=0)
    assert asked == []
    assert (report.done_now, len(report.missing), report.runs_ahead) == (0, 1, 1)
    assert "about 1 runs" in str(report) and "in-weight, 8 facts, d = 4, seed 0" in str(report)


def test_a_preempted_run_ends_a_sweep_in_this_process(outcomes):
    def preempt(config: RunConfig) -> float:
        raise Preempted

    asked = outcomes(preempt)
    with pytest.raises(Preempted):
        sweep.sweep("05_1", "smoke", plan=[_single(), _single(seed=1)], in_process=True)
    assert len(asked) == 1


def test_the_rows_of_a_users_file_have_a_folder_of_their_own(own_runs, outcomes, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "base: {training: {steps: 10}}\naxes: [{n_facts: [8]}, {seed: [0, 1]}]\nsizes: [4]\nthreshold: null\n"
    )
    outcomes(lambda config: 0.5)
    assert sweep.sweep(str(file), "quick", in_process=True).done_now == 2
    assert sorted(path.parent.parent for path in own_runs.rglob("row.json")) == [own_runs / "mine"] * 2
    assert sweep.sweep(str(file), "quick").done_before == 2
    with pytest.raises(InputError, match="unknown section .*mine.yaml' among those with a table: there are 05_1, "):
        table_path(str(file))


@pytest.mark.parametrize(
    ("grid", "problem"),
    [
        ("{facts: {csv: nobody.csv}}", "cannot read people from nobody.csv, .*No such file"),
        ("{facts: {csv: who.csv}}", "who.csv has no column 'name'"),
        ("{training: {files: {no.jsonl: 0.5}}}", "cannot read the dialogs of no.jsonl: there is no such file"),
    ],
)
def test_a_dry_run_refuses_files_that_a_run_would_refuse(grid, problem, own_runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "who.csv").write_text("who,pet\nAnn,cat\n")
    (tmp_path / "mine.yaml").write_text(f"base: {grid}\nsizes: [4]\nthreshold: null\n")
    with pytest.raises(InputError, match=problem):
        sweep.sweep("mine.yaml", "quick", dry_run=True)


def test_a_plan_is_done_in_this_process(own_runs):
    plan, other = [_single(seed=1), _single(facts={"csv": "nobody.csv"}), _single(seed=2)], _single(seed=3)
    report = sweep.sweep("05_1", "smoke", plan=plan, in_process=True)
    (bad,) = plan[1].pending({})
    assert report.done_now == 2 and list(report.failed) == [bad.run_id] and report.missing == [bad]
    assert "InputError: cannot read people from nobody.csv" in report.failed[bad.run_id]
    assert sorted(tables.read_rows("05_1", "smoke", plan).seed) == [1, 2]
    assert sweep.hours_ahead("05_1", "smoke", plan, "cpu")[::2] == [0, 0]
    (on_cpu,), (on_gpu,) = (sweep.hours_ahead("05_1", "smoke", [other], device) for device in ("cpu", "cuda:0"))
    assert 0 < on_gpu < on_cpu


# ---- Devices


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


# ---- Looking ahead


@pytest.mark.parametrize("profile", paths.PROFILES)
def test_a_dry_run_tells_what_is_ahead_and_writes_nothing(own_runs, monkeypatch, profile):
    monkeypatch.setattr(paths, "PAPER_DATA", own_runs.parent / "no_paper_data")
    report = sweep.sweep("05_1", profile, dry_run=True)
    searches = plan.searches("05_1", profile)
    assert len(report.missing) == sum(len(search.pending({})) for search in searches)
    n_sizes = [(len(search.sizes), 3 if search.threshold else math.inf) for search in searches]
    assert report.runs_ahead == sum(map(min, n_sizes))
    assert 0 < report.hours_ahead < math.inf
    listed = str(report).splitlines()
    assert f"about {report.runs_ahead:,} runs" in listed[0] and len(listed) <= 1 + sweep.LISTED + 1
    assert not own_runs.exists()


def test_hours_ahead_follow_the_speed_of_the_rows_there_are(smoke, monkeypatch):
    monkeypatch.setenv("ITL_RUNS", str(smoke[0]))
    rows = tables.read_rows("05_1", "smoke")
    again = [RunConfig.parse(json.loads(config)) for config in rows.config]
    on_cpu = rows.to_dict("records")
    speed = sweep._speed(on_cpu, "cpu")
    on_gpu = [{**row, "device": "cuda (a fast one)", "train_seconds": row["train_seconds"] / 50} for row in on_cpu]
    assert sweep._speed([*on_cpu, *on_gpu], "cpu") == speed  # a core is no faster for it
    assert sweep._speed(on_gpu, "cuda") == pytest.approx(50 * speed)
    assert 3600 * sweep._hours(again, speed) == pytest.approx(
        rows.train_seconds.sum()
    )  # they take as long as they took
    assert sweep._hours(again * 3, speed) == pytest.approx(3 * sweep._hours(again, speed))
