"""Killed processes, full disks, damaged files: a run ends with the weights of the undisturbed one, or says why not."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import pytest
import ranks
import torch
from safetensors.torch import load_file

from lib import paths
from lib.config import RunConfig
from lib.training import checkpoint
from lib.training.run import run

pytestmark = pytest.mark.slow


def _config() -> RunConfig:
    return RunConfig.parse({
        "facts": {"n_people": 8},
        "model": {"d_model": 8},
        "training": {"steps": 600, "batch_size": 8, "checkpoint_every": 5},
        "evaluation": {"every": 50, "stop_at_recall": None},
    })  # fmt: skip


def _train(directory: Path) -> None:
    torch.set_num_threads(1)
    run(_config(), directory)


def _weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model" / checkpoint.TENSORS)


def _assert_same(one: Path, other: Path) -> None:
    weights = _weights(other)
    for name, tensor in _weights(one).items():
        assert torch.equal(tensor, weights[name]), name
    assert ranks.record(one) == ranks.record(other)


# ---- Killed

KILLS, WHILE_WRITING = 30, 10


@pytest.fixture(scope="module")
def processes():
    """Makes processes that have imported everything already: a new one is there in no time."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["lib.training.run"])
    return context


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, processes) -> Path:
    directory = tmp_path_factory.mktemp("undisturbed") / "run"
    _finish(processes, directory)
    return directory


def _finish(processes, directory: Path) -> None:
    process = processes.Process(target=_train, args=(directory,))
    process.start()
    process.join()
    assert process.exitcode == 0


def test_a_run_that_is_killed_thirty_times_ends_with_the_same_weights(tmp_path, processes, undisturbed):
    rng, disturbed, writing, moments = random.Random(0), tmp_path / "disturbed", 0, []
    checkpoints = disturbed / "checkpoints"
    while len(moments) < KILLS or writing < WHILE_WRITING:
        assert len(moments) < 3 * KILLS, f"{writing} of {len(moments)} kills hit a checkpoint that was being written"
        process = processes.Process(target=_train, args=(disturbed,))
        process.start()
        wanted = _latest(checkpoints) + 5 * rng.randrange(1, 3)
        while _latest(checkpoints) < wanted and process.is_alive():
            time.sleep(0.001)
        if len(moments) % 2:  # every other kill aims at a checkpoint that is being written
            while not any(checkpoints.glob(".step_*.tmp")) and process.is_alive():
                pass
            time.sleep(0.002 * rng.random())
        else:
            time.sleep(0.05 * rng.random())
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "it had ended before"
        assert _latest(checkpoints) >= wanted, "a checkpoint that was whole is gone"
        writing += any(checkpoints.glob(".step_*.tmp"))
        moments.append(_latest(checkpoints))
    _finish(processes, disturbed)
    _assert_same(disturbed, undisturbed)
    print(f"{len(moments)} kills, {writing} of them while a checkpoint was written, after steps {moments}")


def _latest(checkpoints: Path) -> int:
    """The step of the latest checkpoint that has its name."""
    return max((int(folder.name.removeprefix("step_")) for folder in checkpoints.glob("step_*")), default=0)


# ---- Disks


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 200 kB, and a function that gives it another size."""
    mount = tmp_path / "small"
    mount.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", mount], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"only root may mount a small disk: {made.stderr.strip()}")
    yield mount, lambda size: subprocess.run(["mount", "-o", f"remount,size={size}", mount], check=True)
    subprocess.run(["umount", "-l", mount], check=True)


def _itl_train(directory: Path) -> subprocess.CompletedProcess:
    config = directory.parent.parent / "config.json"
    config.write_text(json.dumps(_config().model_dump()))
    return subprocess.run(
        [sys.executable, "-m", "lib", "train", "--config", str(config), "--out", str(directory)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(paths.ROOT)},
        capture_output=True,
        text=True,
    )


def test_a_full_disk_stops_a_run_with_one_sentence_and_it_goes_on_once_there_is_room(small_disk, undisturbed):
    mount, resize = small_disk
    failed = _itl_train(mount / "run")  # one checkpoint of 80 kB fits, with the next there is no room to write a third
    assert failed.returncode == 1, failed.stderr
    complaint = [line for line in failed.stderr.splitlines() if line.startswith("itl:")]
    assert len(complaint) == 1 and "No space left on device" in complaint[0] and "same command" in complaint[0]
    assert "Traceback" not in failed.stderr
    assert checkpoint.latest(mount / "run" / "checkpoints") is not None
    resize("50m")
    assert _itl_train(mount / "run").returncode == 0
    _assert_same(mount / "run", undisturbed)


@pytest.mark.parametrize("cut", [0, -1])
def test_a_truncated_checkpoint_is_passed_over_and_says_so(tmp_path, processes, undisturbed, cut, capsys):
    process = processes.Process(target=_train, args=(tmp_path / "run",))
    process.start()
    while _latest(tmp_path / "run" / "checkpoints") < 15:
        time.sleep(0.001)
    process.kill()
    process.join()
    (file,) = checkpoint.latest(tmp_path / "run" / "checkpoints").glob("*.safetensors")
    os.truncate(file, cut if cut >= 0 else file.stat().st_size - 1)
    assert checkpoint.latest(tmp_path / "run" / "checkpoints") is not None
    assert f"skipped: the checkpoint {file.parent}" in capsys.readouterr().err
    _finish(processes, tmp_path / "run")
    _assert_same(tmp_path / "run", undisturbed)
