"""`itl`: a thin door to the library. Bad input ends in one sentence and exit code 2, failed work in exit code 1."""

import os
import subprocess
import sys
from contextlib import ExitStack
from itertools import combinations
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from lib import paths
from lib.base import InputError, WorkError, to_json
from lib.cli import finetune, slurm
from lib.cli.options import (
    Device,
    Mode,
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

app = typer.Typer(
    help="In-tool and in-weight learning: train, ask, sweep, draw.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


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
    from lib.dialogs import templates as dialog_module
    from lib.facts.database import write_database
    from lib.facts.people import FactsConfig
    from lib.facts.sampling import load_people

    named = {"--csv": csv and Path(csv), "--out": out, "--dialogs": dialogs}
    for (one, path), (other, same) in combinations(((option, path) for option, path in named.items() if path), 2):
        if path.resolve() == same.resolve() or (path.exists() and same.exists() and path.samefile(same)):
            raise InputError(f"{one} and {other} name the same file {same}, which would be lost: give another")
    crowd = load_people(FactsConfig(n_people=people, seed=seed, alpha=alpha, csv=csv))
    if dialogs and ((dialogs.exists() and not dialogs.is_file()) or not dialogs.parent.is_dir()):
        raise InputError(f"cannot write {dialogs}: a file name in an existing folder is expected")
    write_database(crowd, out)
    console.print(f"{len(crowd):,} people with {crowd.n_facts:,} facts ({', '.join(crowd.attributes)}) in {out}")
    if dialogs:
        _write_lines(dialogs, (to_json(dialog) for dialog in dialog_module.dialogs(crowd, mode.value)))
        console.print(f"their {mode.value} dialogs, as JSON lines, in {dialogs}")


def _write_lines(path: Path, lines) -> None:
    try:
        with paths.replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from None


@app.command()
@with_options(cell=cell, observers=observers)
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
    from lib.training.distributed import is_first
    from lib.training.run import run

    console.quiet = not is_first()
    directory = run_folder(cell, out)
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


RunFolder = Annotated[Path, typer.Argument(help="folder of a run, or of a committed checkpoint")]
Database = Annotated[Path | None, typer.Option(help="database to ask [default: the run's own]")]


@app.command()
def recall(folder: RunFolder, database: Database = None, device: str = "auto") -> None:
    """Ask a trained model about all the people that it was trained on."""
    from lib.agent.tools import SqlTool
    from lib.evaluation.recall import measure_recall
    from lib.training.saved import open_conversation

    with open_conversation(folder, database, device) as talk:
        if talk.tool is not None:
            SqlTool(talk.database, talk.people.attributes).close()  # `InputError` if it lacks one
        facts = list(talk.people.facts())
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
    from lib.training.watch import evaluate_checkpoints

    for line in evaluate_checkpoints(folder, device, watch):
        console.print(f"step {line['step']:,}: recall {line['recall']:.4f}, {line['nll_bits']:.2f} bits a question")
    console.print(f"all that was measured is in {folder / 'evaluations.jsonl'}")


@app.command()
def chat(
    folder: RunFolder,
    question: Annotated[str | None, typer.Argument(help="one question; without it, a conversation")] = None,
    database: Database = None,
    beside: Annotated[Path | None, typer.Option(help="folder of another run, to answer the same questions")] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy")] = 0.0,
    device: str = "auto",
) -> None:
    """Talk to a trained model and watch it call its tool; in a conversation, /help lists commands.

    /set changes a fact in a copy of the database: the model answers with what it says now.
    """
    from lib.cli import terminal
    from lib.training.saved import open_conversation

    with ExitStack() as stack:
        runs = [(folder, database), *([(beside, None)] if beside else [])]
        talks = [stack.enter_context(open_conversation(*run, device, editable=question is None)) for run in runs]
        if question is None:
            terminal.converse(console, talks, _read_line, temperature=temperature)
        else:
            terminal.answer(console, talks, question, temperature=temperature)


def _read_line() -> str:
    """What the user says next; nothing at the end of the input."""
    try:
        return console.input(Text("you: ", style="bold cyan")).strip()
    except EOFError:
        return ""


@app.command()
def sweep(
    section: Annotated[str, typer.Argument(help="section of the paper, as 05_1, or a YAML file of grids")],
    profile: ProfileOption = Profile.quick,
    jobs: Annotated[int | None, typer.Option(help="runs at a time [default: one a core, or one a GPU]")] = None,
    dry_run: Annotated[bool, typer.Option(help="only say what is ahead")] = False,
    max_hours: Annotated[float, typer.Option(min=0, help="start no new run after this time")] = float("inf"),
    device: Device = "auto",
    publish: Annotated[bool, typer.Option(help="merge finished rows into paper_data (laptop and paper)")] = False,
) -> None:
    """Run all models of a section, or of a file of your own, that are not finished yet."""
    if section == "06":
        return finetune.sweep(profile.value, jobs, dry_run, max_hours, device, publish, refresh)
    from lib.experiments import publishing, tables
    from lib.experiments import sweep as sweeps

    if publish:
        tables.table_path(section)  # an experiment without a table is an `InputError`
        publishing.check_publishes(profile.value)
        publishing.check_traceable()
    report = sweeps.sweep(section, profile.value, jobs=jobs, dry_run=dry_run, max_hours=max_hours, device=device)
    console.print(str(report))
    if publish and not dry_run:
        console.print(f"{publishing.publish(section, profile.value)} new rows in {tables.table_path(section)}")
        refresh()
    if report.failed:
        raise SystemExit(1)


@app.command()
def drop(
    section: Section,
    profile: Annotated[str | None, typer.Option(help="only of this profile")] = None,
    run_id: Annotated[list[str] | None, typer.Option(help="only of this run; may be repeated")] = None,
    superseded: Annotated[bool, typer.Option(help="only rows that today's plan does not ask for")] = False,
    dry_run: Annotated[bool, typer.Option(help="only list them")] = False,
) -> None:
    """Take rows out of a table of paper_data: nothing else does. At least one option must say which."""
    if section == "06":
        from lib.finetune.experiments import table_of_rows

        table = table_of_rows()
    else:
        from lib.experiments.publishing import table_of

        table = table_of(section)
    rows = table.drop(profile, run_id or [], superseded, dry_run)
    about = ["profile", "run_id", "mode", "n_facts", "seed", "superseded"]
    console.print(rows[about].drop_duplicates().to_string(index=False))
    console.print(f"{len(rows)} rows {'would leave' if dry_run else 'have left'} {table.path}")


@app.command()
def refresh() -> None:
    """Compute the comparisons, README's numbers, figures and notebooks' outputs from paper_data; trains nothing."""
    from lib.notebook import refresh as everything

    everything.refresh(console.print)


@app.command()
def compare(
    section: Section,
    threshold: Annotated[float, typer.Option(help="recall that counts as knowing: 0.5, 0.9, 0.95 or 0.99")] = 0.95,
) -> None:
    """Show our results beside the published ones, and write the table of all of them to paper_data/compared."""
    from lib.experiments import published, tables

    tables.check_threshold(threshold)
    points = published.write(section)
    if not len(points):
        console.print("no point of ours has a published one beside it yet")
        return
    if "recall_threshold" in points:
        points = points[points.recall_threshold == threshold].drop(columns="recall_threshold")
    console.print(points.to_string(index=False, float_format=_rounded, na_rep="-"))
    console.print(f"all points: {published.path(section)}")


def _rounded(number: float) -> str:
    return f"{number:,.0f}" if abs(number) >= 100 else f"{number:.3g}"


@app.command()
def figures(
    names: Annotated[list[str] | None, typer.Argument(help="which [default: all]")] = None,
    profile: ProfileOption = Profile.laptop,
) -> None:
    """Draw the figures from paper_data."""
    from lib.figures import record, style

    drawn = {name: record.draw(name, profile.value) for name in names or record.FIGURES}
    for name, figure in drawn.items():
        for path in style.save(figure, name, profile.value):
            console.print(str(path))


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
    from lib.notebook import catalog

    _run_all(catalog.all_notebooks("paper"), profile.value)


@app.command()
def scale(profile: ProfileOption = Profile.quick) -> None:
    """The same for Section 6 and the appendix on TriviaQA: large models, fine-tuned (extra `scale`)."""
    from lib.notebook import catalog

    _run_all(catalog.all_notebooks("scale"), profile.value)


@app.command()
def book(
    profile: Annotated[Profile | None, typer.Option(help="show executed copies [default: committed notebooks]")] = None,
    out: Annotated[Path | None, typer.Option(help="folder to write [default: runs/book]")] = None,
) -> None:
    """Build a site from the notebooks, with lesson plan and solutions (extra `book`)."""
    from lib.notebook import book as site

    console.print(f"the book: {site.build(out, profile and profile.value)}")


def _run_all(names, profile: str) -> None:
    _run_notebooks(names, profile, [], in_place=False, reuse=True)
    console.print(f"figures:   {paths.figures(profile)}")
    console.print(f"notebooks: {paths.profile_dir(profile) / 'notebooks'} (open the .html files)")


def _run_notebooks(names, profile: str, assignments: list[str], *, in_place: bool, reuse: bool) -> None:
    from lib.notebook import catalog, runner

    chosen = [catalog.find(name) for name in names] if names else catalog.all_notebooks()
    values = catalog.parse_assignments(chosen, assignments)
    runner.run_many(chosen, profile, values, in_place=in_place, reuse=reuse)


for command in (finetune.bases, finetune.fetch, finetune.finetune, finetune.trivia):
    app.command()(command)

# On Slurm -------------------------------------------------------------------------------------------------------------

app.add_typer(slurm.submit, name="submit")
for command in (slurm.status, slurm.cancel, slurm.retry):
    app.command()(command)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def test(context: typer.Context) -> None:
    """Run the tests, a file at a time on each of up to eight cores; further arguments go to pytest (`-n 0`: one)."""
    # In alphabetical order: the longest files, browser and cluster, come first.
    spread = ["--numprocesses", "auto", "--maxprocesses", "8", "--dist", "loadfile", "--no-loadscope-reorder"]
    code = subprocess.run([sys.executable, "-m", "pytest", *spread, *context.args], cwd=paths.ROOT).returncode
    raise SystemExit(code)
