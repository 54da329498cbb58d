"""Tools that a model may use: the protocol, the request language, the SQL tools, and a calculator.

A request is the last three lines of the assistant's turn; any prose may stand before them:

    ```sql
    FIND <attribute> FOR <name>
    ```

The attribute is one word without blanks; the name is all the rest of the line, whatever it holds. Nothing follows
the closing fence. Everything else is malformed.
"""

import re
import sqlite3
from collections.abc import Iterable
from contextlib import closing
from datetime import date
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import NamedTuple, Protocol, Self

from lib.base import InputError
from lib.dialogs.request import _fenced_line, format_request, parse_request
from lib.facts.database import add_people, change_fact
from lib.facts.people import People


class Outcome(StrEnum):
    """What became of a request."""

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


#: What the model reads where there is no answer. Two lines each, so that none can be a value, which has one.
ERROR_TEXTS = {
    Outcome.NO_MATCH: "ERROR\nNothing matches this request.",
    Outcome.MALFORMED: "ERROR\nThis is not a request.",
    Outcome.UNKNOWN_ATTRIBUTE: "ERROR\nThis cannot be asked for.",
    Outcome.TIMEOUT: "ERROR\nThis took too long.",
}


def _error(outcome: Outcome) -> Response:
    return Response(outcome, ERROR_TEXTS[outcome])


class Tool(Protocol):
    """Whatever answers an assistant's whole turn, prose and fenced request, and never raises over what it says."""

    def __call__(self, turn: str) -> Response: ...


# ---- The database

#: Reading tables, recursively too. Everything else is refused: writing, ATTACH, PRAGMA, VACUUM, even functions.
_READS = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_RECURSIVE}


class ReadOnlyConnection(sqlite3.Connection):
    """A SQLite connection that can only read, see `connect_read_only`."""

    time_budget: float
    deadline: float

    def execute(self, *arguments) -> sqlite3.Cursor:
        """Run one statement; it has `time_budget` seconds from now on, the fetching of its rows included."""
        self.deadline = monotonic() + self.time_budget
        return super().execute(*arguments)


def connect_read_only(path: str | Path, time_budget: float = 1.0) -> ReadOnlyConnection:
    """Open a database so that no SQL, whatever it is, can change a file, make one appear, or run for long.

    Opening with `mode=ro` is not enough: ATTACH and VACUUM INTO would still create files. So an authorizer allows
    reads alone, intermediate results stay in memory and are limited in size, and a statement that runs for more than
    `time_budget` seconds ends in an OperationalError whose `sqlite_errorname` is SQLITE_INTERRUPT. From the first read
    until the connection is closed nobody else can write. (A database in WAL mode keeps SQLite's two side files.)

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


class Closing:
    """What is closed at the end of its `with` block."""

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()


class SqlTool(Closing):
    """Answers `FIND <attribute> FOR <name>` from the table `people` of a SQLite database, which it only reads.

    The model's words never become SQL: the name is bound as a parameter, and the attribute picks one of the queries
    prepared here, one for each column besides `name`, or for each of `attributes` if given. `n_queries` counts the
    queries that really ran.

    Raises `InputError` if the database is missing, locked or no database, or lacks the table or a column; also
    when asked, if the database can no longer be read.
    """

    def __init__(self, path: str | Path, attributes: Iterable[str] | None = None, time_budget: float = 1.0):
        self.path = path
        self.n_queries = 0
        self._connection = connect_read_only(path, time_budget)
        try:
            columns = self._columns()
            if "name" not in columns:
                raise InputError(f"the table people of {path} has no column 'name' among {', '.join(columns)}")
            known = [column for column in columns if column != "name"]
            self.attributes = tuple(known if attributes is None else attributes)
            for attribute in self.attributes:
                if attribute not in known:
                    raise InputError(f"unknown attribute {attribute!r}: {path} has {', '.join(known)}")
        except InputError:
            self.close()
            raise
        # Qualified, because SQLite takes a quoted name that is no column for a string.
        quoted = {attribute: attribute.replace('"', '""') for attribute in self.attributes}
        self._queries = {a: f'SELECT people."{q}" FROM people WHERE people.name = ?' for a, q in quoted.items()}

    def __call__(self, turn: str) -> Response:
        request = parse_request(turn)
        if request is None:
            return _error(Outcome.MALFORMED)
        query = self._queries.get(request.attribute)
        if query is None:
            return _error(Outcome.UNKNOWN_ATTRIBUTE)
        self.n_queries += 1
        try:
            (value,) = self._connection.execute(query, (request.name,)).fetchone() or (None,)
        except (UnicodeEncodeError, sqlite3.DataError):  # half a surrogate pair, or endless: nobody's name
            value = None
        except sqlite3.Error as error:
            if error.sqlite_errorname == "SQLITE_INTERRUPT":
                return _error(Outcome.TIMEOUT)
            raise self._unreadable(error) from None
        return _error(Outcome.NO_MATCH) if value is None else Response(Outcome.ANSWER, str(value))

    def _columns(self) -> list[str]:
        try:
            return [column for column, *_ in self._connection.execute("SELECT * FROM people LIMIT 0").description]
        except sqlite3.Error as error:
            raise self._unreadable(error) from None

    def _unreadable(self, error: sqlite3.Error) -> InputError:
        return InputError(f"cannot read people from the database {self.path}: {error}")

    def close(self) -> None:
        self._connection.close()


class EditableTool(Closing):
    """A `SqlTool` on a copy of a database that may be changed; the database itself is only read.

    The copy is in a temporary folder, which `close` deletes, or else the end of the process.
    Raises `InputError` for a database that `SqlTool` refuses.
    """

    def __init__(self, path: str | Path):
        with SqlTool(path) as tool:
            self.attributes = tool.attributes
        self._folder = TemporaryDirectory(prefix="itl-")
        self.path = Path(self._folder.name) / "people.sqlite"
        original = sqlite3.connect(f"{Path(path).absolute().as_uri()}?mode=ro", uri=True)
        with closing(original), closing(sqlite3.connect(self.path)) as copy:
            original.backup(copy)

    def __call__(self, turn: str) -> Response:
        with SqlTool(self.path) as tool:  # opened anew: as long as one is open, nobody can write
            return tool(turn)

    def add(self, people: People) -> None:
        """`facts.add_people`, to the copy."""
        add_people(people, self.path)

    def change(self, name: str, attribute: str, value: str) -> str:
        """`facts.change_fact`, in the copy."""
        return change_fact(self.path, name, attribute, value)

    def facts(self, name: str) -> dict[str, str]:
        """What the copy says about somebody, by attribute; nothing about who is not there."""
        answers = {attribute: self(format_request(attribute, name)) for attribute in self.attributes}
        return {attribute: answer.text for attribute, answer in answers.items() if answer.ok}

    def close(self) -> None:
        self._folder.cleanup()


# ---- A second tool


class CalculatorTool:
    """Reckons with dates, which shows how little a tool takes: `__call__`, and outcomes for what it cannot do.

    A request is `AGE 12/3/1970 ON 1/1/2020` or `YEARS 1970 TO 2020`, in a block fenced as calc.
    """

    _AGE = re.compile(r"AGE ([0-9]{1,2})/([0-9]{1,2})/([0-9]{4}) ON ([0-9]{1,2})/([0-9]{1,2})/([0-9]{4})")
    _YEARS = re.compile(r"YEARS ([0-9]{4}) TO ([0-9]{4})")

    def __call__(self, turn: str) -> Response:
        line = _fenced_line(turn, "calc")
        if match := self._AGE.fullmatch(line):
            years = _age(*map(int, match.groups()))
        elif match := self._YEARS.fullmatch(line):
            years = int(match[2]) - int(match[1])
        else:
            return _error(Outcome.MALFORMED)
        return Response(Outcome.ANSWER, str(years)) if years >= 0 else _error(Outcome.NO_MATCH)


def _age(day: int, month: int, year: int, on_day: int, on_month: int, on_year: int) -> int:
    """Full years between two dates; negative if the second comes first or one of them does not exist."""
    try:
        born, on = date(year, month, day), date(on_year, on_month, on_day)
    except ValueError:
        return -1
    return on.year - born.year - ((on.month, on.day) < (born.month, born.day))
