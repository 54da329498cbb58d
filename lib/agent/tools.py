"""Tools that a model may use: the protocol, the SQL tools, and a calculator."""

import re
import sqlite3
from collections.abc import Iterable
from contextlib import AbstractContextManager, closing
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import NamedTuple, Protocol

from lib.base import InputError
from lib.dialogs.request import fenced_line, format_request, parse_request
from lib.facts.database import add_people, attribute_columns, change_fact, quoted
from lib.facts.people import People
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


class Tool(Protocol):
    """Answers an assistant's whole turn, prose and fenced request; no turn makes it raise an error."""

    def __call__(self, turn: str) -> Response: ...


#: Reading tables, recursively too. Everything else is refused: writing, ATTACH, PRAGMA, VACUUM, even functions.
_READS = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_RECURSIVE}


class ReadOnlyConnection(sqlite3.Connection):
    """A SQLite connection that can only read, see `connect_read_only`."""

    time_budget: float
    deadline: float

    def execute(self, *arguments) -> sqlite3.Cursor:
        """Run one statement; it has `time_budget` seconds from now on, which include fetching its rows."""
        self.deadline = monotonic() + self.time_budget
        return super().execute(*arguments)


def connect_read_only(path: str | Path, time_budget: float = 1.0) -> ReadOnlyConnection:
    """Open a database so that no SQL can change a file, create one, or run for long.

    `mode=ro` is not enough: ATTACH and VACUUM INTO would still create files. So an authorizer allows only reads,
    intermediate results stay in memory and are limited in size, and a statement that runs for more than `time_budget`
    seconds ends in an OperationalError whose `sqlite_errorname` is SQLITE_INTERRUPT. From the first read until the
    connection is closed nobody else can write. (A database in WAL mode keeps SQLite's two side files.)

    Raises `InputError` if there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no database {path}")
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode=ro",
        timeout=time_budget,
        isolation_level=None,
        factory=ReadOnlyConnection,
        uri=True,
    )
    connection.time_budget = time_budget
    connection.execute("PRAGMA temp_store = MEMORY")
    connection.execute("BEGIN")  # all reads see one state; locking the file for each would take most of the time
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 1_000_000)
    connection.set_progress_handler(lambda: monotonic() > connection.deadline, 10_000)
    connection.set_authorizer(lambda action, *_: sqlite3.SQLITE_OK if action in _READS else sqlite3.SQLITE_DENY)
    return connection


class Closing(AbstractContextManager):
    """Something that its `with` block closes in the end."""

    def close(self) -> None:
        raise NotImplementedError

    def __exit__(self, *_) -> None:
        self.close()


class SqlTool(Closing):
    """Answers `FIND <attribute> FOR <name>` from the table `people` of a SQLite database, which it only reads.

    The model's words never become SQL: the name is bound as a parameter, and the attribute picks one of the queries
    prepared here, one for each column besides `name`. `n_queries` counts the queries that really ran.

    Raises `InputError` if the database is missing, locked or no database, or lacks the table, the names or one of the
    `attributes`; also when asked, if the database can no longer be read.
    """

    def __init__(self, path: str | Path, attributes: Iterable[str] = (), time_budget: float = 1.0):
        self.path = path
        self.n_queries = 0
        self.connection = connect_read_only(path, time_budget)
        try:
            self.attributes = tuple(attribute_columns(self.connection))
        except sqlite3.Error as error:
            self.close()
            raise self._unreadable(error) from None
        for attribute in attributes:
            if attribute not in self.attributes:
                self.close()
                raise InputError(f"unknown attribute {attribute!r}: {path} has {', '.join(self.attributes)}")
        # Qualified, because SQLite takes a quoted name that is no column for a string.
        self._queries = {a: f"SELECT people.{quoted(a)} FROM people WHERE people.name = ?" for a in self.attributes}

    def __call__(self, turn: str) -> Response:
        request = parse_request(turn)
        return _error(Outcome.MALFORMED) if request is None else self.find(request.attribute, request.name)

    def find(self, attribute: str, name: str) -> Response:
        """Answer a request that is parsed already."""
        query = self._queries.get(attribute)
        if query is None:
            return _error(Outcome.UNKNOWN_ATTRIBUTE)
        self.n_queries += 1
        try:
            (value,) = self.connection.execute(query, (name,)).fetchone() or (None,)
        except (UnicodeEncodeError, sqlite3.DataError):  # half a surrogate pair, or endless: nobody's name
            value = None
        except sqlite3.Error as error:
            if error.sqlite_errorname == "SQLITE_INTERRUPT":
                return _error(Outcome.TIMEOUT)
            raise self._unreadable(error) from None
        return _error(Outcome.NO_MATCH) if value is None else Response(Outcome.ANSWER, str(value))

    def _unreadable(self, error: sqlite3.Error) -> InputError:
        return InputError(f"cannot read people from the database {self.path}: {error}")

    def close(self) -> None:
        self.connection.close()


class EditableTool(Closing):
    """A `SqlTool` on a copy of a database that may be changed; the database itself is only read.

    `close`, or else the end of the process, deletes the copy.
    Raises `InputError` for a database that `SqlTool` refuses.
    """

    def __init__(self, path: str | Path):
        self._folder = TemporaryDirectory(prefix="itl-")
        self.path = Path(self._folder.name) / DATABASE
        with SqlTool(path) as tool, closing(sqlite3.connect(self.path)) as copy:
            self.attributes = tool.attributes
            tool.connection.backup(copy)

    def __call__(self, turn: str) -> Response:
        with SqlTool(self.path) as tool:  # opened anew: as long as one is open, nobody can write
            return tool(turn)

    def add(self, people: People) -> None:
        """Apply `add_people` to the copy."""
        add_people(people, self.path)

    def change(self, name: str, attribute: str, value: str) -> str:
        """Apply `change_fact` to the copy."""
        return change_fact(self.path, name, attribute, value)

    def facts(self, name: str) -> dict[str, str]:
        """Return what the copy says about a person, by attribute; nothing about an unknown one."""
        answers = {attribute: self(format_request(attribute, name)) for attribute in self.attributes}
        return {attribute: answer.text for attribute, answer in answers.items() if answer.ok}

    def close(self) -> None:
        self._folder.cleanup()


class CalculatorTool:
    """Computes ages: an example of how little a tool needs, `__call__` and outcomes for what it cannot do.

    A request is `AGE 12/3/1970 ON 1/1/2020`, in a block fenced as calc.
    """

    def __call__(self, turn: str) -> Response:
        match = re.fullmatch("AGE ([0-9/]+) ON ([0-9/]+)", fenced_line(turn, "calc"))
        try:
            born, on = (datetime.strptime(text, "%d/%m/%Y") for text in (match.groups() if match else ()))
        except ValueError:  # no two dates
            return _error(Outcome.MALFORMED)
        years = on.year - born.year - ((on.month, on.day) < (born.month, born.day))
        return Response(Outcome.ANSWER, str(years)) if years >= 0 else _error(Outcome.NO_MATCH)
