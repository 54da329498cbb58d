"""A run's folder: claimed for one configuration, locked while it trains, and reopened for questions and chat."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch

from lib.agent.generation import generate
from lib.agent.tools import TOOLS, EditableTool, Tool, open_tool
from lib.base import DamagedFile, InputError
from lib.config import ModelConfig, RunConfig
from lib.dialogs.templates import Role, Turn, question
from lib.dialogs.tokenizers import Tokenizer, load_tokenizer
from lib.dialogs.tokens import encode_prompt
from lib.facts.people import People
from lib.facts.sampling import load_people, unseen_people
from lib.model.transformer import Transformer
from lib.paths import CLAIM, DATABASE, MODEL, PEOPLE, ROW, TOKENIZER, only_process, read_json, reading
from lib.training import checkpoint
from lib.training.devices import resolve_device

#: Maximum tokens of a question: the memory of attention is quadratic in the length.
LONGEST_QUESTION = 8192

# Claims ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Claim:
    """The identity of a run (configuration, and hashes of what its files hold), and its number of threads."""

    config: RunConfig
    people_digest: str
    files: dict[str, str] = field(default_factory=dict)  # hashes of dialog files, by their paths
    tokenizer: str = "bytes"
    threads: int | None = field(default=None, compare=False)  # None in claims of earlier versions

    def __post_init__(self) -> None:
        if self.threads not in (None, *range(1, 1025)):
            raise InputError(f"threads = {self.threads}: a run takes at least one, and at most 1,024")


def read_claim(directory: Path) -> Claim:
    """Return the claim in a run's folder; an `InputError` if there is none."""
    try:
        claim = read_json(directory / CLAIM)
        return Claim(**{**claim, "config": RunConfig.parse(claim["config"])})
    except (OSError, DamagedFile, ValueError, KeyError, TypeError):  # or fields of another version
        raise InputError(f"{directory} is not the folder of a run ({CLAIM} is missing or not readable)") from None


def check_claim(
    directory: Path,
    claim: Any,
    read: Callable[[Path], Any] = read_claim,
    others: str = "people or dialogs or another tokenizer",
) -> None:
    """Raise `InputError` unless `directory` has this claim, or is empty except for hidden files.

    read: gives the claim in a folder. others: what a claim names besides the configuration.
    """
    if os.path.exists(directory / CLAIM):  # for a name that is too long `Path.exists` raises an error
        if read(directory) != claim:
            raise InputError(f"{directory} holds a run of another configuration or other {others}: give another folder")
    elif os.path.isdir(directory) and any(not path.name.startswith(".") for path in directory.iterdir()):
        raise InputError(f"{directory} is not empty and holds no run: give a new folder")


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Make a run's folder and lock it; other processes wait. It is removed at the end unless the context claims it.

    Raises `InputError` if it cannot be made.
    """
    new = [folder for folder in (directory, *directory.parents) if not os.path.exists(folder)]
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {directory}: {error.strerror}") from None
    with only_process(directory / ".lock"):
        try:
            yield
        finally:
            if not (directory / CLAIM).exists():  # the run was refused
                (directory / ".lock").unlink(missing_ok=True)
                with suppress(OSError):  # other files are in one
                    for folder in new:
                        folder.rmdir()


# Files that a configuration names ------------------------------------------------------------------------------------


def located(config: RunConfig, inputs: Mapping[str, str]) -> RunConfig:
    """Return `config` with the current paths of people and tokenizer; `inputs` maps the configured paths to these."""
    facts = config.facts.model_copy(update={"csv": inputs.get(config.facts.csv, config.facts.csv)})
    return config.model_copy(update={"facts": facts, "tokenizer": inputs.get(config.tokenizer, config.tokenizer)})


def own_files(folder: Path, config: RunConfig) -> RunConfig:
    """Return `config` with paths of a run's own copies in place of those that it names.

    folder: of the run, or of its model.
    """
    directory = _run_folder(folder)
    kind = ".tiktoken" if config.tokenizer.endswith(".tiktoken") else ".json"
    copies = {config.facts.csv: f"{directory / PEOPLE}", config.tokenizer: f"{directory / TOKENIZER}{kind}"}
    return located(config, {path: copy for path, copy in copies.items() if path not in (None, "bytes")})


def _run_folder(folder: Path) -> Path:
    """Return the run's folder, given that folder or its `model/`."""
    return folder.parent if folder.name == MODEL and (folder.parent / CLAIM).exists() else folder


def read_people(folder: Path, config: RunConfig) -> People:
    """Return the people that the model in a run's folder was trained on, from the run's copy of their file.

    Raises `InputError` if the copy is missing or has changed.
    """
    home = _run_folder(Path(folder))
    people = load_people(own_files(home, config).facts)
    digests = (read_json(file).get("people_digest") for file in (home / CLAIM, home / ROW) if file.exists())
    if any(digest not in (None, people.digest()) for digest in digests):
        source = own_files(home, config).facts.csv or "this version of the code"
        raise InputError(f"the run in {folder} was trained on other people than {source} gives now: restore them")
    return people


def run_tokenizer(config: RunConfig) -> Tokenizer:
    """Return the tokenizer of a run; an `InputError` if the model's vocabulary differs in size."""
    tokenizer, vocab_size = load_tokenizer(config.tokenizer), config.model.vocab_size
    if config.tokenizer != "bytes" and vocab_size != tokenizer.vocab_size:
        size = f"{tokenizer.vocab_size}: the tokens of {config.tokenizer}, four special ones included"
        raise InputError(f"model.vocab_size = {vocab_size} must be {size}")
    return tokenizer


# Models ---------------------------------------------------------------------------------------------------------------


def save_model(model: Transformer, folder: Path, config: RunConfig, tokenizer: str = "bytes") -> None:
    """Write the weights alone, with the configuration that made them and the name of its tokenizer."""
    checkpoint.save(folder, model.state_dict(), {"config": config.model_dump(mode="json"), "tokenizer": tokenizer})


def load_model(folder: Path, device: str = "auto") -> tuple[Transformer, RunConfig]:
    """Return the model of a run's folder, or of a folder that `save_model` wrote, ready to be asked.

    Raises `InputError` if the run is not finished, the weights are missing or damaged, or the tokenizer is not the one
    they were trained with.
    """
    home = folder = Path(folder)
    if (folder / MODEL).is_dir():
        folder = folder / MODEL
    elif (folder / CLAIM).exists():
        raise InputError(f"the run in {folder} is not finished: the command that began it resumes it")
    device = resolve_device(device)
    tensors, state = checkpoint.load(folder)
    with reading(f"the checkpoint {folder}"):
        config = RunConfig.parse(state.get("config"))
    own = own_files(home, config)
    if run_tokenizer(own).name != state.get("tokenizer", "bytes"):
        raise InputError(f"{own.tokenizer} is not what the model in {folder} was trained with: restore the old file")
    return with_weights(config.model, tensors, folder).to(device).eval(), config


def with_weights(config: ModelConfig, tensors: dict[str, torch.Tensor], folder: Path) -> Transformer:
    """Return a model with the weights of a checkpoint; an `InputError` names the folder if they do not fit."""
    with torch.device("meta"):
        model = Transformer(config)
    try:
        model.load_state_dict(tensors, assign=True)
    except RuntimeError as error:  # other names, shapes or types
        problem = f"its tensors do not fit its configuration: {shorten(str(error), 300)}"
        raise InputError(f"cannot read the checkpoint {folder}: {problem}") from None
    return model


# Conversations --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Conversation:
    """A run's model with its tokenizer and tool, see `open_conversation`."""

    folder: Path
    model: Transformer
    config: RunConfig
    tokenizer: Tokenizer
    tool: Tool | None

    @cached_property
    def people(self) -> People:
        """The people that the model was trained on. Raises `InputError` as `read_people` does."""
        return read_people(self.folder, self.config)

    @property
    def example(self) -> str:
        """A question about someone that the model was trained on."""
        return question(*next(self.people.facts())[:2])

    def unseen(self) -> People:
        """Return three unseen people with new first and last names; nobody if the run's people came from a CSV file."""
        facts = self.config.facts
        return unseen_people(facts, 3)["new_both"] if facts.csv is None else People([], {})

    def turns(self, text: str, **options) -> list[Turn]:
        """Return the question and what follows it, turn by turn; `options` are those of `generate`.

        Raises `InputError` for a question that is too long or holds a lone surrogate.
        """
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise InputError("the question holds a lone surrogate (half a character): leave it out")
        asked = Turn(Role.USER, text)
        prompt = encode_prompt([asked], self.tokenizer)
        if len(prompt) > LONGEST_QUESTION:
            raise InputError(f"the question has {len(prompt):,} tokens: at most {LONGEST_QUESTION:,} are accepted")
        (answer,) = generate(self.model, [prompt], self.tokenizer, self.tool, **options)
        return [asked, *answer.turns(self.tokenizer)]


@contextmanager
def open_conversation(
    folder: Path, database: Path | None = None, device: str = "auto", editable: bool = False
) -> Iterator[Conversation]:
    """Load a run's model; an in-tool model asks `database`, by default the one in the run's folder.

    With `editable` it asks a copy of this database, and its tool is an `EditableTool`. Raises `InputError` if the
    checkpoint or the database is missing or damaged, or if an in-weight model gets a database.
    """
    folder = Path(folder)
    model, config = load_model(folder, device)
    tokenizer, asks = run_tokenizer(own_files(folder, config)), config.mode in TOOLS
    if database and not asks:
        raise InputError(f"the model in {folder} is in-weight and asks no database: leave {database} out")
    path = Path(database or folder / DATABASE)
    with EditableTool(path, TOOLS[config.mode]) if editable and asks else open_tool(config.mode, path) as tool:
        yield Conversation(folder, model, config, tokenizer, tool)
