"""Run the searches of an experiment: each run in a process of its own, resumable, and none of them twice."""

import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from lib import paths
from lib.base import InputError, WorkError
from lib.config import RunConfig, config_of, read_row
from lib.experiments.plan import Search, searches
from lib.experiments.rows import known_rows, sweep_dir
from lib.experiments.worker import attempt
from lib.facts.csv import read_people_csv
from lib.paths import ROW
from lib.progress import LINE_INTERVAL, progress

#: How often a failing run is tried before it counts as failed.
TRIES = 2
#: About how many FLOP/s small models reach: on a laptop core, on an H200 that trains one model.
SPEEDS = {"cpu": 1.5e10, "cuda": 5e11}
#: How many missing runs a report names.
LISTED = 5


@dataclass
class Report:
    """The outcome of a sweep: what was done, what failed and what is missing."""

    done_before: int = 0  # runs that had a row already
    done_now: int = 0
    failed: dict[str, str] = field(default_factory=dict)  # run id -> the error's last line
    missing: list = field(default_factory=list)  # configurations of runs that could start now
    runs_ahead: int = 0  # about how many runs are left, those that depend on others included
    hours_ahead: float = 0.0  # about how many hours they take one process; 0 if that is not known

    def check(self) -> None:
        """Raise `WorkError` if a run failed: a notebook must not go on as if it had its rows."""
        if self.failed:
            raise WorkError("; ".join(f"{run}: {reason}" for run, reason in self.failed.items()))

    def __str__(self) -> str:
        hours = f" and {self.hours_ahead:,.1f} hours of one process" if self.hours_ahead else ""
        ahead = f"about {self.runs_ahead:,} runs{hours} ahead, beginning with" if self.missing else "nothing is missing"
        titles = [f"  {config.title}" for config in self.missing[:LISTED]]
        failed = [f"failed: {run_id}: {reason}" for run_id, reason in self.failed.items()]
        return "\n".join([f"{self.done_now} runs done now, {self.done_before} before; {ahead}", *titles, *failed])


def one_by_one(
    title: str, plan: Sequence, rows: Callable[[], Any], work: Callable, *, dry_run: bool = False, max_hours: float
) -> Report:
    """Do `work` here for each configuration of a plan that has no row yet; if `dry_run`, only report what is missing.

    rows: returns the table of finished runs. work: returns False if it could not do it yet, or need not. After
    `max_hours` nothing new is begun. A failure is reported, and the others continue.
    """

    def missing() -> list:
        done = {*rows().run_id}
        return [config for config in plan if config.run_id not in done]

    todo, deadline = missing(), time.monotonic() + 3600 * max_hours
    report = Report(done_before=len(plan) - len(todo))
    if todo and not dry_run:
        from lib.training.distributed import Preempted  # imports torch, as all such work does

        with progress(len(todo), title) as bar:
            for config in todo:
                if time.monotonic() >= deadline:
                    break
                try:
                    report.done_now += work(config) is not False
                except Preempted:
                    raise
                except Exception as error:  # a gated model, say, or one too large for the memory
                    report.failed[config.run_id] = f"{config.title}: {type(error).__name__}: {error}"
                bar.update(1)
    report.missing = missing()
    report.runs_ahead = len(report.missing)
    return report


def sweep(
    section: str,
    profile: str,
    *,
    jobs: int | None = None,
    dry_run: bool = False,
    max_hours: float = math.inf,
    device: str = "auto",
    plan: Sequence[Search] | None = None,
    in_process: bool = False,
) -> Report:
    """Run all that an experiment needs in a profile and that has no row yet, `jobs` runs at a time.

    section: as `lib.experiments.plan.searches` takes it. jobs: by default one per core, or one per GPU; of several GPUs
    each run gets one (see `assign_devices`). max_hours: after this time runs save a checkpoint and stop; the same call
    resumes them. dry_run: run nothing; the report says what is ahead, on a CPU core unless `device` names a GPU.
    plan: searches to do instead of all of the section's. in_process: run here, one after the other, without processes,
    each to its end; raises `Preempted`.

    A failing run is tried once more, then reported; the others go on.
    """
    if jobs is not None and not 1 <= jobs <= 1_000:
        raise InputError(f"jobs = {jobs}: a sweep takes at least one process, and at most 1,000")
    plan = searches(section, profile) if plan is None else plan
    rows, recalls = _finished(section, profile, plan)
    report = Report(done_before=len(recalls))
    if not dry_run and _pending(plan, recalls):
        devices = [device]
        if not in_process:
            import torch  # only here: planning and a finished sweep do without it

            from lib.training.devices import resolve_device, usable_cores

            n_gpus = torch.cuda.device_count() if resolve_device(device).type == "cuda" else 0
            devices = assign_devices(device, jobs, n_gpus, usable_cores())
        _execute(plan, recalls, report, sweep_dir(section, profile), devices, 3600 * max_hours, in_process)
        rows, recalls = _finished(section, profile, plan)  # a run that was asked to stop may finish instead
        report.done_now = len(recalls) - report.done_before
    report.missing = _pending(plan, recalls)
    for config in report.missing if dry_run else ():
        check_files(config)
    ahead = [config for search in plan for config in _expected(search, recalls)]
    speed = _speed(rows.values(), device)
    report.runs_ahead, report.hours_ahead = len(ahead), _hours(ahead, speed)
    return report


def hours_ahead(section: str, profile: str, plan: Sequence[Search], device: str) -> list[float]:
    """Return about how many hours each search of a plan still takes one core or GPU; 0 for one that is over."""
    rows, recalls = _finished(section, profile, plan)
    speed = _speed(rows.values(), device)
    return [_hours(_expected(search, recalls), speed) for search in plan]


def assign_devices(device: str, jobs: int | None, n_gpus: int, n_cores: int) -> list[str]:
    """Return the device of each of `jobs` processes, all GPUs in turn unless `device` names one.

    n_gpus: 0 if `device` is not a GPU. Without `jobs`, one process per GPU or core.
    """
    if not n_gpus:
        return [device] * (jobs or n_cores)
    if device in ("auto", "cuda"):
        return [f"cuda:{i % n_gpus}" for i in range(jobs or n_gpus)]
    return [device] * (jobs or 1)


def _finished(section: str, profile: str, plan: Sequence[Search]) -> tuple[dict[str, dict], dict[str, float]]:
    """Return by run id the rows that a profile has, and the recalls of those that a plan asks for."""
    rows = known_rows(section, profile, plan)
    planned = rows.keys() & {run_id for search in plan for run_id in search.run_ids}
    return rows, {run_id: float(rows[run_id]["recall"]) for run_id in planned}


def _pending(plan: Sequence[Search], recalls: dict[str, float]) -> list[RunConfig]:
    """Return the runs that can start now, each once, in the order of the plan."""
    return list({config.run_id: config for search in plan for config in search.pending(recalls)}.values())


def check_files(config: RunConfig) -> None:
    """Raise `InputError` if a run names people that cannot be read, or dialogs that are missing."""
    if config.facts.csv is not None:
        read_people_csv(config.facts.csv)
    if missing := [path for path in config.training.files if not os.path.isfile(path)]:
        raise InputError(f"cannot read the dialogs of {missing[0]}: there is no such file")


def _execute(
    plan: Sequence[Search],
    recalls: dict[str, float],
    report: Report,
    directory: Path,
    devices: list[str],
    seconds: float,
    in_process: bool,
) -> None:
    """Keep a run on each of `devices` until nothing can start any more, adding to `recalls` and `report.failed`."""
    idle, tries, deadline = devices[::-1], Counter(), time.monotonic() + seconds
    running: dict[Future, tuple[RunConfig, str]] = {}
    receiver, sender = os.pipe()  # the runs' standard input: when this process ends in any way, they stop

    def start(config: RunConfig, device: str) -> Future:
        arguments = config, directory / config.run_id, device
        if not in_process:
            return pool.submit(_in_a_process, *arguments, stdin)
        future = Future()
        future.set_result(attempt(*arguments, config.title))
        return future

    with (
        open(receiver, "rb") as stdin,
        ThreadPoolExecutor(len(devices)) as pool,
        progress(len(plan), f"{directory.parent.name} {directory.name}") as bar,
        open(sender, "wb"),  # closed before the pool waits, so that remaining runs save a checkpoint and stop
    ):
        while True:
            known = report.failed.keys() | {config.run_id for config, _ in running.values()}
            ready = [config for config in _pending(plan, recalls) if config.run_id not in known]
            while ready and idle and time.monotonic() < deadline:
                config, device = ready.pop(0), idle.pop()
                running[start(config, device)] = config, device
            if not running:
                return
            left = deadline - time.monotonic()
            finished = wait(running, min(LINE_INTERVAL, max(left, 0)), FIRST_COMPLETED).done
            if not finished:
                if left <= 0:
                    return
                going = [_how_far(config, directory / config.run_id) for config, _ in running.values()]
                bar.set_postfix_str("; ".join(going), refresh=False)
            for future in finished:
                config, device = running.pop(future)
                idle.append(device)
                run_id, title = config.run_id, config.title
                if error := future.result():
                    tries[run_id] += 1
                    if tries[run_id] == TRIES:
                        report.failed[run_id] = f"{title}: {error}"
                    continue
                recalls[run_id] = read_row(directory / run_id / ROW)["recall"]
                bar.set_postfix_str(f"{title}: recall {recalls[run_id]:.3f}", refresh=False)
            closed = sum(not search.pending(recalls) for search in plan)
            bar.update(closed - bar.n)


def _how_far(config: RunConfig, directory: Path) -> str:
    """Return a run's title and the steps that it has done, by its log."""
    steps = ["0"]
    with suppress(OSError):  # it has logged nothing yet
        steps += re.findall(r'"step": (\d+)', (directory / "metrics.jsonl").read_text("utf-8", "replace"))
    total = config.training.total_steps(config.facts.n_facts)
    return f"{config.title}: step {int(steps[-1]):,} of {total:,}"


def _in_a_process(config: RunConfig, directory: Path, device: str, stdin: IO[bytes]) -> str | None:
    """Do a run in a process of its own, whose death harms no other; return its error in one line, or None."""
    path = os.pathsep.join([str(paths.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    # PYTHONSAFEPATH: ignore a lib in the current folder. One thread: small models gain little from a second, and wait
    # for it where cores are busy.
    ours = {"PYTHONPATH": path, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1", "ITL_PROGRESS": "off"}
    command = [sys.executable, "-m", "lib.experiments.worker", config.canonical_json(), str(directory), device]
    with tempfile.TemporaryFile() as said:  # no pipe: child processes of a killed run would keep it open
        code = subprocess.run(
            command, stdin=stdin, stdout=subprocess.DEVNULL, stderr=said, env=os.environ | ours
        ).returncode
        said.seek(0)
        lines = [line.strip() for line in said.read().decode(errors="replace").split("\n") if line.strip()]
    if code == 1 and lines:
        return lines[-1]
    return f"its process died with exit code {code}" if code else None


def _expected(search: Search, recalls: dict[str, float]) -> list[RunConfig]:
    """Return about as many runs as a search still takes, each the same as its next one."""
    pending = search.pending(recalls)
    if search.threshold is None or not pending:
        return pending
    done = sum(run_id in recalls for run_id in search.run_ids)
    return pending * max(1, min(3, len(search.sizes)) - done)


def _hours(configs: Iterable[RunConfig], speed: float) -> float:
    """Return the hours that runs take one process at a `speed` in FLOP/s."""
    return sum(config.flops() for config in configs) / speed / 3600


def _speed(rows: Iterable[dict], device: str) -> float:
    """Return the FLOP/s of the rows that this kind of device made, or a guess."""
    kind, flops, seconds = "cuda" if device.startswith("cuda") else "cpu", 0.0, 0.0
    for row in rows:
        if row.get("device", "").startswith(kind):
            share = float(row["steps"]) / float(row["steps_budget"])
            flops += config_of(row).flops(int(row["n_facts"])) * share
            seconds += float(row["train_seconds"])
    return flops / seconds if seconds else SPEEDS[kind]
