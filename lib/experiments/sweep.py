"""Execute the searches of an experiment: in parallel processes here, resumable, each cell once."""

import json
import math
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import Pipe, current_process, get_context, parent_process
from multiprocessing.connection import Connection, wait
from pathlib import Path
from threading import RLock, Thread

import pandas as pd
import torch
from tqdm import tqdm

from lib.base import InputError, WorkError
from lib.config import RunConfig
from lib.experiments import tables
from lib.experiments.plan import searches
from lib.experiments.search import Search
from lib.facts.people import RELEASED
from lib.progress import progress
from lib.training.devices import resolve_device, usable_cores
from lib.training.distributed import Preempted
from lib.training.run import run_together, stacked_speedup
from lib.training.trainer import stack_key

#: How often a failing cell is tried before it counts as failed.
TRIES = 2
#: Floating-point operations a second of small models, about: of a core of a laptop, of an H200 with one to train.
SPEEDS = {"cpu": 1.5e10, "cuda": 5e11}
#: How many missing cells a report names.
LISTED = 5


@dataclass
class Report:
    """What a sweep did and what it left."""

    done_before: int = 0  # cells that had a row already
    done_now: int = 0
    failed: dict[str, str] = field(default_factory=dict)  # run id -> the error's last line
    missing: list[RunConfig] = field(default_factory=list)  # cells that could start now
    runs_ahead: int = 0  # about how many cells are left, those that depend on others included
    hours_ahead: float = 0.0  # about how many hours they take one process

    def check(self) -> None:
        """Raise `WorkError` if a run failed: a notebook must not go on as if it had its rows."""
        if self.failed:
            raise WorkError("; ".join(f"{run}: {reason}" for run, reason in self.failed.items()))

    def __str__(self) -> str:
        done = f"{self.done_now} runs done now, {self.done_before} before; "
        if not self.missing:
            return done + "nothing is missing"
        ahead = f"about {self.runs_ahead:,} runs and {self.hours_ahead:,.1f} hours of one process ahead, beginning with"
        lines = [done + ahead]
        lines += [f"  {_title(config)}" for config in self.missing[:LISTED]]
        lines += [f"  and {len(self.missing) - LISTED:,} more"] if len(self.missing) > LISTED else []
        return "\n".join(lines + [f"failed: {run_id}: {reason}" for run_id, reason in self.failed.items()])


def sweep(
    section: str,
    profile: str,
    *,
    jobs: int | None = None,
    dry_run: bool = False,
    max_hours: float = math.inf,
    device: str = "auto",
    stack: int = 8,
    plan: Sequence[Search] | None = None,
    in_process: bool = False,
) -> Report:
    """Run all that a section needs in a profile and that has no row yet, in `jobs` processes.

    By default that is one a core, or one a GPU: of several GPUs each process gets its own (see `assign_devices`). Up to
    `stack` models of one shape train as one if that turns out to be faster on this machine. A failing cell is tried
    once more, then reported; other searches go on. After `max_hours` no new cell starts. With `dry_run` nothing runs
    and the report says what is ahead. `plan`: searches of the section, in place of all. `in_process`: here, one cell or
    stack after the other, without processes; raises `Preempted`.
    """
    if jobs is not None and jobs < 1:
        raise InputError(f"jobs = {jobs}: a sweep takes at least one process")
    if stack < 1:
        raise InputError(f"stack = {stack}: give how many models may train as one, 1 for each alone")
    n_gpus = torch.cuda.device_count() if resolve_device(device).type == "cuda" else 0
    devices = [device] if in_process else assign_devices(device, jobs, n_gpus, usable_cores())
    plan = searches(section, profile) if plan is None else plan
    rows, recalls = _known(section, profile, plan)
    report = Report(done_before=len(recalls))
    if not dry_run and _pending(plan, recalls):
        directory = tables.sweep_dir(section, profile)
        deadline = time.monotonic() + 3600 * max_hours
        make = _Here if in_process else _Worker
        _execute(plan, recalls, report, directory, make, devices, stack, deadline)
    report.missing = _pending(plan, recalls)
    ahead = [config for search in plan for config in _expected(search, recalls)]
    report.runs_ahead, report.hours_ahead = len(ahead), _hours(ahead, _speed(rows, "cuda" if n_gpus else "cpu"))
    return report


def hours_ahead(section: str, profile: str, plan: Sequence[Search]) -> list[float]:
    """About how many hours each search of a plan still takes one core; 0 for one that is over."""
    rows, recalls = _known(section, profile, plan)
    speed = _speed(rows, "cpu")
    return [_hours(_expected(search, recalls), speed) for search in plan]


def assign_devices(device: str, jobs: int | None, n_gpus: int, n_cores: int) -> list[str]:
    """The device of each of `jobs` processes; of GPUs that nobody has chosen among, each in turn.

    n_gpus: 0 where `device` is none. Without `jobs`, one process a GPU or core.
    """
    if not n_gpus:
        return [device] * (jobs or n_cores)
    if device in ("auto", "cuda"):
        return [f"cuda:{i % n_gpus}" for i in range(jobs or n_gpus)]
    return [device] * (jobs or 1)


def _known(section: str, profile: str, plan: Sequence[Search]) -> tuple[pd.DataFrame, dict[str, float]]:
    """All rows, which tell the speed of devices, and by run id the recall of those that the plan asks for."""
    rows = tables.read_rows(section, profile, plan)
    done = rows[~rows.superseded]
    return rows, dict(zip(done.run_id, done.recall, strict=True)) if len(done) else {}


def _pending(plan: Sequence[Search], recalls: dict[str, float]) -> list[RunConfig]:
    """The cells that can start now, each once, in the order of the plan."""
    return list({config.run_id: config for search in plan for config in search.pending(recalls)}.values())


def _execute(
    plan: Sequence[Search],
    recalls: dict[str, float],
    report: Report,
    directory: Path,
    make: Callable[[str], "_Worker | _Here"],
    devices: list[str],
    stack: int,
    deadline: float,
) -> None:
    """Keep a worker on each of `devices` busy until nothing can start any more, adding to `recalls` and `report`."""
    idle: list[tuple[str, _Worker | _Here | None]] = [(device, None) for device in reversed(devices)]
    running: dict[Connection, tuple[str, _Worker | _Here, list[RunConfig]]] = {}
    tries: Counter[str] = Counter()
    faster_alone: set[tuple] = set()  # kinds of cells of which a stack was measured to be slower
    with progress(len(plan), directory.parent.name + " " + directory.name) as bar:
        try:
            while True:
                busy = {config.run_id for *_, configs in running.values() for config in configs}
                ready = [c for c in _pending(plan, recalls) if c.run_id not in busy | report.failed.keys()]
                while ready and idle and time.monotonic() < deadline:
                    alone = tries[ready[0].run_id] or _kind(ready[0]) in faster_alone
                    share = math.ceil(len(ready) / len(idle))  # a stack leaves cells for the other workers
                    configs = ready[:1] if alone else _alike(ready, tries)[: min(stack, share)]
                    ready = [config for config in ready if config not in configs]
                    device, worker = idle.pop()
                    worker = worker or make(device)
                    running[worker.pipe] = device, worker, configs
                    worker.submit(configs, [directory / config.run_id for config in configs])
                if not running:
                    return
                for pipe in wait(list(running)):
                    device, worker, configs = running.pop(pipe)
                    found, error = worker.result()
                    if error is None and found is None:
                        faster_alone.add(_kind(configs[0]))
                    elif error is None:
                        recalls |= found
                        report.done_now += len(configs)
                        text = f"{_title(configs[-1])}: recall {found[configs[-1].run_id]:.3f}"
                        bar.set_postfix_str(text, refresh=False)
                    for config in configs if error else ():
                        tries[config.run_id] += 1  # from now on alone: one failing cell fails no other
                        if tries[config.run_id] >= TRIES:
                            report.failed[config.run_id] = f"{_title(config)}: {error}"
                    idle.append((device, worker if worker.process.is_alive() else None))
                closed = sum(not search.pending(recalls) for search in plan)
                bar.update(closed - bar.n)
        finally:
            for _, worker, *_ in [*idle, *running.values()]:
                if worker:
                    worker.close()


def _alike(ready: list[RunConfig], tries: Counter[str]) -> list[RunConfig]:
    """The cells that could train as one stack with the first."""
    return [config for config in ready if _kind(config) == _kind(ready[0]) and not tries[config.run_id]]


def _kind(config: RunConfig) -> tuple:
    """What cells of a stack have in common; their mode too, for dialogs of like lengths."""
    return config.mode, stack_key(config)


class _Worker:
    """A process that runs cell after cell. Its death harms no other cell, and it does not outlive the sweep."""

    def __init__(self, device: str):
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, device), daemon=True)
        self.process.start()
        theirs.close()  # the process holds the only other end now, so its death ends the pipe

    def submit(self, configs: list[RunConfig], directories: list[Path]) -> None:
        with suppress(OSError):  # it has died, which `result` will say
            self.pipe.send(([config.model_dump() for config in configs], directories))

    def result(self) -> tuple[dict[str, float] | None, str | None]:
        """Recall of each cell by id, None if they are faster alone; or the error that ended them."""
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            return None, f"its process died with exit code {self.process.exitcode}"

    def close(self) -> None:
        self.process.terminate()


def _work(pipe: Connection, device: str) -> None:
    """The life of a worker: cells come in, recalls go out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the sweep, which ends its workers
    Thread(target=_end_with_parent, daemon=True).start()
    tqdm.set_lock(RLock())  # its default is a semaphore, which Python reports as leaked when a worker is ended
    torch.set_num_threads(1)  # small models gain little from a second thread, and wait for it where cores are busy
    with suppress(EOFError, Preempted):
        while True:
            pipe.send(_answer(*pipe.recv(), device))


def _answer(configs: list[dict], directories: list[Path], device: str) -> tuple[dict[str, float] | None, str | None]:
    """What a worker says about cells; see `_Worker.result`."""
    try:
        configs = [RunConfig.parse(config) for config in configs]
        if len(configs) > 1 and stacked_speedup(configs[:2], device) < 1:  # if two gain nothing, nor do more
            return None, None
        rows = run_together(configs, directories, device=device)
        return {row["run_id"]: row["recall"] for row in rows}, None
    except Preempted:
        raise
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"[:2000]  # a pipe holds so much before anybody reads it


class _Here:
    """Takes the place of a worker process: runs the cells in this one, while they are handed over."""

    def __init__(self, device: str):
        self.device, self.process = device, current_process()
        self.pipe, self.theirs = Pipe()

    def submit(self, configs: list[RunConfig], directories: list[Path]) -> None:
        self.theirs.send(_answer([config.model_dump() for config in configs], directories, self.device))

    def result(self) -> tuple[dict[str, float] | None, str | None]:
        return self.pipe.recv()

    def close(self) -> None:
        self.pipe.close()
        self.theirs.close()


def _end_with_parent() -> None:
    parent_process().join()
    os._exit(1)


def _title(config: RunConfig) -> str:
    correlation = f", alpha {config.facts.alpha:g}" if config.facts.alpha else ""
    law = ", released law" if config.facts.law == RELEASED else ""
    facts = f"{4 * config.facts.n_people} facts{correlation}{law}"
    return f"{config.mode}, {facts}, d = {config.model.d_model}, seed {config.seed}"


def _expected(search: Search, recalls: dict[str, float]) -> list[RunConfig]:
    """The runs that a search still takes, as many and as large as it is likely to turn out."""
    pending = search.pending(recalls)
    if search.threshold is None or not pending:
        return pending
    done = sum(search.config(size).run_id in recalls for size in search.sizes)
    return pending * max(1, search.expected_runs() - done)


def _hours(configs: list[RunConfig], speed: float) -> float:
    """Hours that runs take one process of so many floating-point operations a second."""
    return sum(config.flops() for config in configs) / speed / 3600


def _speed(rows: pd.DataFrame, device: str) -> float:
    """Floating-point operations a second of the rows that such a device (cpu, cuda) made, or a guess."""
    rows = rows[rows.device.str.startswith(device)] if len(rows) else rows
    if not len(rows):
        return SPEEDS[device]
    done = [RunConfig.parse(json.loads(row.config)).flops() * row.steps / row.steps_budget for row in rows.itertuples()]
    return sum(done) / rows.train_seconds.sum()
