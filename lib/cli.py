"""`itl`: a thin door to the library. Bad input ends in one sentence and exit code 2, failed work in exit code 1."""

import functools
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lib import paths
from lib.base import InputError, WorkError

app = typer.Typer(
    help="In-tool and in-weight learning: train, ask, sweep, draw.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
Profile = StrEnum("Profile", {name: name for name in paths.PROFILES})
Mode = StrEnum("Mode", {"in_weight": "in-weight", "in_tool": "in-tool"})
console = Console(highlight=False, soft_wrap=True, markup=False)


def main() -> None:
    """Entry point of `itl` and of `python -m lib`."""
    try:
        code = app(standalone_mode=False)
    except InputError as error:  # which each of several processes finds for itself
        sys.exit(_complain(str(error), 2) if os.environ.get("RANK", "0") == "0" else 2)
    except WorkError as error:
        sys.exit(_complain(str(error), error.exit_code))
    except typer.TyperException as error:  # an unknown option, a value of the wrong type; no words after the bare help
        sys.exit(_complain(error.format_message(), 2) if error.format_message() else 2)
    if code == 130:  # what typer makes of Ctrl-C
        _complain("interrupted: the same command goes on from here", code)
    sys.exit(code if isinstance(code, int) else 0)


def _complain(sentence: str, code: int) -> int:
    print(f"itl: {' '.join(sentence.split())}", file=sys.stderr)
    return code


@app.command()
def data(
    out: Annotated[Path, typer.Option(help="SQLite file to write")],
    people: Annotated[int, typer.Option(help="how many people to sample")] = 64,
    seed: int = 0,
    alpha: Annotated[float, typer.Option(help="correlation within families, 0 to 1")] = 0.0,
    csv: Annotated[str | None, typer.Option(help="take the people of this CSV file instead")] = None,
    dialogs: Annotated[Path | None, typer.Option(help="also write the dialogs, as JSON lines")] = None,
    mode: Mode = Mode.in_weight,
) -> None:
    """Make people and their database."""
    from lib import dialogs as dialog_module
    from lib.facts import FactsConfig, load_people, write_database

    crowd = load_people(FactsConfig(n_people=people, seed=seed, alpha=alpha, csv=csv))
    if dialogs and (dialogs.is_dir() or not dialogs.parent.is_dir()):
        raise InputError(f"cannot write {dialogs}: a file name in an existing folder is expected")
    write_database(crowd, out)
    console.print(f"{len(crowd):,} people with {crowd.n_facts:,} facts ({', '.join(crowd.attributes)}) in {out}")
    if dialogs:
        _write_lines(dialogs, (json.dumps(dialog) for dialog in dialog_module.dialogs(crowd, mode.value)))
        console.print(f"their {mode.value} dialogs, as JSON lines, in {dialogs}")


def _write_lines(path: Path, lines) -> None:
    try:
        with paths.replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from None


def _with(**groups: Callable) -> Callable[[Callable], Callable]:
    """Gives a command options that it shares with others.

    `_with(cell=_cell)`: the options of the function `_cell`, and what it makes of them as the argument `cell`.
    """
    options = {name: inspect.signature(make).parameters for name, make in groups.items()}

    def decorate(command: Callable) -> Callable:
        @functools.wraps(command)
        def wrapper(**given):
            made = {name: make(**{key: given.pop(key) for key in options[name]}) for name, make in groups.items()}
            return command(**given, **made)

        own = [p for p in inspect.signature(command).parameters.values() if p.name not in groups]
        shared = [parameter for group in options.values() for parameter in group.values()]
        parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in (*own, *shared)]
        wrapper.__signature__ = inspect.Signature(parameters)
        wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return wrapper

    return decorate


def _cell(
    mode: Annotated[Mode | None, typer.Option(help="where the facts are to be")] = None,
    people: Annotated[int | None, typer.Option(help="how many people to learn")] = None,
    d_model: Annotated[int | None, typer.Option(help="width of the model")] = None,
    seed: Annotated[int | None, typer.Option(help="of the people, the initialization and the data order")] = None,
    csv: Annotated[str | None, typer.Option(help="learn the people of this CSV file instead")] = None,
    config: Annotated[Path | None, typer.Option(help="JSON file to start from")] = None,
    set_: Annotated[list[str], typer.Option("--set", help="any other field, as training.steps=500")] = [],  # noqa: B006
):
    """The configuration of one run."""
    from lib.config import RunConfig, override, read_config

    if people is not None and csv is not None:
        raise InputError("--people and --csv exclude each other: the file says how many there are")
    fields = {
        "mode": mode and mode.value,
        "facts.n_people": people,
        "model.d_model": d_model,
        "facts.csv": csv,
        "seed": seed,
        "facts.seed": seed,
    }
    given = {name: value for name, value in fields.items() if value is not None} | dict(map(_assignment, set_))
    return override(read_config(config) if config else RunConfig(), given)


Out = Annotated[Path | None, typer.Option(help="folder of the run [default: runs/train/<run id>]")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, ...")]
Sharded = Annotated[bool, typer.Option(help="several processes share the weights out (FSDP)")]
Tensor = Annotated[int, typer.Option(help="so many of several processes split each matrix")]


def _observers(
    tensorboard: Annotated[bool, typer.Option(help="also log for TensorBoard")] = False,
    wandb: Annotated[str | None, typer.Option(help="also log to this project of Weights & Biases")] = None,
    profile_steps: Annotated[int, typer.Option(help="profile so many steps, into profile/")] = 0,
    probe_every: Annotated[
        int | None,
        typer.Option(
            help="moments of activations and gradients every so many steps, into probes.jsonl; without torch.compile"
        ),
    ] = None,
):
    """What else watches a run."""
    from lib.monitor import Observers

    return Observers(tensorboard=tensorboard, wandb=wandb, profile_steps=profile_steps, probe_every=probe_every)


@app.command()
@_with(cell=_cell, observers=_observers)
def train(
    cell,
    observers,
    out: Out = None,
    device: Device = "auto",
    sharded: Sharded = False,
    tensor: Tensor = 1,
) -> None:
    """Train one model and measure its recall. The same command goes on where it was interrupted.

    Started by torchrun, several processes train it together, each on its part of every batch.
    """
    from lib.distributed import is_first
    from lib.run import run

    console.quiet = not is_first()
    directory = _run_folder(cell, out)
    console.print(f"run {cell.run_id}: {cell.mode}, d_model {cell.model.d_model}, {cell.model.n_params:,} parameters")
    row = run(
        cell,
        directory,
        device=device,
        description="training" if is_first() else None,
        observers=observers,
        sharded=sharded,
        tensor=tensor,
    )
    console.print(
        f"recall {row['recall']:.4f} on {row['n_questions']:,} questions after {row['steps']:,} steps "
        f"and {row['train_seconds']:.0f} s (stopped by {row['stopped']})"
    )
    console.print(f"all of it is in {directory}; talk to the model: itl chat {directory}")


def _run_folder(cell, out: Path | None) -> Path:
    return out or paths.runs() / "train" / cell.run_id


def _assignment(text: str) -> tuple[str, object]:
    """`training.steps=500` as a pair; the value is JSON, or else a string."""
    name, equals, value = text.partition("=")
    if not equals:
        raise InputError(f"--set takes field=value, got {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


RunFolder = Annotated[Path, typer.Argument(help="folder of a run, or of a committed checkpoint")]
Database = Annotated[Path | None, typer.Option(help="database to ask [default: the run's own]")]


@app.command()
def recall(folder: RunFolder, database: Database = None, device: str = "auto") -> None:
    """Ask a trained model about all the people that it was trained on."""
    from lib.conversation import open_conversation
    from lib.facts import load_people
    from lib.recall import measure_recall
    from lib.tools import SqlTool

    with open_conversation(folder, database, device) as talk:
        people = load_people(talk.config.facts)
        if talk.tool is not None:
            SqlTool(talk.database, people.attributes).close()  # `InputError` if it lacks one
        facts = list(people.facts())
        measured = measure_recall(talk.model, facts, talk.tokenizer, talk.tool, description="asking")
        queries = "" if talk.tool is None else f", {talk.tool.n_queries:,} queries to {talk.database}"
    console.print(f"recall {measured.overall:.4f} on {len(facts):,} questions{queries}")
    for attribute, share in measured.by_attribute().items():
        console.print(f"  {attribute:<16} {share:.4f}")


@app.command()
def evaluate(
    folder: Annotated[Path, typer.Argument(help="folder of a run that is training, or has been")],
    watch: Annotated[bool, typer.Option(help="go on with what comes until the run is finished")] = False,
    device: str = "auto",
) -> None:
    """Measure the recall of every checkpoint of a run, beside the process that trains it; none of them twice."""
    from lib.evaluation import evaluate_checkpoints

    for line in evaluate_checkpoints(folder, device, watch):
        console.print(f"step {line['step']:,}: recall {line['recall']:.4f}, {line['nll_bits']:.2f} bits a question")
    console.print(f"all that was measured is in {folder / 'evaluations.jsonl'}")


@app.command()
def chat(
    folder: RunFolder,
    question: Annotated[str | None, typer.Argument(help="one question; without it, a conversation")] = None,
    database: Database = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy")] = 0.0,
    device: str = "auto",
) -> None:
    """Talk to a trained model and watch it call its tool."""
    from lib.conversation import open_conversation
    from lib.dialogs import Role

    colors = {Role.ASSISTANT: "green", Role.DATABASE: "magenta"}
    with open_conversation(folder, database, device) as talk:
        if question is None:
            console.print(f"Ask about a person, {talk.example!r} say. An empty line ends the conversation.")
        while line := question or _read_line():
            speaker = None
            for role, piece in talk.ask(line, temperature=temperature):
                if role != speaker:
                    console.print(f"{'' if speaker is None else chr(10)}{role}: ", end="", style="bold")
                    speaker = role
                console.print(piece, end="", style=colors[role])
            console.print()
            if question is not None:
                return


def _read_line() -> str:
    """What the user says next; nothing at the end of the input."""
    try:
        return console.input("you: ").strip()
    except EOFError:
        return ""


Section = Annotated[str, typer.Argument(help="section of the paper, as 05_1")]
ProfileOption = Annotated[
    Profile, typer.Option(help="smoke: seconds, for tests; quick: minutes; laptop: days of a core; paper: a cluster")
]


Stack = Annotated[int, typer.Option(help="models of one shape that train as one where that is faster")]


@app.command()
def sweep(
    section: Section,
    profile: ProfileOption = Profile.quick,
    jobs: Annotated[int | None, typer.Option(help="cells at a time [default: one a core, or one a GPU]")] = None,
    dry_run: Annotated[bool, typer.Option(help="only say what is ahead")] = False,
    max_hours: Annotated[float, typer.Option(min=0, help="start no new cell after this time")] = float("inf"),
    device: Device = "auto",
    stack: Stack = 8,
    publish: Annotated[bool, typer.Option(help="merge finished rows into paper_data (laptop and paper)")] = False,
) -> None:
    """Run all models of a section that are not finished yet."""
    from lib import comparison, results
    from lib import sweep as sweeps

    if publish:
        results.check_publishes(profile.value)
        results.check_traceable()
    report = sweeps.sweep(
        section, profile.value, jobs=jobs, dry_run=dry_run, max_hours=max_hours, device=device, stack=stack
    )
    console.print(str(report))
    if publish and not dry_run:
        console.print(f"{results.publish(section, profile.value)} new rows in {results.table_path(section)}")
        for compared in comparison.SECTIONS:  # a section's runs may count in another's comparison
            comparison.write(compared)
    if report.failed:
        raise SystemExit(1)


@app.command()
def compare(
    section: Section,
    threshold: Annotated[float, typer.Option(help="recall that counts as knowing: 0.5, 0.9, 0.95 or 0.99")] = 0.95,
) -> None:
    """Show our results beside the published ones, and write the table of all of them to paper_data/compared."""
    from lib import comparison, results

    results.check_threshold(threshold)
    points = comparison.write(section)
    if not len(points):
        console.print("no point of ours has a published one beside it yet")
        return
    if "recall_threshold" in points:
        points = points[points.recall_threshold == threshold].drop(columns="recall_threshold")
    console.print(points.to_string(index=False, float_format=_rounded, na_rep="-"))
    console.print(f"all points: {comparison.path(section)}")


def _rounded(number: float) -> str:
    return f"{number:,.0f}" if abs(number) >= 100 else f"{number:.3g}"


@app.command()
def figures(
    names: Annotated[list[str] | None, typer.Argument(help="which [default: all]")] = None,
    profile: ProfileOption = Profile.laptop,
) -> None:
    """Draw the figures from paper_data."""
    from lib import figures as drawing

    drawn = {name: drawing.draw(name, profile.value) for name in names or drawing.FIGURES}
    for name, figure in drawn.items():
        for path in drawing.save(figure, name, profile.value):
            console.print(str(path))


Parameters = Annotated[list[str], typer.Option("-p", help="name=value")]


@app.command()
def notebooks(
    names: Annotated[list[str] | None, typer.Argument(help="which, as 05_1 [default: all]")] = None,
    profile: ProfileOption = Profile.quick,
    parameter: Parameters = [],  # noqa: B006
    in_place: Annotated[bool, typer.Option(help="also write the outputs into the notebook itself")] = False,
    reuse: Annotated[bool, typer.Option(help="skip what is up to date")] = False,
) -> None:
    """Run notebooks and render them to HTML."""
    _run_notebooks(names, profile.value, parameter, in_place=in_place, reuse=reuse)


@app.command()
def paper(profile: ProfileOption = Profile.quick) -> None:
    """Run the notebooks of the paper, draw its figures, render everything to HTML; what is up to date is re-used."""
    from lib import notebooks as runner

    _run_notebooks(runner.paper_notebooks(), profile.value, [], in_place=False, reuse=True)
    folder = paths.profile_dir(profile.value)
    console.print(f"figures:   {paths.figures(profile.value)}")
    console.print(f"notebooks: {folder / 'notebooks'} (open the .html files)")


def _run_notebooks(names, profile: str, assignments: list[str], *, in_place: bool, reuse: bool) -> None:
    from lib import notebooks as runner

    chosen = [runner.find(name) for name in names] if names else runner.all_notebooks()
    values = runner.parse_assignments(chosen, assignments)
    try:
        runner.run_many(chosen, profile, values, in_place=in_place, reuse=reuse)
    except runner.NotebookError as error:
        raise SystemExit(_complain(str(error), 1)) from None


# On Slurm -------------------------------------------------------------------------------------------------------------

submit = typer.Typer(help="Train, sweep or run a notebook on Slurm.", no_args_is_help=True)
app.add_typer(submit, name="submit")


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
    from lib.slurm import Resources

    return Resources(**options)


Script = Annotated[bool, typer.Option("--dry-run", help="only print the script that sbatch would get")]


@submit.command("train")
@_with(cell=_cell, observers=_observers, resources=_resources)
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
    from lib import submissions

    watching = observers.model_dump(exclude_defaults=True)
    options = {"device": device, "observers": watching, "sharded": sharded, "tensor": tensor}
    task = submissions.train_task(cell, _run_folder(cell, out), **options)
    _submit(f"train-{cell.run_id}", [task], resources.model_copy(update={"tasks": max(1, resources.gpus)}), dry_run)


@submit.command("sweep")
@_with(resources=_resources)
def submit_sweep(
    section: Section,
    resources,
    profile: ProfileOption = Profile.quick,
    jobs: Annotated[int, typer.Option(help="jobs at a time")] = 16,
    hours: Annotated[float, typer.Option(min=0, help="pack searches into one job up to so many hours")] = 1.0,
    device: Device = "auto",
    stack: Stack = 8,
    dry_run: Script = False,
) -> None:
    """Run all models of a section that are not finished yet, as a job array."""
    from lib import submissions

    if resources.nodes > 1 or resources.gpus > 1:
        raise InputError("each job of a sweep takes one node and at most one GPU: --jobs says how many run at a time")
    tasks = submissions.sweep_tasks(section, profile.value, hours, device, stack)
    if tasks:
        _submit(f"sweep-{section}-{profile.value}", tasks, resources, dry_run, jobs)
    else:
        console.print("nothing is missing")


@submit.command("notebook")
@_with(resources=_resources)
def submit_notebook(
    name: Annotated[str, typer.Argument(help="which, as 05_1")],
    resources,
    profile: ProfileOption = Profile.quick,
    parameter: Parameters = [],  # noqa: B006
    dry_run: Script = False,
) -> None:
    """Run a notebook and render it to HTML."""
    from lib import submissions

    if resources.nodes > 1:
        raise InputError("a notebook runs on one node: leave out --nodes")
    task = submissions.notebook_task(name, profile.value, parameter)
    _submit(f"notebook-{Path(task.name).stem}", [task], resources, dry_run)


def _submit(name: str, tasks, resources, dry_run: bool, parallel: int = 1) -> None:
    from lib import slurm, submissions

    planned = submissions.plan(name, tasks, resources, parallel)
    if dry_run:
        print(slurm.script(planned.executor(), len(tasks)))
        return
    done = submissions.submit(planned)
    jobs = f"job {done.jobs[0]}" if len(tasks) == 1 else f"jobs {done.jobs[0]} to {done.jobs[-1]}, {parallel} at a time"
    console.print(f"submitted {done.name}: {jobs}; itl status {done.name} says how it stands")


Submitted = Annotated[str, typer.Argument(help="name of a submission, as itl status lists them")]


@app.command()
def status(name: Annotated[str | None, typer.Argument(help="of a submission [default: all]")] = None) -> None:
    """Say what of the submissions to Slurm is queued, running, done, failed or missing, and why."""
    from lib import slurm, submissions

    queue = slurm.queue()
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


@app.command()
def cancel(name: Submitted) -> None:
    """End the jobs of a submission. What they finished stays, and itl retry goes on from there."""
    from lib import submissions

    console.print(f"{submissions.cancel(submissions.find(name))} jobs cancelled")


@app.command()
def retry(name: Submitted) -> None:
    """Submit again what failed or is missing, with the code of the submission."""
    from lib import submissions

    console.print(f"{submissions.retry(submissions.find(name))} tasks submitted again")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def test(context: typer.Context) -> None:
    """Run the tests; further arguments go to pytest."""
    code = subprocess.run([sys.executable, "-m", "pytest", *context.args], cwd=paths.ROOT).returncode
    raise SystemExit(code)
