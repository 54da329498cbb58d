"""Options that several commands of `itl` share, and what they are made into."""

import functools
import inspect
import json
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lib import paths
from lib.base import InputError

Profile = StrEnum("Profile", {name: name for name in paths.PROFILES})
Mode = StrEnum("Mode", {"in_weight": "in-weight", "in_tool": "in-tool"})
console = Console(highlight=False, soft_wrap=True, markup=False)


def with_options(**groups: Callable) -> Callable[[Callable], Callable]:
    """Gives a command options that it shares with others.

    `with_options(cell=cell)`: the options of the function `cell`, and what it makes of them as the argument `cell`.
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


def cell(
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
    given = {name: value for name, value in fields.items() if value is not None} | dict(map(assignment, set_))
    return override(read_config(config) if config else RunConfig(), given)


Out = Annotated[Path | None, typer.Option(help="folder of the run [default: runs/train/<run id>]")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, ...")]
Sharded = Annotated[bool, typer.Option(help="several processes share the weights out (FSDP)")]
Tensor = Annotated[int, typer.Option(help="so many of several processes split each matrix")]


def observers(
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
    from lib.config import Observers

    return Observers(tensorboard=tensorboard, wandb=wandb, profile_steps=profile_steps, probe_every=probe_every)


def run_folder(cell, out: Path | None) -> Path:
    return out or paths.runs() / "train" / cell.run_id


def assignment(text: str) -> tuple[str, object]:
    """`training.steps=500` as a pair; the value is JSON, or else a string."""
    name, equals, value = text.partition("=")
    if not equals:
        raise InputError(f"--set takes field=value, got {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


Section = Annotated[str, typer.Argument(help="section of the paper, as 05_1")]
ProfileOption = Annotated[
    Profile, typer.Option(help="smoke: seconds, for tests; quick: minutes; laptop: days of a core; paper: a cluster")
]

Parameters = Annotated[list[str], typer.Option("-p", help="name=value")]
