"""`itl`: a thin wrapper of the library. Bad input ends in one sentence and exit code 2, failed work in exit code 1."""

import asyncio
import logging
import os
import re
import signal
import sqlite3
import subprocess
import sys
from contextlib import ExitStack, nullcontext
from importlib import import_module
from pathlib import Path
from shlex import quote
from typing import Annotated

import typer
from rich.text import Text

from lib import paths
from lib.base import InputError, WorkError, printable, to_json
from lib.cli import finetune, options, slurm
from lib.cli.options import ENDS, Device, ProfileOption, Section, Terminal, console, takes
from lib.experiments.rows import OWN

app = typer.Typer(
    help="In-tool and in-weight learning: train, ask, sweep, draw.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

#: Commands that resume where they were interrupted.
RESUMED = ("train", "finetune", "evaluate", "sweep", "trivia", "ask", "notebooks", "paper", "scale")
#: Maximum characters of a message, which may quote a file or a server.
LONGEST = 1_500
#: Errors that a user, a file, a disk or a server can cause.
FORESEEABLE = (InputError, WorkError, OSError, MemoryError, sqlite3.Error, UnicodeError, typer.TyperException)
#: Messages of libraries, in errors of other types, when memory is short (group 1) or a write fails.
LIBRARIES = re.compile(r"(map segment|(out of|allocate) memory)|\(os error \d+\)|PytorchStreamWriter|inline_container")


def main() -> None:
    """Run `itl`, as `python -m lib` does, and turn foreseeable errors into a sentence and an exit code.

    ITL_DEBUG=1 shows their tracebacks.
    """
    # Exit on signals by SystemExit, so that temporary files are deleted.
    before = {each: signal.signal(each, lambda number, _: sys.exit(128 + number)) for each in ENDS}
    try:
        code = app(standalone_mode=False)
        print(end="", flush=True)
    except BrokenPipeError:  # the reader of the output has exited
        code, sys.stdout = 1, None  # else Python prints a traceback at exit
    except KeyboardInterrupt:  # before or after typer's own handler
        code = 130
    except Exception as error:
        if os.environ.get("ITL_DEBUG") or not (isinstance(error, FORESEEABLE) or LIBRARIES.search(str(error))):
            raise
        _say(_sentence(error))
        code = getattr(error, "exit_code", 1)
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    if code == 130:  # typer's code for Ctrl-C
        resumed = len(sys.argv) > 1 and sys.argv[1] in RESUMED
        _say("interrupted: the same command resumes from what was saved" if resumed else "interrupted")
    sys.exit(code if isinstance(code, int) else 0)


def _sentence(error: Exception) -> str:
    """Return what went wrong; an error of the system is reported with its file."""
    if isinstance(error, typer.TyperException):
        return error.format_message()
    if isinstance(error, OSError) and error.strerror:
        about = f" with {error.filename}" if error.filename else ""
        return f"the operating system reports an error{about}: {error.strerror}"
    if isinstance(error, MemoryError) or not isinstance(error, FORESEEABLE) and LIBRARIES.search(str(error))[1]:
        return "out of memory: give a smaller model or batch"
    return str(error) if isinstance(error, FORESEEABLE) else f"a file could not be written, is the disk full? {error}"


def _say(sentence: str) -> None:
    """Print one short line to stderr, with terminal controls escaped."""
    line = printable(" ".join(sentence.split()))
    if line:
        print(f"itl: {line if len(line) <= LONGEST else f'{line[:LONGEST]} ...'}", file=sys.stderr)


@app.command()
@takes(config=options.DATA)
def data(
    config,
    out: Annotated[Path, typer.Option(help="SQLite file to write")],
    dialogs: Annotated[Path | None, typer.Option(help="also write the dialogs, as JSON lines")] = None,
) -> None:
    """Sample people, or read them from a CSV file, and write their database."""
    from lib.dialogs import templates
    from lib.facts.database import write_database
    from lib.facts.sampling import load_people

    paths.check_distinct(csv=config.facts.csv, out=out, dialogs=dialogs)
    people = load_people(config.facts)
    with paths.replacing(dialogs) if dialogs else nullcontext() as temporary:
        if temporary:
            with temporary.open("w", encoding="utf-8") as file:
                file.writelines(f"{to_json(dialog)}\n" for dialog in templates.dialogs(people, config.mode))
        write_database(people, out)
    console.print(f"{len(people):,} people with {people.n_facts:,} facts ({', '.join(people.attributes)}) in {out}")


@app.command()
@takes(config=options.RUN, observers=options.OBSERVERS, how=options.HOW)
def train(config, observers, how, out: options.Out = None, device: Device = "auto") -> None:
    """Train one model and measure its recall. The same command resumes an interrupted run.

    Started by torchrun, several processes train it together, each on its part of every batch.
    """
    from lib.training.distributed import is_first
    from lib.training.run import run

    console.quiet = not is_first()
    directory, model = options.run_folder(config, out), config.model
    console.print(f"run {config.run_id}: {config.mode}, d_model {model.d_model}, {model.n_params:,} parameters")
    description = "training" if is_first() else None
    row = run(config, directory, device=device, description=description, observers=observers, **how)
    console.print(
        f"recall {row['recall']:.4f} on {row['n_questions']:,} questions after {row['steps']:,} steps "
        f"and {row['train_seconds']:.0f} s (stopped by {row['stopped']})"
    )
    console.print(f"all of it is in {directory}; talk to the model: itl chat {quote(str(directory))}")


RunFolder = Annotated[Path, typer.Argument(help="folder of a run, or of a committed checkpoint")]
Database = Annotated[Path | None, typer.Option(help="database to ask (default: the run's own)")]


@app.command()
def recall(folder: RunFolder, database: Database = None, device: Device = "auto") -> None:
    """Ask a trained model about everyone that it was trained on."""
    from lib.agent.tools import SqlTool
    from lib.evaluation.recall import measure_recall
    from lib.training.saved import open_conversation

    with open_conversation(folder, database, device) as talk:
        facts = list(talk.people.facts())
        if talk.tool is not None:
            with SqlTool(talk.tool.path, talk.people.attributes) as asked:  # `InputError` if it lacks an attribute
                changed = 0 if database else sum(asked.find(of, name).text != value for name, of, value in facts)
            if changed:
                told = f"{changed:,} of {len(facts):,} facts in {talk.tool.path} are not those of training"
                raise InputError(f"{told}: restore it, or give it as --database to ask it as it is")
        measured = measure_recall(talk.model, facts, talk.tokenizer, talk.tool, description="asking")
        queries = "" if talk.tool is None else f", {talk.tool.n_queries:,} queries to {talk.tool.path}"
    console.print(f"recall {measured.overall:.4f} on {len(facts):,} questions{queries}")
    for attribute, share in measured.by_attribute().items():
        console.print(f"  {attribute:<16} {share:.4f}")


@app.command()
def evaluate(
    folder: Annotated[Path, typer.Argument(help="folder of a run that is training, or has been")],
    watch: Annotated[bool, typer.Option(help="wait for further checkpoints until the run is finished")] = False,
    device: Device = "auto",
) -> None:
    """Measure the recall of every checkpoint of a run once, also while another process trains it."""
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
    device: Device = "auto",
) -> None:
    """Talk to a trained model and watch it call its tool; in a conversation, /help lists commands.

    /set changes a fact in a copy of the database, and the model answers with the new value.
    """
    from lib.cli import terminal
    from lib.training.saved import open_conversation

    with ExitStack() as stack:
        runs = [(folder, database), *([(beside, None)] if beside else [])]
        talks = [stack.enter_context(open_conversation(*run, device, editable=question is None)) for run in runs]
        if question is None:
            terminal.converse(console, talks, _read_line)
        else:
            terminal.answer(console, talks, question)


def _read_line() -> str:
    """Return what the user types; an empty string at end of input or without an input."""
    try:
        return console.input(Text("you: ", style="bold cyan")).strip()
    except (EOFError, RuntimeError):
        return ""


@app.command()
def sweep(
    source: options.Source,
    profile: ProfileOption = "quick",
    jobs: Annotated[int | None, typer.Option(help="runs at a time (default: one a core, or one a GPU)")] = None,
    dry_run: Annotated[bool, typer.Option(help="only list what is left to run")] = False,
    facts: Annotated[list[int] | None, typer.Option(help="only runs with N facts; may be repeated (Section 5)")] = None,
    max_hours: Annotated[float, typer.Option(min=0, help="time limit; the same command resumes")] = float("inf"),
    device: Device = "auto",
    publish: Annotated[bool, typer.Option(help="merge finished rows into paper_data (laptop and paper)")] = False,
) -> None:
    """Run all models of a section, or of a YAML file of grids, that are not finished yet."""
    if publish:
        from lib.experiments import publishing  # imports pandas, which nothing else here needs

        publishing.table_of(source)  # an experiment without a table is an `InputError`
        publishing.check_publishes(profile)
        publishing.check_traceable()
    how = {"max_hours": max_hours, "device": device}
    if facts and source in OWN:
        raise InputError(f"--facts is for Section 5 and grids of your own, not for section {source}: leave it out")
    if source in ("06", "07_2"):
        if jobs not in (None, 1):
            raise InputError(f"section {source} does one run at a time: leave --jobs out")
    else:
        how["jobs"] = jobs
    if source in OWN:
        report = import_module(OWN[source]).sweep(profile, dry_run=dry_run, **how)
    else:
        from lib.experiments import sweep as sweeps
        from lib.experiments.plan import searches

        plan = searches(source, profile)
        if facts:
            plan = [each for each in plan if each.base.facts.n_facts in facts]
            if not plan:
                raise InputError(f"no {profile} run of {source} has {' or '.join(map(str, facts))} facts")
        report = sweeps.sweep(source, profile, dry_run=dry_run, plan=plan, **how)
    console.print(str(report))
    if publish and not dry_run:
        table = publishing.table_of(source)
        console.print(f"{table.add(profile)} new rows in {table.path}")
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
    """Drop rows from a table of paper_data; no other command does. Give at least one option that selects them."""
    from lib.experiments.publishing import table_of

    table = table_of(section)
    rows = table.drop(profile, run_id or [], superseded, dry_run)
    about = ["profile", "run_id", "mode", "n_facts", "seed", "superseded"]
    console.table(rows[about].drop_duplicates())
    console.print(f"{len(rows)} rows {'to drop' if dry_run else 'dropped'} from {table.path}")


@app.command()
def refresh() -> None:
    """Recompute comparisons, README's numbers, figures and notebooks' outputs from paper_data, without training."""
    from lib.notebook import refresh as everything

    everything.refresh(console.print)


@app.command()
def compare(section: Section) -> None:
    """Show our results beside the published ones, and write them to a table in paper_data/compared."""
    from lib.experiments import published

    paths.check_checkout()
    points = published.write(section)
    if not len(points):
        console.print("no result of ours has a published counterpart yet")
        return
    console.table(points, numbers="{:,.6g}")
    console.print(f"the same table: {published.path(section)}")


@app.command()
def figures(
    names: Annotated[list[str] | None, typer.Argument(help="which (default: all)")] = None,
    profile: ProfileOption = "laptop",
) -> None:
    """Draw the figures from paper_data."""
    from lib.figures import record, style

    paths.check_checkout()
    drawn = {name: record.draw(name, profile) for name in names or record.FIGURES}
    for name, figure in drawn.items():
        for path in style.save(figure, name, profile):
            console.print(str(path))


@app.command()
def notebooks(
    names: Annotated[list[str] | None, typer.Argument(help="which, as 05_1 (default: all)")] = None,
    profile: ProfileOption = "quick",
    parameter: options.Parameters = None,
    in_place: Annotated[bool, typer.Option(help="also write the outputs into the notebook itself")] = False,
    reuse: Annotated[bool, typer.Option(help="skip what is up to date")] = False,
) -> None:
    """Run notebooks and render them to HTML."""
    from lib.notebook import catalog, runner

    chosen = [catalog.find(name) for name in names] if names else catalog.all_notebooks()
    values = catalog.parse_assignments(chosen, parameter or [])
    runner.run_many(chosen, profile, values, in_place=in_place, reuse=reuse)


@app.command()
def paper(profile: ProfileOption = "quick") -> None:
    """Run the notebooks of the paper, draw its figures, render everything to HTML; what is up to date is re-used."""
    _run_all("paper", profile)


@app.command()
def scale(profile: ProfileOption = "quick") -> None:
    """Do as `paper` does, for the notebooks of Section 6 and TriviaQA, which fine-tune chat models (extra `scale`)."""
    _run_all("scale", profile)


def _run_all(group: str, profile: str) -> None:
    from lib.notebook import catalog, runner

    runner.run_many(catalog.all_notebooks(group), profile, reuse=True)
    console.print(f"figures:   {paths.figures(profile)}")
    console.print(f"notebooks: {paths.profile_dir(profile) / 'notebooks'} (open the .html files)")


@app.command()
def book(out: Annotated[Path | None, typer.Option(help="folder to write (default: runs/book)")] = None) -> None:
    """Build a site from the notebooks, with lesson plan and solutions (extra `book`)."""
    from lib.notebook import book as site

    console.print(f"the book: {site.build(out)}")


@app.command()
def serve(
    file: Annotated[Path, typer.Argument(help="SQLite database of people, or a CSV file (.csv)")],
    http: Annotated[bool, typer.Option("--http", help="HTTP on this machine alone (default: stdin, stdout)")] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="of --http; 0 is any free one")] = 8000,
) -> None:
    """Let assistants look people up, over the Model Context Protocol (MCP; extra `serve`)."""
    from lib.agent import server
    from lib.facts.database import as_database

    with ExitStack() as stack:

        def leave(*_) -> None:
            stack.close()
            os._exit(0)  # a thread is blocked on stdin, and Python would wait for it

        for number in (signal.SIGINT, *ENDS):
            stack.callback(signal.signal, number, signal.signal(number, leave))
        offered = server.people_server(stack.enter_context(as_database(file)))
        if http:
            listening = stack.enter_context(server.listen(port))
            work, where = server.http(offered, listening), f"http://{server.HOST}:{listening.getsockname()[1]}/mcp"
        else:
            work, where = server.stdio(offered), "stdin and stdout"
        told = Terminal(stderr=True, highlight=False, soft_wrap=True, markup=False)  # stdout carries the protocol
        told.print(f"serving {file} at {where}; Ctrl-C ends it")
        logging.disable()  # the packages log what clients say
        asyncio.run(work)


app.add_typer(slurm.submit, name="submit")
pretrained = finetune.bases, finetune.fetch, finetune.finetune, finetune.trivia, finetune.ask
for command in (*pretrained, slurm.status, slurm.cancel, slurm.retry):
    app.command()(command)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def test(context: typer.Context) -> None:
    """Run the tests, a file at a time on each of up to eight cores; further arguments go to pytest (`-n 0`: on one)."""
    paths.check_checkout()
    # In alphabetical order: the longest files, browser and cluster, come early.
    spread = ["--numprocesses", "auto", "--maxprocesses", "8", "--dist", "loadfile", "--no-loadscope-reorder"]
    code = subprocess.run([sys.executable, "-m", "pytest", *spread, *context.args], cwd=paths.ROOT).returncode
    raise SystemExit(code)
