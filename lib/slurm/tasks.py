"""Tasks of jobs, as plain data: a command makes them, and the submission's copy of the code runs them later."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from pydantic import Field

from lib import paths
from lib.base import Config
from lib.config import Observers, RunConfig
from lib.experiments.rows import OWN

#: Slurm's default MaxArraySize is 1001.
MAX_TASKS = 1000


class Resources(Config):
    """The resources of one job, in Slurm's terms; None leaves the choice to the cluster."""

    partition: str | None = None
    time: str = Field("2:00:00", description="minutes, or D-HH:MM:SS; a job that needs more is requeued and goes on")
    nodes: int = Field(1, ge=1, description="for one training")
    gpus: int = Field(0, ge=0, description="of each node")
    cpus: int | None = Field(None, ge=1, description="of each process")
    mem: str | None = Field(None, description="of each node, as 16G")
    account: str | None = None
    qos: str | None = None
    constraint: str | None = Field(None, description="features of the nodes")


class Task(Config):
    """What one job does: its title for people, its arguments for `do`."""

    title: str
    arguments: dict[str, Any]


class Work(Config):
    """Tasks of one kind, and the small files that they read: copies of these are kept for the jobs."""

    name: str
    kind: str
    tasks: list[Task]
    copies: dict[str, str] = {}  # path that an argument or configuration names -> file; once submitted, its copy


def train(config: RunConfig, directory: Path, observers: Observers, how: dict[str, Any]) -> Work:
    """Return one run as a task; `how` as for `lib.training.run.run`. Raises `InputError` if a file cannot be used."""
    from lib.dialogs.tokenizers import tokenizer_file
    from lib.experiments.sweep import check_files
    from lib.training.run import read_inputs

    read_inputs(config)
    check_files(config)  # of dialogs, which are large: the job tokenizes them where they are
    files = {config.facts.csv: config.facts.csv} if config.facts.csv else {}
    if config.tokenizer != "bytes":
        files[config.tokenizer] = str(tokenizer_file(config.tokenizer))
    return _run("train", config, directory, how | {"observers": _fields(observers)}, files)


def finetune(config, directory: Path, device: str) -> Work:
    """Return one fine-tuning as a task. Raises `InputError` if a file of questions cannot be used."""
    from lib.finetune.triviaqa import load_questions

    if config.task == "trivia" and config.source != "hub":
        load_questions(config.source)
    return _run("finetune", config, directory, {"device": device})


def _run(kind: str, config, directory: Path, arguments: dict[str, Any], files: Mapping[str, str] = {}) -> Work:
    folder = str(directory.resolve())
    task = Task(title=folder, arguments={"config": _fields(config), "directory": folder, **arguments})
    return Work(name=f"{kind}-{config.run_id}", kind=kind, tasks=[task], copies=files)


def sweep(source: str, profile: str, hours: float, device: str) -> Work:
    """Return what a sweep still needs as tasks of about `hours`, or of one longer search.

    source: a section or a file, as `lib.experiments.plan.searches` takes it. The runs of a search depend on each other
    and stay together; those of a full grid are independent. A section in `OWN` is one task.
    """
    from lib.experiments.sweep import hours_ahead

    if source in OWN:
        n_missing = len(import_module(OWN[source]).sweep(profile, dry_run=True).missing)
        arguments = {"source": source, "profile": profile, "device": device}
        made = [Task(title=f"section {source}, {n_missing} runs", arguments=arguments)] if n_missing else []
        return Work(name=f"sweep-{source}-{profile}", kind="sweep", tasks=made)
    plan = _parts(source, profile)
    costs = {i: cost for i, cost in enumerate(hours_ahead(source, profile, plan, device)) if cost}
    if len(costs) > MAX_TASKS:  # longer tasks are fewer: any two neighbours together exceed `hours`
        hours = max(hours, 2 * sum(costs.values()) / (MAX_TASKS - 1))
    tasks = []
    for group in pack(costs, hours):
        first, more = plan[group[0]].base, f", and {len(group) - 1} more searches" if len(group) > 1 else ""
        title = f"{first.mode}, {first.facts.n_facts} facts, seed {first.seed}{more}"
        arguments = {"source": source, "profile": profile, "positions": group, "device": device}
        tasks.append(Task(title=title, arguments=arguments))
    files = {source: source} if Path(source).is_file() else {}
    return Work(name=f"sweep-{Path(source).stem}-{profile}", kind="sweep", tasks=tasks, copies=files)


def _parts(source: str, profile: str) -> list:
    """Return the searches of a plan, each size of a full grid as a search of its own."""
    from lib.experiments.plan import searches

    return [
        replace(search, sizes=sizes)
        for search in searches(source, profile)
        for sizes in ([search.sizes] if search.threshold is not None else [(size,) for size in search.sizes])
    ]


def pack(hours: Mapping[int, float], limit: float) -> list[list[int]]:
    """Return the keys in groups, in their order: the hours of a group add up to at most `limit`, or it has one key."""
    groups, filled = [], 0.0
    for key, cost in hours.items():
        if not groups or filled + cost > limit:
            groups.append([])
            filled = 0.0
        groups[-1].append(key)
        filled += cost
    return groups


def notebook(name: str, profile: str, assignments: Sequence[str]) -> Work:
    """Return a notebook as a task; `assignments` as `itl notebooks -p` takes them. Raises `InputError`."""
    from lib.notebook import catalog

    source = catalog.find(name)
    parameters = catalog.parse_assignments([source], assignments)
    catalog.checked(source, profile, parameters)
    arguments = {
        "name": source.stem if source.parent == paths.NOTEBOOKS else str(source.resolve()),  # the submission's copy
        "profile": profile,
        "parameters": parameters,
        "figures": str(paths.figures(profile).resolve()),
    }
    task = Task(title=source.stem, arguments=arguments)
    return Work(name=f"notebook-{source.stem}", kind="notebook", tasks=[task])


def _fields(config: Config) -> dict[str, Any]:
    return config.model_dump(mode="json", exclude_defaults=True)


def do(kind: str, copies: Mapping[str, str], arguments: dict[str, Any]) -> None:
    """Do one task in this process. copies: as in `Work`."""
    match kind:
        case "train":
            from lib.training.run import run

            config, observers = RunConfig.parse(arguments.pop("config")), Observers.parse(arguments.pop("observers"))
            directory = Path(arguments.pop("directory"))
            run(config, directory, observers=observers, description="training", inputs=copies, **arguments)
        case "finetune":
            from lib.finetune import train
            from lib.finetune.config import FinetuneConfig

            config, directory = FinetuneConfig.parse(arguments["config"]), Path(arguments["directory"])
            train.finetune(config, directory, device=arguments["device"])
        case "sweep":
            from lib.experiments.sweep import sweep

            source = copies.get(arguments["source"], arguments["source"])
            profile, device = arguments["profile"], arguments["device"]
            if source in OWN:
                import_module(OWN[source]).sweep(profile, device=device).check()
                return
            parts = _parts(source, profile)
            plan = [parts[i] for i in arguments["positions"]]
            sweep(source, profile, device=device, plan=plan, in_process=True).check()
        case "notebook":
            from lib.notebook import runner

            os.environ["ITL_FIGURES"] = arguments["figures"]
            runner.run(arguments["name"], arguments["profile"], arguments["parameters"])
