"""Recall along the way: each checkpoint is measured once, whatever the process that writes them does meanwhile."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import forging
import pytest

from lib import paths
from lib.base import InputError
from lib.config import RunConfig, override
from lib.training import checkpoint, watch
from lib.training.monitor import read_record
from lib.training.run import run
from lib.training.watch import evaluate_checkpoints

MEASURED = ("recall", "recall_birth_date", "recall_birth_place", "recall_current_address", "recall_occupation")


def _config(**training) -> RunConfig:
    """A few people, learned at a constant rate: a run of fewer steps ends where this one passes."""
    return RunConfig.parse({
        "mode": "in-weight",
        "facts": {"n_people": 2},
        "model": {"d_model": 16},
        "optim": {"lr": 3e-3, "schedule": "constant"},
        "training": {"steps": 90, "checkpoint_every": 30, "keep_checkpoints": 1000, **training},
        "evaluation": {"every": None},
    })  # fmt: skip


def _columns(row: dict) -> dict:
    return {name: row[name] for name in (*MEASURED, "nll_bits")}


def _steps(lines) -> list[int]:
    return [line["step"] for line in lines]


class Stopped(BaseException):
    pass


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The folder of a run that ended with checkpoints after 30, 60 and 90 steps and before it had a row."""
    folder = tmp_path_factory.mktemp("whole") / "run"

    def stop(*_):
        raise Stopped

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr("lib.training.run.save_model", stop)
        run(_config(), folder)
    return folder


@pytest.fixture
def stopped(whole, tmp_path) -> Path:
    """A copy of that folder."""
    return shutil.copytree(whole, tmp_path / "run")


@pytest.mark.parametrize("mode", ["in-weight", "in-tool"])
@pytest.mark.slow
def test_every_checkpoint_of_a_process_that_trains_is_measured_and_the_watch_ends_with_it(tmp_path, mode):
    config, folder = override(_config(steps=120), {"mode": mode}), tmp_path / "run"
    (tmp_path / "config.json").write_text(config.canonical_json())
    command = [sys.executable, "-m", "lib", "train", "--config", "config.json", "--out", "run"]
    environment = {**os.environ, "PYTHONPATH": str(paths.ROOT)}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment)
    try:
        while not (folder / "checkpoints" / "step_00000030" / checkpoint.MARKER).exists():
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGSTOP)  # in the middle of whatever it does
        watch = evaluate_checkpoints(folder, watch=True)
        first = next(watch)
        process.send_signal(signal.SIGCONT)
        lines = [first, *watch]
        assert process.wait() == 0
    finally:
        process.kill()
        process.wait()
    row = json.loads((folder / "row.json").read_text())
    assert first["step"] == 30 and _steps(lines)[-1] == 120
    assert _steps(lines) == sorted(set(_steps(lines)) & {30, 60, 90, 120})
    assert lines[-1] == {"step": 120, **_columns(row)}
    shorter = run(override(config, {"training.steps": 30}), tmp_path / "shorter")
    assert first == {"step": 30, **_columns(shorter)}
    assert first != {**lines[-1], "step": 30}
    assert read_record(folder / "evaluations.jsonl") == lines


def test_without_watching_what_is_there_is_measured_and_a_second_time_nothing_is(stopped):
    assert _steps(evaluate_checkpoints(stopped)) == [30, 60, 90]
    assert list(evaluate_checkpoints(stopped)) == []
    run(_config(), stopped)  # it goes on, and ends with the weights after 90 steps: these are measured
    assert list(evaluate_checkpoints(stopped, watch=True)) == []
    assert _steps(read_record(stopped / "evaluations.jsonl")) == [30, 60, 90]


def test_a_run_that_is_finished_right_after_a_look_is_looked_at_once_more(stopped, monkeypatch):
    shutil.rmtree(stopped / "checkpoints" / "step_00000090")
    look = watch._not_yet

    def finish_after(directory, *arguments):
        yield from look(directory, *arguments)
        run(_config(), directory)

    monkeypatch.setattr(watch, "_not_yet", finish_after)
    assert _steps(evaluate_checkpoints(stopped, watch=True)) == [30, 60, 90]


def test_of_a_finished_run_the_model_is_measured(tmp_path):
    row = run(_config(steps=20), tmp_path / "run")
    assert list(evaluate_checkpoints(tmp_path / "run", watch=True)) == [{"step": 20, **_columns(row)}]
    assert list(evaluate_checkpoints(tmp_path / "run")) == []


def test_an_evaluation_that_was_killed_goes_on_after_its_last_whole_line(stopped):
    lines = list(evaluate_checkpoints(stopped))
    record = stopped / "evaluations.jsonl"
    whole = record.read_text()
    for cut in (1, 2, 40):  # without the end of the line it is whole
        record.write_text(whole[:-cut])
        assert list(evaluate_checkpoints(stopped)) == (lines[2:] if cut > 1 else [])
        assert record.read_text() == whole
    record.unlink()
    next(left_alone := evaluate_checkpoints(stopped))
    left_alone.close()
    assert list(evaluate_checkpoints(stopped)) == lines[1:]


def _incomplete(folder: Path) -> None:
    (folder / checkpoint.MARKER).unlink()


def _damaged(folder: Path) -> None:
    (file,) = folder.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize("spoil", [_incomplete, _damaged])
def test_a_checkpoint_that_is_not_whole_is_left_out_until_it_is(stopped, tmp_path, spoil):
    folder = stopped / "checkpoints" / "step_00000060"
    shutil.copytree(folder, tmp_path / "whole")
    spoil(folder)
    assert _steps(evaluate_checkpoints(stopped)) == [30, 90]
    shutil.rmtree(folder)
    (tmp_path / "whole").rename(folder)
    assert _steps(evaluate_checkpoints(stopped)) == [60]


def test_a_checkpoint_that_no_run_wrote_is_refused(stopped):
    forging.FORGED["another shape"](stopped / "checkpoints" / "step_00000060")
    lines = evaluate_checkpoints(stopped)
    assert next(lines)["step"] == 30
    with pytest.raises(InputError, match="cannot read the checkpoint .*step_00000060"):
        next(lines)


@pytest.mark.parametrize("moment", ["checkpoint.load", "checkpoint._checksum", "checkpoint.load_file"])
@pytest.mark.parametrize("deleted", ["*", "*.safetensors", "state.json"])
def test_a_checkpoint_that_is_deleted_while_it_is_read_is_no_error(stopped, monkeypatch, moment, deleted):
    """Before it is read, while it is checked, and when it was found to be whole; all of it, or a file so far."""
    name, folder = moment.rsplit(".")[-1], stopped / "checkpoints" / "step_00000030"
    real = getattr(checkpoint, name)

    def late(*arguments, **options):
        for path in folder.glob(deleted):
            path.unlink()
        return real(*arguments, **options)

    monkeypatch.setattr(checkpoint, name, late)
    assert _steps(evaluate_checkpoints(stopped)) == [60, 90]


def test_a_folder_that_holds_no_run_is_refused_and_left_as_it_was(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="is not the folder of a run"):
        next(evaluate_checkpoints(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
