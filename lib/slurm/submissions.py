"""What was handed to Slurm: plans as jobs, the code they run, how they stand, and what is missing.

A submission is a folder in runs/submissions: `submission.json` (its tasks as plain data, and the job of each), `code/`
and `inputs/` (copies of the code and of what its tasks read, so that editing these does not change queued jobs) and
`logs/`. Results go where they always go, so what is done is seen from the results; only for the rest is Slurm asked.
"""

import itertools
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import chdir
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

from lib import paths
from lib.base import Config, InputError
from lib.config import Observers, RunConfig
from lib.dialogs.tokenizers import tokenizer_file
from lib.experiments import sweep as sweeps
from lib.experiments.plan import searches
from lib.experiments.search import Search
from lib.paths import ROW, ROWS, write_json
from lib.provenance import COMMIT, commit
from lib.slurm import job
from lib.slurm.job import Resources
from lib.training.run import read_inputs, run

RECORD = "submission.json"
#: What a job needs of the repository.
CODE = ("lib", "notebooks", "paper_data")
#: Slurm's default MaxArraySize is 1001.
MOST_TASKS = 1000
STATES = ("queued", "running", "done", "failed", "missing")


# Tasks: what one job does. Those of a submission are of one kind; its `done` says which have their result -------------


class _Task(Config):
    """What one job does. Jobs start later, and maybe elsewhere: what they need is kept in the submission's folder."""

    def keep_inputs(self, folder: Path) -> Self:
        """The same task of copies in `folder` of the files that it reads. Raises `InputError`."""
        return self


class Train(_Task):
    """One run, in as many processes as the job has."""

    kind: ClassVar = "train"
    config: dict[str, Any]
    directory: str
    device: str = "auto"
    observers: dict[str, Any] = {}
    sharded: bool = False
    tensor: int = 1
    #: Where files lie, by the paths that the configuration names: its paths, and so the run's id, stay as given.
    inputs: dict[str, str] = {}

    def __call__(self) -> None:
        options = {name: getattr(self, name) for name in ("device", "sharded", "tensor", "inputs")}
        observers = Observers.parse(self.observers)
        run(RunConfig.parse(self.config), Path(self.directory), description="training", observers=observers, **options)

    def keep_inputs(self, folder: Path) -> Self:
        """Copies of the people and the vocabulary; files of dialogs, which may be large, stay where they are."""
        config = RunConfig.parse(self.config)
        inputs = {path: str(Path(path).resolve()) for path in config.training.files}
        sources = {config.facts.csv: config.facts.csv and Path(config.facts.csv)}
        if config.tokenizer != "bytes":
            sources[config.tokenizer] = tokenizer_file(config.tokenizer)
        for number, (path, source) in enumerate((path, source) for path, source in sources.items() if source):
            folder.mkdir(parents=True, exist_ok=True)
            copy = folder / f"{number}-{source.name}"
            try:
                shutil.copyfile(source, copy)
            except OSError as error:
                raise InputError(f"cannot copy {source}: {error.strerror}") from None
            inputs[path] = str(copy)
        return self.model_copy(update={"inputs": inputs})

    @classmethod
    def done(cls, tasks: "Sequence[Train]", since: float) -> list[bool]:
        return [(Path(task.directory) / ROW).exists() for task in tasks]

    def __str__(self) -> str:
        return self.directory


class Finetune(_Task):
    """One fine-tuning, in as many processes as the job has (extra `[scale]`)."""

    kind: ClassVar = "finetune"
    config: dict[str, Any]
    directory: str
    device: str = "auto"
    #: Relative paths of base and questions begin here, wherever a job starts.
    current: str = "."

    def __call__(self) -> None:
        from lib.finetune.config import FinetuneConfig
        from lib.finetune.train import finetune

        with chdir(self.current):
            finetune(FinetuneConfig.parse(self.config), Path(self.directory), device=self.device)

    @classmethod
    def done(cls, tasks: "Sequence[Finetune]", since: float) -> list[bool]:
        return [(Path(task.directory) / ROWS).exists() for task in tasks]

    def __str__(self) -> str:
        return self.directory


class Sweep(_Task):
    """Some searches of a section, one run after the other."""

    kind: ClassVar = "sweep"
    section: str
    profile: str
    searches: list[dict[str, Any]]
    device: str = "auto"

    @property
    def plan(self) -> list[Search]:
        """The searches as they were when they were submitted, whatever has become of the section's plan."""
        return [
            Search(**fields | {"base": RunConfig.parse(fields["base"]), "sizes": tuple(fields["sizes"])})
            for fields in self.searches
        ]

    def __call__(self) -> None:
        report = sweeps.sweep(self.section, self.profile, device=self.device, plan=self.plan, in_process=True)
        if report.failed:
            raise RuntimeError("; ".join(report.failed.values()))

    @classmethod
    def done(cls, tasks: "Sequence[Sweep]", since: float) -> list[bool]:
        plan = [search for task in tasks for search in task.plan]
        left = iter(sweeps.hours_ahead(tasks[0].section, tasks[0].profile, plan))
        return [not sum(itertools.islice(left, len(task.searches))) for task in tasks]

    def __str__(self) -> str:
        base = RunConfig.parse(self.searches[0]["base"])
        first = f"{base.mode}, {4 * base.facts.n_people} facts, seed {base.seed}"
        return first + (f", and {len(self.searches) - 1} more searches" if len(self.searches) > 1 else "")


class Notebook(_Task):
    """One notebook; it starts anew if it is interrupted, but the runs in it are not repeated."""

    kind: ClassVar = "notebook"
    name: str
    profile: str
    parameters: dict[str, Any]
    figures: str

    def __call__(self) -> None:
        from lib.notebook import runner

        os.environ["ITL_FIGURES"] = self.figures
        runner.run(self.name, self.profile, self.parameters)

    @classmethod
    def done(cls, tasks: "Sequence[Notebook]", since: float) -> list[bool]:
        executed = [paths.profile_dir(t.profile) / "notebooks" / f"{Path(t.name).stem}.ipynb" for t in tasks]
        return [path.exists() and path.stat().st_mtime >= since for path in executed]

    def __str__(self) -> str:
        return self.name


Task = Train | Finetune | Sweep | Notebook
_KINDS = {kind.kind: kind for kind in (Train, Finetune, Sweep, Notebook)}


def train_task(config: RunConfig, directory: Path, **options) -> Train:
    """A run as a task; `options` are those of `Train`. `InputError` if files that it names cannot be used."""
    read_inputs(config)
    for path in config.training.files:  # a job tokenizes them, which may take long
        try:
            open(path, "rb").close()
        except OSError as error:
            raise InputError(f"cannot read the dialogs of {path}: {error.strerror}") from None
    values = config.model_dump(mode="json", exclude_defaults=True)
    return Train(config=values, directory=str(directory.resolve()), **options)


def sweep_tasks(section: str, profile: str, hours: float, device: str = "auto") -> list[Sweep]:
    """What a section still needs in a profile as tasks of about `hours`, if its searches are not longer.

    The runs of a search depend on each other and stay together; those of a full grid are on their own.
    """
    plan = [
        part
        for search in searches(section, profile)
        for part in ([search] if search.threshold is not None else _single_runs(search))
    ]
    costs = sweeps.hours_ahead(section, profile, plan)
    plan = [search for search, cost in zip(plan, costs, strict=True) if cost]
    costs = [cost for cost in costs if cost]
    groups = pack(costs, hours)
    while len(groups) > MOST_TASKS:
        hours = max(2 * hours, min(costs))
        groups = pack(costs, hours)
    fields = [_as_data(search) for search in plan]
    return [
        Sweep(section=section, profile=profile, searches=[fields[i] for i in group], device=device) for group in groups
    ]


def _as_data(search: Search) -> dict[str, Any]:
    base = search.base.model_dump(mode="json", exclude_defaults=True)
    return vars(search) | {"base": base, "sizes": list(search.sizes)}


def _single_runs(search: Search) -> list[Search]:
    return [replace(search, sizes=(size,)) for size in search.sizes]


def pack(hours: Sequence[float], limit: float) -> list[list[int]]:
    """Consecutive positions whose hours add up to no more than `limit`; one that is longer is alone."""
    groups: list[list[int]] = []
    filled = 0.0
    for position, cost in enumerate(hours):
        if groups and filled + cost <= limit:
            groups[-1].append(position)
            filled += cost
        else:
            groups.append([position])
            filled = cost
    return groups


def notebook_task(name: str, profile: str, assignments: Sequence[str]) -> Notebook:
    """A notebook as a task, `assignments` as `itl notebooks -p` takes them; `InputError` if it would be refused."""
    from lib.notebook import catalog

    source = catalog.find(name)
    parameters = catalog.parse_assignments([source], assignments)
    catalog.checked(source, profile, parameters)
    name = source.stem if source.parent == paths.NOTEBOOKS else str(source.resolve())
    return Notebook(name=name, profile=profile, parameters=parameters, figures=str(paths.figures(profile).resolve()))


# Submitting -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Submission:
    """What was submitted together. `jobs` has the Slurm job of each task, the latest if it was submitted again."""

    folder: Path
    tasks: list[Task]
    resources: Resources  # filled
    parallel: int
    submitted_at: float  # seconds since 1970
    jobs: list[str | None]

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def logs(self) -> Path:
        return self.folder / "logs"

    def write(self) -> None:
        """Write `submission.json`, without what is at its default: the copied code, which reads it, may be older."""
        record = {
            "kind": self.tasks[0].kind,
            "resources": self.resources.model_dump(exclude_defaults=True),
            "parallel": self.parallel,
            "submitted_at": self.submitted_at,
            "jobs": self.jobs,
            "tasks": [task.model_dump(exclude_defaults=True) for task in self.tasks],
        }
        write_json(self.folder / RECORD, record)

    def executor(self):
        """What submits its jobs."""
        code = str(self.folder / "code")
        environment = {
            "PYTHONPATH": code,
            "PYTHONSAFEPATH": "1",  # or Python would look for lib in the current folder first
            "ITL_RUNS": str(paths.runs().resolve()),
            "ITL_PROGRESS": "lines",
            "OMP_NUM_THREADS": str(self.resources.cpus),
        }
        return job.executor(self.logs, self.name, self.resources, environment, self.parallel)

    def hand_over(self, positions: Sequence[int]) -> list[str]:
        """Give the tasks at these positions to Slurm; their jobs."""
        return job.submit(self.executor(), [job.Job(perform, str(self.folder), i) for i in positions])

    def with_jobs(self, positions: Sequence[int], jobs: Sequence[str]) -> "Submission":
        """The submission with the jobs of the tasks at these positions, written down."""
        latest = dict(enumerate(self.jobs)) | dict(zip(positions, jobs, strict=True))
        submitted = replace(self, jobs=list(latest.values()))
        submitted.write()
        return submitted


def submissions_dir() -> Path:
    """runs/submissions."""
    return paths.runs().resolve() / "submissions"


def perform(folder: str, position: int) -> None:
    """What a job does: one task of a submission."""
    read(Path(folder)).tasks[position]()


def read(folder: Path) -> Submission:
    """The submission in a folder."""
    record = json.loads((folder / RECORD).read_text())
    tasks = [_KINDS[record["kind"]].parse(task) for task in record["tasks"]]
    resources = Resources.parse(record["resources"])
    return Submission(folder, tasks, resources, record["parallel"], record["submitted_at"], record["jobs"])


def find(name: str) -> Submission:
    """The submission of that name, or an `InputError` that lists those there are."""
    known = [submission.name for submission in everything()]
    if name not in known:
        raise InputError(f"there is no submission {name!r}: there are {', '.join(known) or 'none'}")
    return read(submissions_dir() / name)


def everything() -> list[Submission]:
    """All submissions, the oldest first."""
    found = [read(path.parent) for path in submissions_dir().glob(f"*/{RECORD}")]
    return sorted(found, key=lambda submission: submission.submitted_at)


def plan(name: str, tasks: Sequence[Task], resources: Resources, parallel: int = 1) -> Submission:
    """Tasks as a submission called `name`, or `name-2` and so on if that is taken. Nothing is written."""
    if parallel < 1:
        raise InputError(f"jobs = {parallel}: at least one job has to run at a time")
    free = (name if n == 1 else f"{name}-{n}" for n in range(1, 10**6))
    folder = next(folder for label in free if not (folder := submissions_dir() / label).exists())
    resources = job.fill_here(resources)
    return Submission(folder, list(tasks), resources, parallel, time.time(), [None] * len(tasks))


def submit(planned: Submission) -> Submission:
    """Copy the code and hand all tasks to Slurm. If Slurm refuses, nothing is left."""
    try:
        planned.folder.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {planned.folder}: {error.strerror}") from None
    try:
        snapshot(planned.folder / "code")
        planned = replace(
            planned,
            tasks=[task.keep_inputs(planned.folder / "inputs" / str(i)) for i, task in enumerate(planned.tasks)],
        )
        planned.write()  # a job reads it, and may start at once
        jobs = planned.hand_over(range(len(planned.tasks)))
    except BaseException:
        shutil.rmtree(planned.folder)
        raise
    return planned.with_jobs(range(len(planned.tasks)), jobs)  # whatever happens now, the jobs have their code


def snapshot(folder: Path) -> None:
    """Copy the code as it is now, and say in a file of what commit it is."""
    for name in CODE:
        if (paths.ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", ".*.tmp")
            shutil.copytree(paths.ROOT / name, folder / name, ignore=ignored)
    (folder / COMMIT).write_text(f"{commit.__wrapped__()}\n")  # as it is now, not as this process imported it


# How they stand -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Standing:
    """How one task stands."""

    position: int
    task: Task
    job: str | None
    state: str  # one of STATES; failed: with an error; missing: its job is gone without one, cancelled or killed
    reason: str  # Slurm's for waiting, the error, or what is known of the job's end
    last_line: str  # of the log


def status(submission: Submission, queue: dict[str, tuple[str, str]]) -> list[Standing]:
    """How each task of a submission stands; `queue` from `job.queue`."""
    done = submission.tasks[0].done(submission.tasks, submission.submitted_at)
    return [_standing(submission, position, is_done, queue) for position, is_done in enumerate(done)]


def _standing(submission: Submission, position: int, is_done: bool, queue: dict[str, tuple[str, str]]) -> Standing:
    task, job = submission.tasks[position], submission.jobs[position]
    slurm_state, slurm_reason = queue.get(job, ("", ""))
    error = job.error(submission.logs, job) if job else None
    if is_done:
        state, reason = "done", ""
    elif slurm_state in ("PENDING", "REQUEUED"):
        state, reason = "queued", slurm_reason
    elif slurm_state in ("RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED"):
        state, reason = "running", ""
    elif error is not None:
        state, reason = "failed", error
    elif slurm_state in ("FAILED", "OUT_OF_MEMORY", "NODE_FAIL", "BOOT_FAIL", "TIMEOUT", "DEADLINE"):
        state, reason = "failed", f"{slurm_state} ({slurm_reason})"
    else:
        state, reason = "missing", slurm_state or "Slurm no longer knows its job"
    return Standing(position, task, job, state, reason, job.last_line(submission.logs, job) if job else "")


def summary(standings: Sequence[Standing]) -> str:
    """How many tasks stand how: `7 done, 2 running, 1 failed`."""
    counts = Counter(standing.state for standing in standings)
    return ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])


def cancel(submission: Submission) -> int:
    """End all jobs of a submission that are queued or running; how many they were."""
    alive = [s.job for s in status(submission, job.queue()) if s.state in ("queued", "running")]
    if alive:
        job.cancel(alive)
    return len(alive)


def retry(submission: Submission) -> int:
    """Submit again what failed and what is missing, with the same code; how many tasks that are."""
    again = [s.position for s in status(submission, job.queue()) if s.state in ("failed", "missing")]
    if again:
        submission.with_jobs(again, submission.hand_over(again))
    return len(again)
