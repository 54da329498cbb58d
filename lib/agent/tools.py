"""Tools that a model may use: the protocol, and the SQL tools."""

import sqlite3
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from enum import StrEnum
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from lib.base import check_known, optional
from lib.dialogs.chains import chain_dialog
from lib.dialogs.request import parse_request
from lib.facts import database
from lib.facts.database import connect_read_only, quoted, refusing
from lib.facts.people import People, comparable
from lib.paths import DATABASE


class Outcome(StrEnum):
    """The outcome of a request."""

    ANSWER = "answer"
    NO_MATCH = "no match"
    MALFORMED = "malformed"
    UNKNOWN_ATTRIBUTE = "unknown attribute"
    TIMEOUT = "timeout"


class Response(NamedTuple):
    """A tool's answer: `text` is what the model reads, the value alone if `ok`."""

    outcome: Outcome
    text: str

    @property
    def ok(self) -> bool:
        return self.outcome is Outcome.ANSWER


#: What the model reads in place of an answer. Each has two lines and so cannot be a value, which has one.
ERROR_TEXTS = {
    Outcome.NO_MATCH: "ERROR\nNothing matches this request.",
    Outcome.MALFORMED: "ERROR\nThis is not a request.",
    Outcome.UNKNOWN_ATTRIBUTE: "ERROR\nThis cannot be asked for.",
    Outcome.TIMEOUT: "ERROR\nThis took too long.",
}


def _error(outcome: Outcome) -> Response:
    return Response(outcome, ERROR_TEXTS[outcome])


#: Answers an assistant's whole turn, prose and fenced request. No turn makes it raise.
Tool = Callable[[str], Response]


class PeopleTool:
    """The dialogs and requests of tools that look up people, as `lib.evaluation.recall` reads them."""

    #: Maps facts to the dialog that looks them up, one after the other.
    dialog = staticmethod(chain_dialog)
    #: Maps a turn to the request at its end, or None. Turns that ask for the same thing give equal requests.
    parse = staticmethod(parse_request)


class SqlTool(PeopleTool, AbstractContextManager):
    """Answers `FIND <attribute> FOR <name>` from the table `people` of a SQLite database, which it only reads.

    The model's words never become SQL: the name is bound as a parameter, and the attribute picks one of the queries
    prepared here, one for each column besides `name`. `n_queries` counts the queries that really ran.

    Raises `InputError` if the file is missing, locked or not a database, or lacks the table, the names or one of the
    `attributes`; calls raise it too if the database can no longer be read.
    """

    def __init__(self, path: str | Path, attributes: Iterable[str] = (), time_budget: float = 1.0):
        self.path = path
        self.n_queries = 0
        with ExitStack() as stack, refusing("read people from", path):
            self.connection = stack.enter_context(closing(connect_read_only(path, time_budget)))
            self.attributes = tuple(database.attribute_columns(self.connection))
            for attribute in attributes:
                check_known("attribute", attribute, self.attributes, f" of {path}")
            stack.pop_all()
        # Qualified, because SQLite reads a quoted name that is not a column as a string.
        self._queries = {a: f"SELECT people.{quoted(a)} FROM people WHERE people.name = ?" for a in self.attributes}

    def __call__(self, turn: str) -> Response:
        request = parse_request(turn)
        return _error(Outcome.MALFORMED) if request is None else self.find(request.attribute, request.name)

    def find(self, attribute: str, name: str) -> Response:
        """Answer a parsed request."""
        query = self._queries.get(attribute)
        if query is None:
            return _error(Outcome.UNKNOWN_ATTRIBUTE)
        self.n_queries += 1
        try:
            (value,) = self.connection.execute(query, (name,)).fetchone() or (None,)
        except (UnicodeEncodeError, sqlite3.DataError):  # a lone surrogate, or too long: no name in the table
            value = None
        except (sqlite3.Error, UnicodeError) as error:
            if database.interrupted(error):
                return _error(Outcome.TIMEOUT)
            with refusing("read people from", self.path):
                raise
        # NULL and BLOB cells have no text.
        return _error(Outcome.NO_MATCH) if isinstance(value, bytes | None) else Response(Outcome.ANSWER, str(value))

    def find_spelled(self, attribute: str, name: str) -> Response:
        """Answer as `find` does. If it finds nobody, try the `comparable` form of the name.

        For names that users type. It takes one more query; `lib.facts.database.spelling` would read all names.
        """
        response = self.find(attribute, name)
        return response if response.outcome is not Outcome.NO_MATCH else self.find(attribute, comparable(name))

    def close(self) -> None:
        """Close the database, as the end of a `with` block does."""
        self.connection.close()

    def __exit__(self, *_) -> None:
        self.close()


class ForgivingTool(PeopleTool):
    """A `SqlTool` that, where nobody has the name asked for, answers for the nearest name (Section 7, our own).

    edits: the most letters to insert, delete or replace; of two names equally near, neither is a match. It needs the
    package rapidfuzz, which the extra [serve] installs.
    """

    def __init__(self, tool: SqlTool, edits: int):
        rapidfuzz = optional("rapidfuzz", "serve", "a forgiving tool needs the package rapidfuzz")
        with refusing("read people from", tool.path):
            names = tool.connection.execute("SELECT people.name FROM people")
            names = [name for (name,) in names if isinstance(name, str)]
        options = {"scorer": rapidfuzz.distance.Levenshtein.distance, "score_cutoff": edits, "limit": 2}
        self.tool, self._nearest = tool, partial(rapidfuzz.process.extract, choices=names, **options)

    def __call__(self, turn: str) -> Response:
        response, request = self.tool(turn), parse_request(turn)
        if request is None or response.outcome is not Outcome.NO_MATCH:
            return response
        near = self._nearest(request.name)
        if not near or (len(near) == 2 and near[0][1] == near[1][1]):
            return response
        return self.tool.find(request.attribute, near[0][0])


class EditableTool(AbstractContextManager):
    """A tool on a copy of a database's people that may be changed; the database itself is only read.

    kind: the class that answers, one of `TOOLS`. The end of the `with` block, or of the process, deletes the copy.
    Raises `InputError` for a database that `SqlTool` refuses or that cannot be copied.
    """

    def __init__(self, path: str | Path, kind: type[SqlTool] = SqlTool):
        self.kind = kind
        with SqlTool(path) as tool, ExitStack() as stack, refusing("copy", path):
            self.attributes = tool.attributes
            self._folder = TemporaryDirectory(prefix="itl-")
            stack.callback(self._folder.cleanup)
            self.path = Path(self._folder.name) / DATABASE
            database.copy_people(tool.connection, tool.attributes, self.path)
            stack.pop_all()

    def __call__(self, turn: str) -> Response:
        with self.kind(self.path) as tool:  # opened anew: as long as one is open, nobody can write
            return tool(turn)

    def add(self, people: People) -> None:
        """Apply `add_people` to the copy."""
        database.add_people(people, self.path)

    def change(self, name: str, attribute: str, value: str) -> str:
        """Apply `change_fact` to the copy."""
        return database.change_fact(self.path, name, attribute, value)

    def facts(self, name: str) -> dict[str, str]:
        """Return a person's facts in the copy, by attribute; none for an unknown person."""
        with SqlTool(self.path, time_budget=database.WHOLE_TABLE) as tool, refusing("read people from", self.path):
            name = database.spelling(tool.connection, name)
            answers = {attribute: tool.find(attribute, name) for attribute in self.attributes}
        return {attribute: answer.text for attribute, answer in answers.items() if answer.ok}

    def __exit__(self, *_) -> None:
        self._folder.cleanup()


#: The tools that models are trained to use, by mode: each opens a database of people, has `dialog` and `parse` (as
#: `PeopleTool` does), and counts in `n_queries` what it looked up.
TOOLS = {"in-tool": SqlTool}


def open_tool(mode: str, database: Path) -> AbstractContextManager:
    """Return the tool that models of a mode use, to be closed by `with`; None for those that use none."""
    return TOOLS[mode](database) if mode in TOOLS else nullcontext()
