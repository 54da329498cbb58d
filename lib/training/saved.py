"""A run's folder opened again: its people, tokenizer and model, to ask and to talk to."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from operator import itemgetter
from pathlib import Path

from lib.agent.generation import chat
from lib.agent.tools import EditableTool, SqlTool
from lib.base import InputError
from lib.config import RunConfig
from lib.dialogs.templates import Role, Turn, question
from lib.dialogs.tokenizers import Tokenizer, load_tokenizer
from lib.facts.people import People
from lib.facts.sampling import load_people, unseen_people
from lib.model.transformer import Transformer
from lib.paths import CLAIM, DATABASE, MODEL, PEOPLE, ROW, TOKENIZER
from lib.training import checkpoint
from lib.training.devices import resolve_device

#: Configuration, digest of the people, tokens of the files by path, name of the tokenizer.
_Identity = tuple[RunConfig, str, dict[str, str], str]


def read_claim(directory: Path) -> _Identity:
    """What a run's folder was claimed with."""
    try:
        claim = json.loads((directory / CLAIM).read_text())
        config = RunConfig.parse(claim["config"])
        return config, claim["people_digest"], claim.get("files", {}), claim.get("tokenizer", "bytes")
    except (OSError, ValueError, KeyError, TypeError):  # `InputError` among them: fields of another version
        raise InputError(f"{directory} is not the folder of a run ({CLAIM} is missing or not readable)") from None


def _located(config: RunConfig, inputs: Mapping[str, str]) -> RunConfig:
    """`config` with its people and tokens where they lie now, by the paths that it names them by."""
    facts = config.facts.model_copy(update={"csv": inputs.get(config.facts.csv, config.facts.csv)})
    return config.model_copy(update={"facts": facts, "tokenizer": inputs.get(config.tokenizer, config.tokenizer)})


def _own_paths(directory: Path, config: RunConfig) -> dict[str, Path]:
    """Where a run's folder has its copies of people and tokens, by the paths that the configuration names."""
    own = {}
    if config.facts.csv is not None:
        own[config.facts.csv] = directory / PEOPLE
    if config.tokenizer != "bytes":
        kind = ".tiktoken" if config.tokenizer.endswith(".tiktoken") else ".json"
        own[config.tokenizer] = directory / f"{TOKENIZER}{kind}"
    return own


def own_files(folder: Path, config: RunConfig) -> RunConfig:
    """`config` with the copies that a run's folder, or that of its model, has in place of the files that it names."""
    own = _own_paths(_run_folder(folder), config)
    return _located(config, {path: str(copy) for path, copy in own.items() if copy.exists()})


def _run_folder(folder: Path) -> Path:
    """The folder of the run whose folder, or whose model's folder, that is."""
    return folder.parent if folder.name == MODEL and (folder.parent / CLAIM).exists() else folder


def read_people(folder: Path, config: RunConfig) -> People:
    """Whom the model in a run's folder was trained on, whatever has become of the file that they came from.

    Raises `InputError` if that cannot be told: the folder has no copy, and the file is gone or holds others.
    """
    directory = _run_folder(Path(folder))
    people = load_people(own_files(directory, config).facts)
    for record in (CLAIM, ROW):
        with suppress(OSError, ValueError, KeyError, TypeError):
            if json.loads((directory / record).read_text())["people_digest"] != people.digest():
                break
    else:
        return people
    raise InputError(
        f"{config.facts.csv or 'this version'} holds other people now than the run in {folder} is about: restore it"
    )


def save_model(model: Transformer, folder: Path, config: RunConfig, tokenizer: str = "bytes") -> None:
    """Write the weights alone, with the configuration that made them and the name of its tokenizer."""
    checkpoint.save(folder, model.state_dict(), {"config": config.model_dump(mode="json"), "tokenizer": tokenizer})


def load_model(folder: Path, device: str = "auto") -> tuple[Transformer, RunConfig]:
    """The model of a run's folder, or of a folder that `save_model` wrote, ready to be asked."""
    home = folder = Path(folder)
    if (folder / MODEL).is_dir():
        folder = folder / MODEL
    device = resolve_device(device)
    tensors, state = checkpoint.load(folder)
    config = RunConfig.parse(state["config"])
    if run_tokenizer(own_files(home, config)).name != state.get("tokenizer", "bytes"):
        raise InputError(f"{config.tokenizer} is not what the model in {folder} was trained with: give that file again")
    model = Transformer(config.model)
    try:
        model.load_state_dict(tensors)
    except RuntimeError:
        raise InputError(f"the weights in {folder} do not fit its configuration of the model") from None
    return model.to(device).eval(), config


def run_tokenizer(config: RunConfig) -> Tokenizer:
    """The tokenizer of a run; an `InputError` if its model has not as many tokens as the file."""
    tokenizer, vocab_size = load_tokenizer(config.tokenizer), config.model.vocab_size
    if config.tokenizer != "bytes" and vocab_size != tokenizer.vocab_size:
        raise InputError(
            f"model.vocab_size = {vocab_size}, but {config.tokenizer} has {tokenizer.vocab_size} tokens, the four "
            f"special ones included: set model.vocab_size to {tokenizer.vocab_size}"
        )
    return tokenizer


@dataclass(frozen=True)
class Conversation:
    """What `open_conversation` opens."""

    folder: Path
    model: Transformer
    config: RunConfig
    tokenizer: Tokenizer
    tool: SqlTool | EditableTool | None
    database: Path | None

    @cached_property
    def people(self) -> People:
        """Whom the model was trained on. Raises `InputError` as `read_people` does."""
        return read_people(self.folder, self.config)

    @property
    def example(self) -> str:
        """A question about someone whom the model was trained on."""
        name, attribute, _ = next(self.people.facts())
        return question(name, attribute)

    def strangers(self, n: int = 3) -> People:
        """People of wholly new names, on neither of which a model is trained; nobody if this one learned a file."""
        facts = self.config.facts
        return unseen_people(facts, n)["new_both"] if facts.csv is None else People([], {})

    def ask(self, text: str, **options) -> Iterator[tuple[Role, str]]:
        """The answer, streamed as `generation.chat` does; `options` are those of `generation.stream`."""
        return chat(self.model, text, self.tokenizer, self.tool, **options)

    def turns(self, text: str, **options) -> list[Turn]:
        """The question and what follows it, turn by turn; `options` as for `ask`."""
        answer = groupby(self.ask(text, **options), key=itemgetter(0))
        return [Turn(Role.USER, text), *(Turn(role, "".join(piece for _, piece in said)) for role, said in answer)]


@contextmanager
def open_conversation(
    folder: Path, database: Path | None = None, device: str = "auto", editable: bool = False
) -> Iterator[Conversation]:
    """Load a run's model; an in-tool model asks `database`, by default the one in the run's folder.

    With `editable` it asks a copy of that, and its tool is an `EditableTool`. Raises `InputError` if the checkpoint or
    the database is missing or damaged, or an in-weight model is given one.
    """
    folder = Path(folder)
    model, config = load_model(folder, device)
    tokenizer = run_tokenizer(own_files(folder, config))
    if config.mode == "in-weight":
        if database:
            raise InputError(f"the model in {folder} is in-weight and asks no database: leave {database} out")
        yield Conversation(folder, model, config, tokenizer, None, None)
        return
    database = Path(database) if database else folder / DATABASE
    with (EditableTool if editable else SqlTool)(database) as tool:
        yield Conversation(folder, model, config, tokenizer, tool, Path(tool.path))
