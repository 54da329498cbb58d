"""Sweeps, trainings and notebooks on a real Slurm cluster: what is killed, requeued or out of time is not lost."""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import jobs
import pytest
from checkout import Checkout
from safetensors.numpy import load_file
from waiting import processes, wait_for

from lib.paths import ROOT
from lib.slurm import job, submissions
from lib.slurm.tasks import Resources
from lib.training.checkpoint import TENSORS, latest
from lib.training.monitor import read_record

STEPS, CHECKPOINT_EVERY = 500, 20
RUN = ["--people", 2, "--d-model", 4, "--set", f"training.steps={STEPS}"]
RUN += ["--set", f"training.checkpoint_every={CHECKPOINT_EVERY}", "--set", "evaluation.every=null"]


@pytest.fixture(autouse=True)
def where(cluster: Path, checkout: Checkout, monkeypatch) -> None:
    """This process, too, looks for submissions in the checkout's runs."""
    monkeypatch.setenv("ITL_RUNS", str(checkout.runs))


@pytest.fixture(scope="module")
def out_of_time(cluster: Path, checkout: Checkout) -> str:
    """A training that takes longer than its time limit allows: submitted before the other tests, looked at last."""
    arguments = ["train", *RUN, "--out", checkout.runs / "out_of_time", "--time", 3]
    return checkout.submit(*arguments, step_seconds=130 / STEPS)


@pytest.fixture(scope="module")
def undisturbed(checkout: Checkout, out_of_time: str) -> dict:
    """The weights of the same run that nobody disturbs, here and without Slurm."""
    checkout.itl("train", *RUN, "--out", checkout.runs / "undisturbed")
    return weights(checkout.runs / "undisturbed")


def weights(directory: Path) -> dict:
    return load_file(directory / "model" / TENSORS)


def assert_same_weights(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    assert all((ours[name] == theirs[name]).all() for name in ours)


def states(name: str) -> list[str]:
    return [standing.state for standing in submissions.status(submissions.find(name), job.queue())]


def wait_until_over(name: str, seconds: float = 180) -> list[str]:
    """Return the states of a submission's tasks once none is queued or running."""
    return wait_for(lambda: {"queued", "running"}.isdisjoint(now := states(name)) and now, seconds)


def squeue(*arguments: str) -> list[str]:
    """Return `job state` of each job that is queued or running."""
    command = ["squeue", "--noheader", "--array", "--format=%i %T", *arguments]
    return subprocess.run(command, capture_output=True, text=True).stdout.splitlines()


def log(name: str) -> str:
    (path,) = submissions.find(name).logs.glob("*_0_log.out")
    return path.read_text()


def restarts(name: str) -> int:
    (job,) = submissions.find(name).jobs.values()
    shown = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"Restarts=(\d+)", shown)[1])


# ---- A sweep


def kill_one(running: list[list[str]], logs: Path, cluster: Path | None) -> list[str]:
    """Kill the processes of a running job that has begun its training, and its node's daemon if there is a `cluster`.

    running: array job, state, job and node of each. Returns the array job, nothing if there was none.
    """
    for array_job, _, job_id, node in running:
        path = logs / f"{array_job}_0_log.out"
        if not path.exists() or not 1 <= path.read_text().count("a step") < 10:
            continue
        daemon = [int((cluster / f"slurmd-{node}.pid").read_text())] if cluster else []
        for process in daemon + processes(f"SLURM_JOB_ID={job_id}"):
            with suppress(ProcessLookupError):  # srun ends with its tasks
                os.kill(process, signal.SIGKILL)
        if daemon:
            subprocess.run(["slurmd", "-N", node], check=True)
        return [array_job]
    return []


@pytest.mark.slow
@pytest.mark.timeout(900)  # twelve jobs, each of which starts Python and imports torch
def test_a_sweep_whose_jobs_and_daemons_are_killed_loses_nothing(cluster, checkout, out_of_time):
    commit = checkout.git("rev-parse", "HEAD")
    name = checkout.submit("sweep", "05_3", "--profile", "smoke", "--hours", 0, "--jobs", 2, step_seconds=0.1)
    array, logs = submissions.find(name).jobs[0].split("_")[0], submissions.find(name).logs
    folder = checkout.runs / "smoke" / "05_3"
    most, killed = 0, []
    with checkout.edited("experiments/sweep", "def sweep(*_, **__):\n    raise RuntimeError('the edited code')\n"):
        while lines := squeue(f"--jobs={array}", "--format=%i %T %A %N"):
            running = [line.split() for line in lines if " RUNNING " in line]
            most = max(most, len(running))
            if len(killed) < 2 and len(list(folder.glob("*/row.json"))) >= 2 + 2 * len(killed):
                killed += kill_one(running, logs, None if killed else cluster)
            time.sleep(0.2)
    assert most == 2 and len(killed) == 2
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/row.json")}
    assert len(before) < 12 and states(name).count("done") == len(before)
    assert {"done", "failed", "missing"} >= {*states(name)}
    assert checkout.itl("retry", name) == f"{12 - len(before)} tasks submitted again\n"
    assert wait_until_over(name, 600) == ["done"] * 12
    rows = {path: json.loads(path.read_text()) for path in folder.glob("*/row.json")}
    assert len(rows) == 12 and {path: path.stat().st_mtime_ns for path in before} == before
    assert {row["commit"] for row in rows.values()} == {commit}
    assert checkout.itl("retry", name) == "0 tasks submitted again\n"
    assert checkout.itl("status").splitlines()[-1] == f"{name}: 12 done"


# ---- A training


@pytest.mark.slow
def test_a_requeued_training_ends_with_the_weights_of_an_undisturbed_one(checkout, undisturbed):
    name = checkout.submit("train", *RUN, "--out", checkout.runs / "requeued", step_seconds=8 / STEPS)
    wait_for(lambda: latest(checkout.runs / "requeued" / "checkpoints") and log(name).count("a step") > STEPS / 4)
    (job,) = submissions.find(name).jobs.values()
    subprocess.run(["scontrol", "requeue", job], check=True)
    assert wait_until_over(name) == ["done"]
    assert restarts(name) == 1
    assert STEPS <= log(name).count("a step") <= STEPS + CHECKPOINT_EVERY + 1  # it did not begin anew
    assert_same_weights(weights(checkout.runs / "requeued"), undisturbed)


@pytest.mark.slow
def test_two_jobs_that_start_the_same_run_train_it_once(checkout):
    names = [checkout.submit("train", *RUN, step_seconds=3 / STEPS) for _ in range(2)]
    assert len({*names}) == 2
    assert [wait_until_over(name) for name in names] == [["done"], ["done"]]
    assert sum(log(name).count("a step") for name in names) == STEPS
    (row,) = (checkout.runs / "train").glob("*/row.json")
    assert json.loads(row.read_text())["steps"] == STEPS


@pytest.mark.slow
def test_a_cancelled_training_is_missing_and_goes_on_when_retried(checkout, undisturbed):
    name = checkout.submit("train", *RUN, "--out", checkout.runs / "cancelled", step_seconds=8 / STEPS)
    wait_for(lambda: latest(checkout.runs / "cancelled" / "checkpoints"))
    assert checkout.itl("cancel", name) == "1 jobs cancelled\n"
    assert wait_until_over(name) == ["missing"]
    (first, reason, last) = checkout.itl("status", name).splitlines()
    assert first == f"{name}: 1 missing" and "missing (CANCELLED)" in reason and last.strip()
    checkout.itl("retry", name)
    assert wait_until_over(name) == ["done"]
    assert_same_weights(weights(checkout.runs / "cancelled"), undisturbed)


# ---- A notebook


@pytest.mark.slow
def test_a_training_on_two_nodes_has_the_losses_of_one_process_and_survives_a_preemption(checkout):
    arguments = ["--people", 4, "--d-model", 8, "--set", "training.steps=100", "--set", "evaluation.every=null"]
    two, one = checkout.runs / "two nodes", checkout.runs / "one process"
    name = checkout.submit("train", *arguments, "--out", two, "--nodes", 2, step_seconds=0.05)
    (job,) = submissions.find(name).jobs.values()
    path = submissions.find(name).logs / f"{job}_0_log.out"
    wait_for(lambda: path.exists() and path.read_text().count("a step") > 10)
    subprocess.run(["scancel", "--signal=USR2", job], check=True)  # as before a time limit, to both processes
    checkout.itl("train", *arguments, "--out", one)
    assert wait_until_over(name) == ["done"]
    assert restarts(name) == 1
    losses = [[line["loss"] for line in read_record(folder / "metrics.jsonl")] for folder in (two, one)]
    assert len(losses[0]) == 2 and losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert latest(two / "checkpoints") is None and path.read_text().count("a step") == 100


@pytest.mark.slow
def test_a_fine_tuning_on_two_nodes_has_the_losses_of_one_process(checkout):
    settings = {"batch_size": 8, "checkpoint_every": 4, "questions": 4, "unseen_people": 4, "prompts": 1}
    settings |= {"capability": '"none"', "dtype": '"float32"'}
    arguments = ["--model", "random", "--facts", 8, "--steps", 4]
    arguments += [argument for name, value in settings.items() for argument in ("--set", f"{name}={value}")]
    two, one = checkout.runs / "fine-tuned by two", checkout.runs / "fine-tuned by one"
    name = checkout.submit("finetune", *arguments, "--out", two, "--nodes", 2, "--time", 10)
    checkout.itl("finetune", *arguments, "--out", one)
    assert wait_until_over(name, 240) == ["done"]
    losses = [[row["loss"] for row in json.loads((folder / "rows.json").read_text())] for folder in (two, one)]
    assert losses[0][1:] == pytest.approx(losses[1][1:], rel=1e-5)


@pytest.mark.slow
def test_a_notebook_runs_as_a_job(checkout):
    name = checkout.submit("notebook", "05_1", "--profile", "smoke")
    assert wait_until_over(name) == ["done"]
    folder = checkout.runs / "smoke" / "notebooks"
    cells = json.loads((folder / "05_1_parameter_bounds.ipynb").read_text())["cells"]
    assert all(cell["execution_count"] for cell in cells if cell["cell_type"] == "code")
    assert (folder / "05_1_parameter_bounds.html").exists()
    assert (checkout.runs / "smoke" / "figures" / "parameter_bounds.pdf").exists()


@pytest.mark.slow
def test_a_job_that_fails_is_failed_and_says_why(checkout):
    name = checkout.submit("train", *RUN, "--out", checkout.runs / "failed", "--device", "cuda:99")
    assert wait_until_over(name) == ["failed"]
    (first, reason, _) = checkout.itl("status", name).splitlines()
    assert first == f"{name}: 1 failed"
    assert "failed (lib.base.InputError: this machine has no device 'cuda:99'" in reason


# ---- Jobs of several tasks, and runs that end themselves when they are asked to


@pytest.fixture
def hand_over(tmp_path):
    """Submits a function of the module `jobs`, whose argument is the test's folder; returns the id of its job."""

    def hand_over(function: Callable[[str], None], **resources: int) -> str:
        environment = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)])}
        executor = job.executor(tmp_path / "logs", "test", Resources(**resources), environment)
        (submitted,) = job.submit(executor, function, [str(tmp_path)])
        return submitted

    return hand_over


@pytest.mark.slow
def test_processes_on_two_nodes_find_each_other(tmp_path, hand_over):
    submitted = hand_over(jobs.add_ranks, nodes=2)
    wait_for(lambda: not squeue(f"--jobs={submitted}"))
    found = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("rank*.json"))]
    expected = {"sum": 21, "WORLD_SIZE": 2, "LOCAL_RANK": 0}
    log = (tmp_path / "logs" / f"{submitted}_0_log.out").read_text()
    assert found == [expected | {"RANK": rank, "SLURM_NODEID": rank} for rank in (0, 1)], log


@pytest.mark.slow
def test_a_run_that_ends_itself_before_the_time_limit_comes_back(tmp_path, hand_over):
    submitted = hand_over(jobs.run_until_asked)
    wait_for((tmp_path / "started").exists)
    subprocess.run(["scancel", "--signal=USR2", submitted], check=True)
    wait_for((tmp_path / "row").exists)
    wait_for(lambda: not squeue(f"--jobs={submitted}"))
    assert job.queue()[submitted][0] == "COMPLETED"


@pytest.mark.slow
def test_a_run_that_ends_itself_when_it_is_cancelled_stays_so(tmp_path, hand_over):
    submitted = hand_over(jobs.run_until_asked)
    wait_for((tmp_path / "started").exists)
    subprocess.run(["scancel", submitted], check=True)
    wait_for(lambda: not squeue(f"--jobs={submitted}"))
    assert (tmp_path / "checkpoint").exists() and not (tmp_path / "row").exists()
    assert job.queue()[submitted][0] == "CANCELLED"


@pytest.mark.slow
def test_what_slurm_refuses_leaves_nothing(checkout):
    with pytest.raises(AssertionError, match="itl: Slurm refused the job: .*[Ff]eature"):
        checkout.submit("train", *RUN, "--out", checkout.runs / "refused", "--constraint", "quantum")
    assert not (checkout.runs / "refused").exists()
    assert all(submission.jobs[0] for submission in submissions.everything())


# ---- Last, for it takes minutes


@pytest.mark.slow
def test_a_training_out_of_time_comes_back_and_ends_with_the_weights_of_an_undisturbed_one(
    checkout, out_of_time, undisturbed
):
    assert wait_until_over(out_of_time, 300) == ["done"]
    assert restarts(out_of_time) >= 1 and "timed-out" in log(out_of_time)
    assert log(out_of_time).count("a step") <= STEPS + (CHECKPOINT_EVERY + 1) * restarts(out_of_time)
    assert_same_weights(weights(checkout.runs / "out_of_time"), undisturbed)
