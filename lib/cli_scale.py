"""The commands of `itl` about large models; they take the extra `[scale]`."""

import asyncio
from contextlib import nullcontext
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from lib import paths
from lib.options import console

Protocol = StrEnum("Protocol", {"closed_book": "closed-book", "text": "text", "tools": "tools"})


def trivia(
    model: Annotated[str, typer.Option(help="its name at the server, or the folder of a model to serve here")],
    base_url: Annotated[
        str | None,
        typer.Option(help="an OpenAI-compatible server, as http://localhost:8000/v1 [default: serve --model]"),
    ] = None,
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
    """Ask a chat model questions of general knowledge, without a tool and with one that has the answers.

    The same command goes on where it was interrupted: a question with an answer in --out is not asked again.
    """
    from lib.finetune.endpoint import EndpointConfig, accuracy, ask_all, serve
    from lib.finetune.triviaqa import Store, load_questions, write_store

    questions = load_questions(source, split, limit)
    out = out or paths.runs() / "trivia" / "records.jsonl"
    settings = {"model": model, "concurrency": concurrency, "timeout": timeout, "retries": retries, "api_key": api_key}
    settings |= {} if system is None else {"system": system}
    with nullcontext(base_url) if base_url is not None else serve(model) as url:
        endpoints = [EndpointConfig(base_url=url, protocol=name.value, **settings) for name in protocol]
        out.parent.mkdir(parents=True, exist_ok=True)
        write_store(questions, store := out.with_suffix(".sqlite"))
        with Store(store) as look_up:
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
