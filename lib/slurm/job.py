"""Slurm, through submitit: what a job gets, how it is handed over, how it comes back, and what became of it.

A job that reaches its time limit gets SIGUSR2 some time before. submitit's handler of that signal, or `Job` after a
run has written its checkpoint, requeues the job, which goes on where it was. After a preemption Slurm itself does that.
"""

import io
import math
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, suppress
from pathlib import Path
from typing import Any, NamedTuple

import submitit
from pydantic import Field
from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.helpers import DelayedSubmission, TorchDistributedEnvironment

from lib.base import Config, InputError
from lib.training.distributed import Preempted

NO_SLURM = (
    "Slurm is not installed here (there is no sbatch): leave out the word submit, then itl train, itl sweep --jobs N "
    "and itl notebooks do the same on this machine"
)
#: Asked for where nothing is said and the partition allows it: what takes longer comes back.
LONGEST_MINUTES = 24 * 60
#: Memory that any job gets: PyTorch with CUDA takes most of it.
LEAST_MEGABYTES = 4000
#: How often a job comes back after its time limit.
MAX_TIMEOUTS = 100


class Resources(Config):
    """What one job gets, in Slurm's terms; None: see `fill`."""

    partition: str | None = None
    time: str | None = None  # minutes, hours:minutes:seconds or days-hours
    nodes: int = Field(1, ge=1)
    gpus: int = Field(0, ge=0)  # of a node
    tasks: int = Field(1, ge=1)  # on a node
    cpus: int | None = Field(None, ge=1)  # of a task
    mem: str | None = Field(None, pattern=r"^\d+[KMGT]?$")  # of a node; megabytes without a unit
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None


class NodeKind(NamedTuple):
    """Nodes of a partition that are alike."""

    partition: str
    is_default: bool
    minutes: int | None  # the partition's time limit, None if it has none
    cpus: int
    megabytes: int
    gpus: int


def minutes(text: str) -> int | None:
    """A time as Slurm writes it, `90`, `30:00`, `1:30:00`, `1-12`, `1-12:30` or `1-12:30:00`, rounded up to minutes.

    None for a limit that is none. Raises `InputError`.
    """
    if text in ("infinite", "UNLIMITED"):
        return None
    if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", text):
        raise InputError(f"--time takes minutes, hours:minutes:seconds or days-hours:minutes:seconds, got {text!r}")
    days, dash, clock = text.rpartition("-")
    numbers = [int(number) for number in clock.split(":")]
    units = (3600, 60, 1) if dash or len(numbers) == 3 else (60, 1)
    seconds = 86_400 * int(days or 0) + sum(n * unit for n, unit in zip(numbers, units, strict=False))
    return math.ceil(seconds / 60)


def parse_sinfo(text: str) -> list[NodeKind]:
    """The lines of `sinfo --exact --format SINFO`, those of partitions that take jobs."""
    kinds = []
    for line in text.splitlines():
        partition, available, limit, cpus, megabytes, gres = line.split("|")
        gpus = sum(map(int, re.findall(r"\bgpu(?::[^:,()]+)?:(\d+)", gres)))
        if available == "up":
            name = partition.removesuffix("*")
            kinds.append(NodeKind(name, name != partition, minutes(limit), int(cpus), int(megabytes), gpus))
    return kinds


_SINFO = "%P|%a|%l|%c|%m|%G"


def fill(resources: Resources, kinds: Sequence[NodeKind]) -> Resources:
    """`resources` with what was left open chosen from the nodes there are; `InputError` if they cannot do it.

    The default partition, or the first one with enough GPUs; a day, or the partition's limit if that is shorter; for a
    task one CPU or the node's CPUs of its GPUs; of the memory the same share, but not less than 4 GB.
    """
    known = dict.fromkeys(kind.partition for kind in kinds)
    wanted = resources.partition.split(",") if resources.partition else list(known)
    if unknown := [name for name in wanted if name not in known]:
        raise InputError(f"no partition {unknown[0]!r} takes jobs here: there are {', '.join(known) or 'none'}")
    kinds = [kind for kind in kinds if kind.partition in wanted]
    fitting = [kind for kind in kinds if kind.gpus >= resources.gpus]
    if not fitting:
        most = max((kind.gpus for kind in kinds), default=0)
        raise InputError(f"no node has {resources.gpus} GPUs: the most in {', '.join(wanted)} is {most}")
    partition = resources.partition or next((k for k in fitting if k.is_default), fitting[0]).partition
    fitting = [kind for kind in fitting if kind.partition in partition.split(",")]
    kind = min(fitting, key=lambda kind: kind.megabytes)  # what fits there fits on any of them
    time = str(min(LONGEST_MINUTES, *(kind.minutes or LONGEST_MINUTES for kind in fitting)))
    gpu_share = resources.gpus / kind.gpus if resources.gpus else 0
    cpus = resources.cpus or max(1, int(kind.cpus * gpu_share / resources.tasks))
    share = max(gpu_share, cpus * resources.tasks / kind.cpus)
    # A node of 1 MB is one whose memory Slurm was not told.
    mem = f"{min(kind.megabytes, max(LEAST_MEGABYTES, int(kind.megabytes * share)))}M" if kind.megabytes > 1 else None
    chosen = {"partition": partition, "time": resources.time or time, "cpus": cpus, "mem": resources.mem or mem}
    if not minutes(chosen["time"]):
        raise InputError(f"--time takes at least a minute and no more than the partition has, got {chosen['time']!r}")
    return resources.model_copy(update=chosen)


def fill_here(resources: Resources) -> Resources:
    """`fill` from this cluster's nodes."""
    return fill(resources, parse_sinfo(_slurm("sinfo", "--noheader", "--exact", f"--format={_SINFO}")))


def _slurm(*command: str) -> str:
    """What a command of Slurm prints, or an `InputError` that says why it does not."""
    if shutil.which("sbatch") is None:
        raise InputError(NO_SLURM)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise InputError(f"Slurm's {command[0]} failed: {said[-1]}")
    return done.stdout


# Handing over ---------------------------------------------------------------------------------------------------------


class Job:
    """Calls a function in every task of a job, and has the job come back if it is preempted.

    With several tasks the environment first tells each its rank, as torchrun does.
    """

    def __init__(self, function: Callable, *arguments: Any):
        """A function that can be imported, and arguments that any version of the code can read."""
        self.function, self.arguments = function, arguments

    def __call__(self) -> Any:
        requeue = signal.getsignal(signal.SIGUSR2)  # submitit's; a run that trains has one of its own in its place
        environment = submitit.JobEnvironment()
        if environment.num_tasks > 1:
            # Each process sees all devices of its node, as under torchrun: LOCAL_RANK says which is its own.
            ranks = TorchDistributedEnvironment().export(overwrite=True, set_cuda_visible_devices=False)
            # Slurm may call a node by a name that the network does not know.
            node = _slurm("scontrol", "--oneliner", "show", "node", ranks.master_addr)
            os.environ["MASTER_ADDR"] = re.search(r"NodeAddr=(\S+)", node)[1]
        try:
            return self.function(*self.arguments)
        except Preempted:
            state = "RUNNING"  # where Slurm is too busy to say
            with suppress(InputError):
                state = _slurm("squeue", "--noheader", "--format=%T", f"--jobs={environment.raw_job_id}").strip()
            if state != "RUNNING":  # Slurm is ending it: a cancelled job stays so, a preempted one is requeued already
                raise SystemExit(Preempted.exit_code) from None
            return requeue(signal.SIGUSR2, None)

    def checkpoint(self) -> DelayedSubmission:
        """What a requeued job calls: the same again."""
        return DelayedSubmission(self)


def executor(
    folder: Path, name: str, resources: Resources, environment: dict[str, str], parallel: int
) -> submitit.SlurmExecutor:
    """What submits jobs that log into `folder`; of an array at most `parallel` run at a time. Resources are filled."""
    if shutil.which("sbatch") is None:
        raise InputError(NO_SLURM)
    limit = minutes(resources.time)
    optional = ("partition", "account", "qos", "constraint", "mem")
    made = submitit.SlurmExecutor(folder, max_num_timeout=MAX_TIMEOUTS)
    made.update_parameters(
        job_name=name,
        time=limit,
        nodes=resources.nodes,
        ntasks_per_node=resources.tasks,
        cpus_per_task=resources.cpus,
        **({"gpus_per_node": resources.gpus} if resources.gpus else {}),
        **{field: value for field in optional if (value := getattr(resources, field))},
        array_parallelism=parallel,
        # Slurm may send the signal half a minute early, and a job takes seconds until it can be signalled.
        signal_delay_s=min(90, 15 * limit),
        stderr_to_stdout=True,
        additional_parameters={"requeue": True},
        setup=[f"export {key}={shlex.quote(value)}" for key, value in environment.items()],
        srun_args=[f"--cpus-per-task={resources.cpus}", "--kill-on-bad-exit=1"],  # srun does not take sbatch's
    )
    return made


def script(executor: submitit.SlurmExecutor, n_jobs: int) -> str:
    """What sbatch would be given for so many jobs."""
    if n_jobs > 1:
        executor.parameters["map_count"] = n_jobs  # as submitit does for an array
    return executor._make_submission_file_text(executor._submitit_command_str, "")


def submit(executor: submitit.SlurmExecutor, jobs: Sequence[Job]) -> list[str]:
    """Hand over the jobs, as one array if they are several; their ids. `InputError` if Slurm refuses."""
    try:
        with redirect_stderr(io.StringIO()):  # submitit prints what it also raises
            return [job.job_id for job in executor.submit_array(jobs)]
    except (FailedJobError, FailedSubmissionError) as error:
        raise InputError(f"Slurm refused the job: {str(error).strip().splitlines()[-1]}") from None


# What became of jobs --------------------------------------------------------------------------------------------------


def queue() -> dict[str, tuple[str, str]]:
    """State and reason, in Slurm's words, of this user's jobs that it still knows; with accounting, of older ones."""
    lines = _slurm("squeue", "--me", "--array", "--states=all", "--noheader", "--format=%i|%T|%r").splitlines()
    with suppress(InputError):  # a cluster without accounting
        old = ["sacct", "--allocations", "--array", "--noheader", "--parsable2", "--starttime=now-30days"]
        lines = _slurm(*old, "--format=JobID,State,Reason").splitlines() + lines
    return {job: (state.split()[0], reason) for job, state, reason in (line.split("|") for line in lines)}


def cancel(jobs: Sequence[str]) -> None:
    """End jobs, and have them not come back."""
    _slurm("scancel", *jobs)


def error(folder: Path, job: str) -> str | None:
    """The last line of the error that ended a job, None if none did."""
    for path in sorted(folder.glob(f"{job}_*_result.pkl")):
        outcome, value = pickle.loads(path.read_bytes())
        if outcome == "error":
            return value.strip().splitlines()[-1]
    return None


def last_line(folder: Path, job: str) -> str:
    """The last line that the first task of a job logged."""
    try:
        with (folder / f"{job}_0_log.out").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 10_000))
            lines = file.read().decode(errors="replace").replace("\r", "\n").split("\n")
    except FileNotFoundError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
