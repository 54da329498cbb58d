"""Submissions to Slurm: their record, the code that their jobs run, and the status of their tasks.

A submission is a folder in runs/submissions: `submission.json` (its tasks as plain data, and the job of each), `code/`
and `inputs/` (copies, so that later edits do not change queued jobs), `logs/`, and `outcomes/` with a JSON file for
each task that has ended: its error, or null if it was done. Results go where they always go.
"""

import shutil
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from contextlib import chdir
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import Field

from lib import paths
from lib.base import DamagedFile, check_known
from lib.slurm import job, tasks
from lib.slurm.tasks import Resources, Task, Work

RECORD = "submission.json"
#: What a job needs of the repository.
CODE = ("lib", "notebooks", "paper_data")


class Submission(Work):
    """Tasks that were submitted together."""

    resources: Resources
    parallel: int = 1  # jobs at a time
    current: str  # the folder where relative paths begin
    submitted_at: float  # seconds since 1970
    jobs: dict[Annotated[int, Field(strict=False)], str] = {}  # each task's latest Slurm job, by the task's position

    @property
    def folder(self) -> Path:
        return submissions_dir() / self.name

    @property
    def logs(self) -> Path:
        return self.folder / "logs"

    def outcome(self, position: int) -> Path:
        """Return the file that says how a task ended."""
        return self.folder / "outcomes" / f"{position}.json"

    def write(self) -> None:
        """Write `submission.json` without defaults: the copied code, which reads it, may be older."""
        paths.write_json(self.folder / RECORD, self.model_dump(mode="json", exclude_defaults=True))

    def executor(self):
        """Return its jobs' executor."""
        environment = {
            "PYTHONPATH": str(self.folder / "code"),
            "PYTHONSAFEPATH": "1",  # or Python would look for lib in the current folder first
            "ITL_RUNS": str(paths.runs().resolve()),
            "ITL_PROGRESS": "lines",
        }
        processes = 1 if self.kind == "notebook" else max(1, self.resources.gpus)
        return job.executor(self.logs, self.name, self.resources, environment, processes, self.parallel)

    def submit(self, positions: Sequence[int]) -> None:
        """Give the tasks at these positions to Slurm, and write down their jobs. Raises `InputError`."""
        for position in positions:
            self.outcome(position).unlink(missing_ok=True)
        jobs = job.submit(self.executor(), perform, [self.name] * len(positions), positions)
        self.jobs.update(zip(positions, jobs, strict=True))
        self.write()


def submissions_dir() -> Path:
    """Return runs/submissions."""
    return paths.runs().resolve() / "submissions"


def perform(name: str, position: int) -> None:
    """Do one task of a submission, as its job does, and write down the outcome."""
    from lib.training.distributed import Preempted, is_first

    submission = find(name)
    task, outcome = submission.tasks[position], submission.outcome(position)
    try:
        with chdir(submission.current):
            tasks.do(submission.kind, submission.copies, task.arguments)
    except Exception as error:
        if not isinstance(error, Preempted) and not outcome.exists():  # the first of several processes says why
            paths.write_json(outcome, {"error": traceback.format_exception_only(error)[-1].strip()})
        raise
    if is_first():
        paths.write_json(outcome, {"error": None})


def find(name: str) -> Submission:
    """Return the submission of that name. Raises `InputError` with the names that there are."""
    path = submissions_dir() / name / RECORD
    if not path.is_file():
        check_known("submission", name, (submission.name for submission in everything()))
    return _read(path)


def _read(path: Path) -> Submission:
    return Submission.parse(paths.read_json(path, check=Submission.parse))


def everything() -> list[Submission]:
    """Return all submissions, the oldest first."""
    found = [submission for _, submission in paths.whole(submissions_dir().glob(f"*/{RECORD}"), _read)]
    return sorted(found, key=lambda submission: submission.submitted_at)


def plan(work: Work, resources: Resources, parallel: int = 1) -> Submission:
    """Return work as a submission of its name, or NAME-2 and so on if that is taken. Nothing is written.

    Raises `InputError` where there is no Slurm.
    """
    job.slurm("sinfo", "--version")
    name, number = work.name, 1
    while (submissions_dir() / name).exists():
        number += 1
        name = f"{work.name}-{number}"
    how = {"resources": resources, "parallel": parallel, "current": str(Path.cwd()), "submitted_at": time.time()}
    return Submission(**{**dict(work), **how, "name": name})


def submit(planned: Submission) -> None:
    """Copy the code and the files of the work, and give all tasks to Slurm. If Slurm refuses, nothing is left."""
    planned.folder.mkdir(parents=True)
    try:
        snapshot(planned.folder / "code")
        for number, (path, source) in enumerate(planned.copies.items()):
            copy = planned.folder / "inputs" / str(number) / Path(source).name
            copy.parent.mkdir(parents=True)
            planned.copies[path] = str(shutil.copyfile(source, copy))
        (planned.folder / "outcomes").mkdir()
        planned.write()  # a job reads it, and may start at once
        planned.submit(range(len(planned.tasks)))
    except BaseException:
        if not planned.jobs:  # else jobs were submitted, which need their code
            shutil.rmtree(planned.folder)
        raise


def snapshot(folder: Path) -> None:
    """Copy the code as it is now, with a file that names its commit."""
    from lib.provenance import COMMIT, commit

    ignored = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", ".*.tmp")
    for name in CODE:
        if (paths.ROOT / name).is_dir():
            shutil.copytree(paths.ROOT / name, folder / name, ignore=ignored)
    now = commit.__wrapped__()  # as it is now, not as this process imported it
    (folder / COMMIT).write_text(f"{now}\n", encoding="utf-8")


# Status ---------------------------------------------------------------------------------------------------------------

STATES = ("queued", "running", "done", "failed", "missing")
#: Slurm's states of jobs that are to start, and of those that have ended. In all others a job may run.
_WAITING = {"PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"}
_FAILED = {"FAILED", "OUT_OF_MEMORY", "NODE_FAIL", "BOOT_FAIL", "TIMEOUT", "DEADLINE"}
_GONE = {"COMPLETED", "CANCELLED", "PREEMPTED", "REVOKED"}


class Standing(NamedTuple):
    """The status of one task."""

    position: int
    task: Task
    job: str | None
    state: str  # one of STATES; missing: its job is gone without an outcome, cancelled or killed
    reason: str  # why it waits, the error, or what is known of the job's end
    last_line: str  # of the log


def status(submission: Submission, queue: dict[str, tuple[str, str]]) -> list[Standing]:
    """Return the status of each task of a submission; queue: from `job.queue`."""
    standings = []
    for position, task in enumerate(submission.tasks):
        job_id = submission.jobs.get(position)
        state, reason = _state(submission.outcome(position), *queue.get(job_id, ("", "")))
        log = job.last_line(submission.logs / f"{job_id}_0_log.out")
        standings.append(Standing(position, task, job_id, state, reason, log))
    return standings


def _state(outcome: Path, state: str, reason: str) -> tuple[str, str]:
    """Return one of STATES and why, from a task's outcome and Slurm's words about its job."""
    try:
        error = paths.read_json(outcome, fields=("error",))["error"] if outcome.exists() else ""
    except DamagedFile as damaged:
        error = str(damaged)
    if error is None:
        return "done", ""
    if state in _WAITING:
        return "queued", reason
    if state and state not in _FAILED | _GONE:
        return "running", ""
    if error:
        return "failed", error
    if state in _FAILED:
        return "failed", f"{state} ({reason})"
    return "missing", state or "Slurm no longer knows its job"


def summary(standings: Sequence[Standing]) -> str:
    """Count the tasks in each state: `7 done, 2 running, 1 failed`."""
    counts = Counter(standing.state for standing in standings)
    return ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])


def cancel(submission: Submission) -> int:
    """End all jobs of a submission that are queued or running; returns how many."""
    alive = [s.job for s in status(submission, job.queue()) if s.state in ("queued", "running")]
    if alive:
        job.slurm("scancel", *alive)
    return len(alive)


def retry(submission: Submission) -> int:
    """Submit again what failed and what is missing, with the same code; returns how many tasks."""
    again = [s.position for s in status(submission, job.queue()) if s.state in ("failed", "missing")]
    if again:
        submission.submit(again)
    return len(again)
