"""A trained model ready to be talked to: weights, tokenizer and, in-tool, its database."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lib.base import InputError
from lib.config import RunConfig
from lib.dialogs import Role, Tokenizer, question
from lib.facts import load_people
from lib.generation import chat
from lib.model import Transformer
from lib.run import DATABASE, load_model
from lib.tokenizers import run_tokenizer
from lib.tools import SqlTool


@dataclass(frozen=True)
class Conversation:
    """What `open_conversation` opens."""

    model: Transformer
    config: RunConfig
    tokenizer: Tokenizer
    tool: SqlTool | None
    database: Path | None

    @property
    def example(self) -> str:
        """A question about someone whom the model was trained on."""
        name, attribute, _ = next(load_people(self.config.facts).facts())
        return question(name, attribute)

    def ask(self, text: str, **options) -> Iterator[tuple[Role, str]]:
        """The answer, streamed as `generation.chat` does; `options` are those of `generation.stream`."""
        return chat(self.model, text, self.tokenizer, self.tool, **options)


@contextmanager
def open_conversation(folder: Path, database: Path | None = None, device: str = "auto") -> Iterator[Conversation]:
    """Load a run's model; an in-tool model asks `database`, by default the one in the run's folder.

    Raises `InputError` if the checkpoint or the database is missing or damaged, or an in-weight model is given one.
    """
    folder = Path(folder)
    model, config = load_model(folder, device)
    tokenizer = run_tokenizer(config)
    if config.mode == "in-weight":
        if database:
            raise InputError(f"the model in {folder} is in-weight and asks no database: leave {database} out")
        yield Conversation(model, config, tokenizer, None, None)
        return
    database = Path(database) if database else folder / DATABASE
    with SqlTool(database) as tool:
        yield Conversation(model, config, tokenizer, tool, database)
