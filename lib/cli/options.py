"""Options that several commands of `itl` share, and the configurations whose fields they set."""

import functools
import inspect
import json
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import typer
from rich.console import Console

from lib import paths
from lib.base import Config, InputError, printable
from lib.config import Observers, RunConfig, override, read_config
from lib.dialogs.templates import QuestionMode
from lib.slurm.tasks import Resources


class Terminal(Console):
    """Prints names, answers and paths verbatim, with terminal controls escaped."""

    def print(self, *objects, **options) -> None:
        super().print(*(printable(each) if isinstance(each, str) else each for each in objects), **options)

    def table(self, rows, columns: list[str] | None = None, numbers: str = "{:.3f}") -> None:
        """Print columns of rows, dictionaries or a DataFrame; `numbers` formats what is no integer."""
        from pandas import DataFrame  # slow to import

        table = DataFrame(rows, columns=columns)
        self.print(table.to_string(index=False, float_format=numbers.format, na_rep="-"))


console = Terminal(highlight=False, soft_wrap=True, markup=False)


class Option(NamedTuple):
    """An option that a command passes on only if it is given."""

    kind: Any
    help: str | None
    field: str = ""  # the configuration field that it sets, by default its own name
    default: Any = None


KEYWORD, REQUIRED = inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.empty
#: A function that builds a command's argument from options, and these options by name.
Group = tuple[Callable[[dict[str, Any]], Any], dict[str, Option]]


def takes(**groups: Group) -> Callable[[Callable], Callable]:
    """Give a command the options of groups; each group becomes one argument of the command.

    The group's function builds that argument from the given options, keyed by the fields that they set.
    """

    def decorate(command: Callable) -> Callable:
        @functools.wraps(command)
        def wrapper(**given):
            for name, (make, options) in groups.items():
                values = {option.field or key: given.pop(key) for key, option in options.items()}
                given[name] = make({field: value for field, value in values.items() if value is not None})
            return command(**given)

        parameters = [p for p in inspect.signature(command).parameters.values() if p.name not in groups]
        for _, options in groups.values():
            for name, option in options.items():
                declared = typer.Option(f"--{name.replace('_', '-')}", help=option.help)
                annotation = Annotated[option.kind | None, declared]
                parameters.append(inspect.Parameter(name, KEYWORD, default=option.default, annotation=annotation))
        wrapper.__signature__ = inspect.Signature([p.replace(kind=KEYWORD) for p in parameters])
        wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return wrapper

    return decorate


def options_of(config: type[Config]) -> dict[str, Option]:
    """Return an option for every field of a configuration; the field's description is its help."""
    options = {}
    for name, field in config.model_fields.items():
        default = f" (default: {field.default})" if field.default else ""
        options[name] = Option(field.annotation, f"{field.description or ''}{default}")
    return options


def assigned(given: dict[str, Any]) -> dict[str, Any]:
    """Return fields by name, those of `--set NAME=VALUE` last; VALUE is parsed as JSON, or else kept as a string."""
    fields = dict(given)
    for text in fields.pop("set", []):
        name, equals, value = text.partition("=")
        if not equals:
            raise InputError(f"--set takes field=value, got {text!r}")
        try:
            fields[name] = json.loads(value)
        except (ValueError, RecursionError):
            fields[name] = value
    return fields


def check_device(name: str) -> str:
    """Return the name of a device. Raises `InputError` for a name that torch does not know on any machine."""
    if not re.fullmatch(r"auto|cpu|(cuda|mps|xpu)(:\d{1,3})?", name):
        raise InputError(f"there is no device {name!r}: auto, cpu, cuda, cuda:1, mps and xpu are accepted")
    return name


def _run_config(given: dict[str, Any]) -> RunConfig:
    start = given.pop("config", None)
    if {"facts.n_people", "facts.csv"} <= given.keys():
        raise InputError("--people and --csv exclude each other: the file says how many there are")
    if "seed" in given:
        given["facts.seed"] = given["seed"]
    return override(read_config(start) if start else RunConfig(), assigned(given))


_named = (getattr(signal, name, None) for name in ("SIGTERM", "SIGHUP"))
#: Signals that end a command. Windows has no SIGHUP (a closed terminal), and nohup ignores it.
ENDS = [each for each in _named if each and signal.getsignal(each) != signal.SIG_IGN]
SET = Option(list[str], "any other field, as training.steps=500; may be repeated")
#: The configuration of a run.
RUN: Group = (
    _run_config,
    {
        "mode": Option(QuestionMode, "answer from memory or by asking a database"),
        "people": Option(int, "how many people (default: 64)", "facts.n_people"),
        "d_model": Option(int, "width of the model", "model.d_model"),
        "seed": Option(int, "of the people, the initialization and the data order"),
        "csv": Option(str, "take the people of this CSV file instead", "facts.csv"),
        "alpha": Option(float, "correlation within families, 0 to 1", "facts.alpha"),
        "config": Option(Path, "JSON file to start from"),
        "set": SET,
    },
)
#: The part of it that `itl data` needs.
DATA: Group = _run_config, {name: RUN[1][name] for name in ("mode", "people", "seed", "csv", "alpha")}
#: Extra logging of a run.
OBSERVERS: Group = Observers.parse, options_of(Observers)
#: How a run is trained; `lib.training.run.run` takes these.
HOW: Group = (
    dict,
    {
        "sharded": Option(bool, "shard the weights over the processes (FSDP)"),
        "tensor": Option(int, "how many processes split each matrix (tensor parallel)"),
        "threads": Option(int, "CPU threads (default: as many as are fastest)"),
    },
)
#: The resources of a Slurm job.
RESOURCES: Group = Resources.parse, options_of(Resources)

Out = Annotated[Path | None, typer.Option(help="folder of the run (default: runs/train/ID or runs/finetune/ID)")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, ...", callback=check_device)]
Section = Annotated[str, typer.Argument(help="section of the paper, as 05_1")]
Source = Annotated[str, typer.Argument(help="section of the paper, as 05_1, or a YAML file with a plan of your own")]
ProfileOption = Annotated[
    Literal[*paths.PROFILES],
    typer.Option(help="smoke: seconds, for tests; quick: minutes; laptop: days of a core; paper: a cluster"),
]
Parameters = Annotated[list[str] | None, typer.Option("-p", help="name=value")]


def run_folder(config, out: Path | None, group: str = "train") -> Path:
    """Return the folder of a run: `out`, or runs/GROUP/<run id>."""
    return out or paths.runs() / group / config.run_id
