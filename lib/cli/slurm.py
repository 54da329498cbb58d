"""The commands of `itl` that speak with Slurm."""

from pathlib import Path
from typing import Annotated

import typer

from lib.base import InputError
from lib.cli.finetune import finetune_folder, finetuning
from lib.cli.options import (
    Device,
    Out,
    Parameters,
    Profile,
    ProfileOption,
    Section,
    Sharded,
    Tensor,
    cell,
    console,
    observers,
    run_folder,
    with_options,
)

submit = typer.Typer(help="Train, sweep or run a notebook on Slurm.", no_args_is_help=True)


def _resources(
    partition: Annotated[str | None, typer.Option(help="[default: the cluster's]")] = None,
    time: Annotated[
        str | None, typer.Option(help="minutes, or D-HH:MM:SS [default: the partition's, up to 1-0]")
    ] = None,
    nodes: Annotated[int, typer.Option(help="of a training")] = 1,
    gpus: Annotated[int, typer.Option(help="of each node")] = 0,
    cpus: Annotated[int | None, typer.Option(help="of each process [default: 1, or those of its GPU]")] = None,
    mem: Annotated[str | None, typer.Option(help="of each node, as 16G [default: a share of it]")] = None,
    account: str | None = None,
    qos: str | None = None,
    constraint: Annotated[str | None, typer.Option(help="features of the nodes")] = None,
):
    """What a job gets."""
    options = dict(locals())
    from lib.slurm.job import Resources

    return Resources(**options)


Script = Annotated[bool, typer.Option("--dry-run", help="only print the script that sbatch would get")]


@submit.command("train")
@with_options(cell=cell, observers=observers, resources=_resources)
def submit_train(
    cell,
    observers,
    resources,
    out: Out = None,
    device: Device = "auto",
    sharded: Sharded = False,
    tensor: Tensor = 1,
    dry_run: Script = False,
) -> None:
    """Train one model, with one process a GPU (without GPUs, one a node). It goes on after a time limit."""
    from lib.slurm import submissions

    watching = observers.model_dump(exclude_defaults=True)
    options = {"device": device, "observers": watching, "sharded": sharded, "tensor": tensor}
    task = submissions.train_task(cell, run_folder(cell, out), **options)
    _submit(f"train-{cell.run_id}", [task], resources.model_copy(update={"tasks": max(1, resources.gpus)}), dry_run)


@submit.command("finetune")
@with_options(config=finetuning, resources=_resources)
def submit_finetune(config, resources, out: Out = None, device: Device = "auto", dry_run: Script = False) -> None:
    """Fine-tune one model, with one process a GPU (without GPUs, one a node). It goes on after a time limit."""
    from lib.slurm import submissions

    values = config.model_dump(mode="json", exclude_defaults=True)
    folder = str(finetune_folder(config, out).resolve())
    if config.task == "trivia":
        from lib.finetune.triviaqa import load_questions

        if config.source != "hub":  # a file, which may be missing
            load_questions(config.source)
    task = submissions.Finetune(config=values, directory=folder, device=device, current=str(Path.cwd()))
    tasks = max(1, resources.gpus)
    _submit(f"finetune-{config.run_id}", [task], resources.model_copy(update={"tasks": tasks}), dry_run)


@submit.command("sweep")
@with_options(resources=_resources)
def submit_sweep(
    section: Section,
    resources,
    profile: ProfileOption = Profile.quick,
    jobs: Annotated[int, typer.Option(help="jobs at a time")] = 16,
    hours: Annotated[float, typer.Option(min=0, help="pack searches into one job up to so many hours")] = 1.0,
    device: Device = "auto",
    dry_run: Script = False,
) -> None:
    """Run all models of a section that are not finished yet, as a job array."""
    from lib.slurm import submissions

    if resources.nodes > 1 or resources.gpus > 1:
        raise InputError("each job of a sweep takes one node and at most one GPU: --jobs says how many run at a time")
    tasks = submissions.sweep_tasks(section, profile.value, hours, device)
    if tasks:
        _submit(f"sweep-{section}-{profile.value}", tasks, resources, dry_run, jobs)
    else:
        console.print("nothing is missing")


@submit.command("notebook")
@with_options(resources=_resources)
def submit_notebook(
    name: Annotated[str, typer.Argument(help="which, as 05_1")],
    resources,
    profile: ProfileOption = Profile.quick,
    parameter: Parameters = [],  # noqa: B006
    dry_run: Script = False,
) -> None:
    """Run a notebook and render it to HTML."""
    from lib.slurm import submissions

    if resources.nodes > 1:
        raise InputError("a notebook runs on one node: leave out --nodes")
    task = submissions.notebook_task(name, profile.value, parameter)
    _submit(f"notebook-{Path(task.name).stem}", [task], resources, dry_run)


def _submit(name: str, tasks, resources, dry_run: bool, parallel: int = 1) -> None:
    from lib.slurm import job, submissions

    planned = submissions.plan(name, tasks, resources, parallel)
    if dry_run:
        print(job.script(planned.executor(), len(tasks)))
        return
    done = submissions.submit(planned)
    jobs = f"job {done.jobs[0]}" if len(tasks) == 1 else f"jobs {done.jobs[0]} to {done.jobs[-1]}, {parallel} at a time"
    console.print(f"submitted {done.name}: {jobs}; itl status {done.name} says how it stands")


Submitted = Annotated[str, typer.Argument(help="name of a submission, as itl status lists them")]


def status(name: Annotated[str | None, typer.Argument(help="of a submission [default: all]")] = None) -> None:
    """Say what of the submissions to Slurm is queued, running, done, failed or missing, and why."""
    from lib.slurm import job, submissions

    queue = job.queue()
    chosen = [submissions.find(name)] if name else submissions.everything()
    if not chosen:
        console.print("nothing was submitted")
    for submission in chosen:
        standings = submissions.status(submission, queue)
        console.print(f"{submission.name}: {submissions.summary(standings)}")
        for standing in standings:
            if name or standing.state in ("running", "failed", "missing"):
                reason = f" ({standing.reason})" if standing.reason else ""
                console.print(f"  {standing.job or '-'} {standing.state}{reason}: {standing.task}")
                if standing.last_line:
                    console.print(f"    {standing.last_line}")


def cancel(name: Submitted) -> None:
    """End the jobs of a submission. What they finished stays, and itl retry goes on from there."""
    from lib.slurm import submissions

    console.print(f"{submissions.cancel(submissions.find(name))} jobs cancelled")


def retry(name: Submitted) -> None:
    """Submit again what failed or is missing, with the code of the submission."""
    from lib.slurm import submissions

    console.print(f"{submissions.retry(submissions.find(name))} tasks submitted again")
