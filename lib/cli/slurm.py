"""The commands of `itl` that use Slurm."""

from shlex import quote
from typing import Annotated

import typer

from lib.base import InputError
from lib.cli import options
from lib.cli.finetune import FINETUNE
from lib.cli.options import RESOURCES, Device, Out, ProfileOption, console, run_folder, takes
from lib.slurm import job, submissions, tasks

submit = typer.Typer(help="Train, sweep or run a notebook on Slurm.", no_args_is_help=True)
Script = Annotated[bool, typer.Option("--dry-run", help="only print the script that sbatch would get")]


@submit.command("train")
@takes(config=options.RUN, observers=options.OBSERVERS, how=options.HOW, resources=RESOURCES)
def submit_train(
    config, observers, how, resources, out: Out = None, device: Device = "auto", dry_run: Script = False
) -> None:
    """Train one model, with one process per GPU (without GPUs, one per node). It resumes after a time limit."""
    _submit(tasks.train(config, run_folder(config, out), observers, how | {"device": device}), resources, dry_run)


@submit.command("finetune")
@takes(config=FINETUNE, resources=RESOURCES)
def submit_finetune(config, resources, out: Out = None, device: Device = "auto", dry_run: Script = False) -> None:
    """Fine-tune one model, with one process per GPU (without GPUs, one per node). It resumes after a time limit."""
    _submit(tasks.finetune(config, run_folder(config, out, "finetune"), device), resources, dry_run)


@submit.command("sweep")
@takes(resources=RESOURCES)
def submit_sweep(
    source: options.Source,
    resources,
    profile: ProfileOption = "quick",
    jobs: Annotated[int, typer.Option(min=1, help="jobs at a time")] = 16,
    hours: Annotated[float, typer.Option(min=0, help="pack searches into jobs of up to this many hours")] = 1.0,
    device: Device = "auto",
    dry_run: Script = False,
) -> None:
    """Run all models of a section that are not finished yet, as a job array; those of Sections 6 and 7 as one job."""
    if resources.nodes > 1 or resources.gpus > 1:
        raise InputError("each job of a sweep takes one node and at most one GPU: --jobs says how many run at a time")
    device = "cuda" if device == "auto" and resources.gpus else device  # tells how long runs take
    work = tasks.sweep(source, profile, hours, device)
    if work.tasks:
        _submit(work, resources, dry_run, jobs)
    else:
        console.print("nothing is missing")


@submit.command("notebook")
@takes(resources=RESOURCES)
def submit_notebook(
    name: Annotated[str, typer.Argument(help="which, as 05_1")],
    resources,
    profile: ProfileOption = "quick",
    parameter: options.Parameters = None,
    dry_run: Script = False,
) -> None:
    """Run a notebook and render it to HTML."""
    if resources.nodes > 1:
        raise InputError("a notebook runs on one node: leave out --nodes")
    _submit(tasks.notebook(name, profile, parameter or []), resources, dry_run)


def _submit(work, resources, dry_run: bool, parallel: int = 1) -> None:
    submission = submissions.plan(work, resources, parallel)
    if dry_run:
        print(job.script(submission.executor(), len(work.tasks)))
        return
    submissions.submit(submission)
    name, jobs = submission.name, submission.jobs
    console.print(f"submitted {name}: {len(jobs)} jobs, first {jobs[0]}; itl status {quote(name)} shows its progress")


Submitted = Annotated[str, typer.Argument(help="name of a submission, as itl status lists it")]


def status(name: Annotated[str | None, typer.Argument(help="of a submission (default: all)")] = None) -> None:
    """Say which submitted tasks are queued, running, done, failed or missing, and why."""
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
                console.print(f"  {standing.job or '-'} {standing.state}{reason}: {standing.task.title}")
                if standing.last_line:
                    console.print(f"    {standing.last_line}")


def cancel(name: Submitted) -> None:
    """Cancel the jobs of a submission. Finished work stays, and itl retry resumes from there."""
    console.print(f"{submissions.cancel(submissions.find(name))} jobs cancelled")


def retry(name: Submitted) -> None:
    """Submit again what failed or is missing, with the code of the submission."""
    console.print(f"{submissions.retry(submissions.find(name))} tasks submitted again")
