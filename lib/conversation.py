"""A trained model ready to be talked to: weights, tokenizer and, in-tool, its database."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from operator import itemgetter
from pathlib import Path

from lib.base import InputError
from lib.config import RunConfig
from lib.dialogs import Role, Tokenizer, Turn, question
from lib.facts import People, unseen_people
from lib.generation import chat
from lib.model import Transformer
from lib.run import DATABASE, load_model, own_files, read_people
from lib.tokenizers import run_tokenizer
from lib.tools import EditableTool, SqlTool


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
