"""Jobs on Slurm, through submitit: how they are handed over, how they come back, and what Slurm knows about them.

Slurm signals a job with SIGUSR2 before its time limit. A run then writes its checkpoint and raises `Preempted`, and
everything else is interrupted by submitit's handler of that signal. Either way submitit requeues the job, which calls
the same function again. After a preemption Slurm requeues it on its own.
"""

import io
import os
import re
import shlex
import signal
import subprocess
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, suppress
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.helpers import Checkpointable, TorchDistributedEnvironment

from lib.base import InputError
from lib.slurm.tasks import Resources

NO_SLURM = (
    "Slurm is not installed here (there is no sbatch): leave out the word submit, then itl train, itl sweep --jobs N "
    "and itl notebooks do the same on this machine"
)


class Job(Checkpointable):
    """Calls a function in every process of a job, and again when the job comes back."""

    def __call__(self, function: Callable, *arguments: Any) -> None:
        """Call `function(*arguments)`: it must be importable, as the job may run another version of the code.

        With several processes the environment first tells each its rank, as torchrun does.
        """
        from lib.training.distributed import Preempted

        requeue = signal.getsignal(signal.SIGUSR2)  # submitit's handler; a run replaces it by its own
        environment = submitit.JobEnvironment()
        if environment.num_tasks > 1:
            # Each process sees all devices of its node, as under torchrun; LOCAL_RANK says which one is its own.
            ranks = TorchDistributedEnvironment().export(overwrite=True, set_cuda_visible_devices=False)
            # Slurm may call a node by a name that the network does not know.
            node = slurm("scontrol", "--oneliner", "show", "node", ranks.master_addr)
            os.environ["MASTER_ADDR"] = re.search(r"NodeAddr=(\S+)", node)[1]
        try:
            function(*arguments)
        except Preempted:
            state = "RUNNING"  # if Slurm is too busy to answer
            with suppress(InputError):
                state = slurm("squeue", "--noheader", "--format=%T", f"--jobs={environment.raw_job_id}").strip()
            if state not in ("RUNNING", "SIGNALING"):  # it was cancelled, or preempted and requeued already
                raise SystemExit(Preempted.exit_code) from None
            requeue(signal.SIGUSR2, None)


def executor(
    folder: Path, name: str, resources: Resources, environment: dict[str, str], processes: int = 1, parallel: int = 1
) -> submitit.SlurmExecutor:
    """Return an executor whose jobs log into `folder`: `processes` on each node, `parallel` jobs at a time."""
    cpus = "${SLURM_CPUS_PER_TASK:-1}"  # srun does not take it from sbatch
    variables = [f"export {key}={shlex.quote(value)}" for key, value in environment.items()]
    if any("\n" in str(text) for text in (folder, Path.cwd(), name, *resources.model_dump().values())):
        raise InputError("a line break in a name or an option would end a line of the job's script: leave it out")
    made = submitit.SlurmExecutor(folder, max_num_timeout=1_000)  # how often it may come back
    made.update_parameters(
        **resources.model_dump(exclude={"time", "cpus", "gpus"}),
        job_name=name,
        ntasks_per_node=processes,
        cpus_per_task=resources.cpus,
        gpus_per_node=resources.gpus or None,
        array_parallelism=parallel,
        stderr_to_stdout=True,
        # Only sbatch gets the time limit. submitit, which does not know it, requeues after any signal.
        additional_parameters={"time": resources.time, "requeue": True, "chdir": Path.cwd()},
        setup=[*variables, f"export OMP_NUM_THREADS={cpus} SRUN_CPUS_PER_TASK={cpus}"],
        srun_args=["--kill-on-bad-exit=1"],
    )
    return made


def script(executor: submitit.SlurmExecutor, n_jobs: int) -> str:
    """Return what sbatch would be given for `n_jobs` jobs."""
    if n_jobs > 1:
        executor.parameters["map_count"] = n_jobs  # as submitit does for an array
    return executor._make_submission_file_text(executor._submitit_command_str, "")


def submit(executor: submitit.SlurmExecutor, function: Callable, *arguments: Sequence) -> list[str]:
    """Submit a call of `function` for each of the zipped `arguments`, several as one array; returns their job ids.

    Raises `InputError` if Slurm refuses.
    """
    try:
        with redirect_stderr(io.StringIO()):  # submitit prints what it also raises
            jobs = executor.map_array(Job(), [function] * len(arguments[0]), *arguments)
        return [job.job_id for job in jobs]
    except (FailedJobError, FailedSubmissionError) as error:
        raise InputError(f"Slurm refused the job: {str(error).strip().splitlines()[-1]}") from None


def slurm(*command: str) -> str:
    """Return what a command of Slurm prints. Raises `InputError` if it fails or there is no Slurm."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        raise InputError(NO_SLURM) from None
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise InputError(f"Slurm's {command[0]} failed: {said[-1]}")  # a banner may come first
    return done.stdout


def queue() -> dict[str, tuple[str, str]]:
    """Return state and reason, in Slurm's words, of this user's jobs: those it still knows and, with accounting, older
    ones."""
    told = ""
    with suppress(InputError):  # a cluster without accounting
        old = ["sacct", "--allocations", "--array", "--noheader", "--parsable2", "--starttime=now-30days"]
        told = slurm(*old, "--format=JobID,State,Reason")
    told += slurm("squeue", "--me", "--array", "--states=all", "--noheader", "--format=%i|%T|%r")
    # A job, its state in capitals (CANCELLED by 0), and the reason; other lines are notes of the cluster.
    return {job: (state, reason) for job, state, reason in re.findall(r"(?m)^(\w+)\|([A-Z_]+)[^|\n]*\|(.*)$", told)}


def last_line(log: Path) -> str:
    """Return the last line of a log; empty if there is none."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.exists() else []
    return lines[-1] if lines else ""
