"""`run(config, directory) -> row`: one cell from facts to result, what every launcher calls.

The folder of a run holds `config.json`, `people.sqlite`, `metrics.jsonl`, `checkpoints/`, and once it is finished
`model/` (weights alone) and `row.json`. A finished run is never repeated; one that was killed goes on.
"""

import json
import platform
import shutil
import subprocess
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock

from lib import checkpoint, paths
from lib.base import InputError
from lib.config import RunConfig
from lib.dialogs import ByteTokenizer, dialogs, tokenize
from lib.facts import People, load_people, write_database
from lib.model import Transformer
from lib.monitor import summary_writer
from lib.recall import Fact, Recall, measure_recall
from lib.tools import SqlTool
from lib.trainer import Trainer

CLAIM, DATABASE, ROW, MODEL = "config.json", "people.sqlite", "row.json", "model"


def run(
    config: RunConfig,
    directory: Path,
    *,
    device: str = "auto",
    description: str | None = None,
    tensorboard: bool = False,
) -> dict:
    """Train and measure one model; returns its row (see `paper_data/README.md` for the columns).

    Raises `InputError` if `directory` belongs to another configuration or to other people; then nothing has changed.
    """
    device = resolve_device(device)
    if tensorboard:
        summary_writer()
    directory = Path(directory)
    people = load_people(config.facts)
    _check_claim(directory, config, people)
    commit()  # remembers the code that was imported, whatever is committed while the run goes on
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {directory}: {error.strerror}") from None
    with FileLock(directory / ".lock"):  # a second process waits and finds the row
        _check_claim(directory, config, people)
        if not (directory / CLAIM).exists():
            claim = {"config": config.model_dump(mode="json"), "people_digest": people.digest()}
            write_json(directory / CLAIM, claim)
        if not (directory / ROW).exists():
            row = _train_and_measure(config, directory, people, device, description, tensorboard)
            write_json(directory / ROW, row)
            shutil.rmtree(directory / "checkpoints", ignore_errors=True)  # the model is kept, the way to it is not
        return json.loads((directory / ROW).read_text())


def _train_and_measure(
    config: RunConfig, directory: Path, people: People, device: torch.device, description: str | None, tensorboard: bool
) -> dict:
    tokenizer = ByteTokenizer()
    data = tokenize(dialogs(people, config.mode), tokenizer)
    facts = list(people.facts())
    model = Transformer(config.model, torch.Generator().manual_seed(config.seed)).to(device)
    write_database(people, directory / DATABASE)
    with SqlTool(directory / DATABASE) as database:
        tool = database if config.mode == "in-tool" else None

        def recall(questions: list[Fact]) -> Recall:
            return measure_recall(model, questions, tokenizer, tool)

        probe = facts[: config.evaluation.questions]
        trainer = Trainer(model, data, config, directory, lambda _: recall(probe).overall)
        outcome = trainer.train(description, tensorboard)
        measured = recall(facts)
    save_model(model, directory / MODEL, config)
    return {
        "run_id": config.run_id,
        **_configuration_columns(config, people),
        "steps_budget": trainer.total_steps,
        "n_params": config.model.n_params,
        "steps": outcome.steps,
        "stopped": outcome.stopped,
        "dialogs_seen": outcome.dialogs_seen,
        "loss": outcome.loss,
        "recall": measured.overall,
        **{f"recall_{attribute}": share for attribute, share in measured.by_attribute().items()},
        "n_questions": len(facts),
        "train_seconds": round(outcome.seconds, 2),
        "people_digest": people.digest(),
        **provenance(device),
        "config": config.canonical_json(),
    }


def _configuration_columns(config: RunConfig, people: People) -> dict:
    """What tables and figures group by; the whole configuration is in the column `config`."""
    return {
        "mode": config.mode,
        "n_people": len(people),
        "n_facts": people.n_facts,
        "alpha": config.facts.alpha,
        "seed": config.seed,
        "d_model": config.model.d_model,
        "optimizer": config.optim.name,
        "lr": config.optim.lr,
        "batch_size": config.training.batch_size,
        "dtype": config.training.dtype,
    }


def _check_claim(directory: Path, config: RunConfig, people: People) -> None:
    """Raise `InputError` unless `directory` is this run's, or free: what begins with a dot does not count."""
    if (directory / CLAIM).exists():
        if _read_claim(directory) != (config, people.digest()):
            raise InputError(f"{directory} holds a run of another configuration or other people: give another folder")
    elif directory.exists() and not directory.is_dir():
        raise InputError(f"{directory} is a file: give a new folder")
    elif directory.exists() and any(not path.name.startswith(".") for path in directory.iterdir()):
        raise InputError(f"{directory} is not empty and holds no run: give a new folder")


def _read_claim(directory: Path) -> tuple[RunConfig, str]:
    """The configuration and the people's digest that a run's folder was claimed with."""
    try:
        claim = json.loads((directory / CLAIM).read_text())
        return RunConfig.parse(claim["config"]), claim["people_digest"]
    except (OSError, ValueError, KeyError, TypeError):  # `InputError` among them: fields of another version
        raise InputError(f"{directory} is not the folder of a run ({CLAIM} is missing or not readable)") from None


def save_model(model: Transformer, folder: Path, config: RunConfig) -> None:
    """Write the weights alone, with the configuration that made them."""
    checkpoint.save(folder, model.state_dict(), {"config": config.model_dump(mode="json")})


def load_model(folder: Path, device: str = "auto") -> tuple[Transformer, RunConfig]:
    """The model of a run's folder, or of a folder that `save_model` wrote, ready to be asked."""
    folder = Path(folder)
    if (folder / MODEL).is_dir():
        folder = folder / MODEL
    device = resolve_device(device)
    tensors, state = checkpoint.load(folder)
    config = RunConfig.parse(state["config"])
    model = Transformer(config.model)
    try:
        model.load_state_dict(tensors)
    except RuntimeError:
        raise InputError(f"the weights in {folder} do not fit its configuration of the model") from None
    return model.to(device).eval(), config


def resolve_device(device: str) -> torch.device:
    """`auto` is CUDA where there is one; a device that this machine does not have is an `InputError`."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        probe = torch.zeros(1, device=device)
        probe.item()  # "meta" fails here
        return probe.device
    except (RuntimeError, AssertionError, NotImplementedError):
        raise InputError(f"this machine has no device {device!r}: use auto or cpu") from None


def provenance(device: torch.device) -> dict:
    """Where a number comes from: time, machine, versions, commit."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": f"{device.type} ({name})",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit(),
    }


@cache
def commit() -> str:
    """The commit of the code, marked `-dirty` if lib differs from it; `unknown` outside a git checkout."""
    try:
        head = _git("rev-parse", "HEAD")
        return f"{head}-dirty" if _git("status", "--porcelain", "--", "lib") else head
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(paths.ROOT), *arguments], capture_output=True, text=True, check=True
    ).stdout.strip()


def write_json(path: Path, content: dict) -> None:
    """Write JSON under a temporary name, then rename: the file is whole or absent."""
    with paths.replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1))
