"""The SQLite database of people: written, opened, copied, changed. A file's content is never trusted."""

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from operator import itemgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic

from lib.base import InputError, WorkError, check_known
from lib.facts.csv import FORBIDDEN, read_people_csv
from lib.facts.people import People, comparable
from lib.paths import DATABASE, replacing

#: Time budget, in seconds, of a statement over all people: copying them, searching their names.
WHOLE_TABLE = 30.0
#: A read-only connection may read tables, also recursively. Writing, ATTACH, PRAGMA, VACUUM and functions are denied.
_READS = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_RECURSIVE}
_BLOCKED = (
    " (another program may be writing to it, or its folder refuses locks and new files: copy it to a local folder)"
)
#: Finds a generated column. SQLite neither denies nor interrupts the functions that compute it.
_COMPUTED = "SELECT 1 FROM sqlite_master m, pragma_table_xinfo(m.name) WHERE sql NOT LIKE 'CREATE V%' AND hidden > 1"
#: Hints that SQLite's messages lack, by error code.
_HINTS = {getattr(sqlite3, f"SQLITE_{code}"): _BLOCKED for code in "BUSY PROTOCOL IOERR CANTOPEN READONLY".split()} | {
    sqlite3.SQLITE_INTERRUPT: " (it took too long)",
    sqlite3.SQLITE_AUTH: " (only a plain table people, without triggers, can be changed)",
}


def write_database(people: People, path: str | Path) -> None:
    """Store people as the SQLite table `people` (key: name, one text column per attribute), replacing the file.

    After an error the file is as it was.
    """
    with refusing("write", path), replacing(Path(path), "the database ") as temporary:
        rows = sorted(people.rows(), key=itemgetter(0))  # sorted by key, the B-tree is filled from left to right
        _fill(temporary, people.attributes, rows, " TEXT NOT NULL", "INSERT")


@contextmanager
def temporary_database(people: People) -> Iterator[Path]:
    """Yield the path of a database of people that is deleted at the end."""
    with TemporaryDirectory(prefix="itl-") as folder:
        write_database(people, path := Path(folder) / DATABASE)
        yield path


@contextmanager
def as_database(file: Path) -> Iterator[Path]:
    """Yield the path of a database: the file itself or, for a CSV file (.csv), a temporary one of its people.

    The database of a CSV file stores the `comparable` form of each name, so that all its spellings are found.
    """
    context = nullcontext(file)
    if file.suffix.lower() == ".csv":
        people = read_people_csv(file)
        context = temporary_database(People([*map(comparable, people.names)], people.columns))
    with context as path:
        yield path


class GuardedConnection(sqlite3.Connection):
    """A SQLite connection whose statements have a time budget, see `connect_read_only`."""

    time_budget: float
    deadline: float

    def execute(self, *arguments) -> sqlite3.Cursor:
        """Run one statement; it has `time_budget` seconds from now on, which include fetching its rows."""
        self.deadline = monotonic() + self.time_budget
        try:
            return super().execute(*arguments)
        except sqlite3.OperationalError as error:
            if interrupted(error) and monotonic() < self.deadline:  # by Ctrl-C, which SQLite does not pass on
                raise KeyboardInterrupt from None
            raise


def connect_read_only(path: str | Path, time_budget: float = 1.0) -> GuardedConnection:
    """Open a database so that no SQL can change a file, create one, or run for long.

    `mode=ro` is not enough: ATTACH and VACUUM INTO would still create files. So an authorizer allows only reads,
    intermediate results stay in memory and are limited in size, and a statement that runs for more than `time_budget`
    seconds ends in an OperationalError whose `sqlite_errorname` is SQLITE_INTERRUPT. From the first read until the
    connection is closed nobody else can write. (In WAL mode others can; two side files stay behind.)

    Raises `InputError` if there is no such file, or if it has generated columns.
    """
    return _connect(path, "ro", time_budget)


def copy_people(source: GuardedConnection, attributes: Sequence[str], path: Path) -> None:
    """Copy the rows of the table or view `people` into a new database, without triggers, views and constraints.

    Cells keep their types. Of people with the same name only the first is copied; people without a name are skipped.
    """
    source.time_budget = WHOLE_TABLE
    source.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 100_000_000)
    columns = ", ".join(f"people.{quoted(column)}" for column in ("name", *attributes))
    rows = (row for row in source.execute(f"SELECT {columns} FROM people"))  # iterate in Python, where Ctrl-C works
    _fill(path, attributes, rows, "", "INSERT OR IGNORE")


def add_people(people: People, path: str | Path) -> None:
    """Add people to a database; a person who is there already gets the new facts.

    Adds all of them or, with an `InputError`, nobody. Their attributes must be exactly those of the database.
    """
    columns = ", ".join(map(quoted, ("name", *people.attributes)))
    values = f"?{', ?' * len(people.attributes)}"
    with _changes(path) as connection:
        if {*people.attributes} != {*(known := attribute_columns(connection))}:
            raise InputError(f"cannot change the database {path}: people with {', '.join(known)} are expected")
        connection.executemany(f"INSERT OR REPLACE INTO people ({columns}) VALUES ({values})", people.rows())


def change_fact(path: str | Path, name: str, attribute: str, value: str, *others: str | Path) -> str:
    """Give one attribute of one person another value in a database, and in all `others`; return the old value.

    Name and value are bound as parameters; the attribute must be a column. Raises `InputError`, and changes none of the
    databases, for an unknown person or attribute, and for a value that `read_people_csv` would refuse.
    """
    if not value.strip() or FORBIDDEN.search(value):
        raise InputError(f"{value!r} cannot be a value: one line of text without ``` is expected")
    with ExitStack() as stack:
        connections = [stack.enter_context(_changes(each)) for each in (path, *others)]
        return [_change(connection, name, attribute, value) for connection in connections][0]


def attribute_columns(connection: sqlite3.Connection) -> list[str]:
    """Return the columns of the table `people` besides `name`; raises sqlite3.Error if either is missing."""
    connection.execute("SELECT people.name FROM people LIMIT 0")
    columns = connection.execute("SELECT * FROM people LIMIT 0").description
    return [column for column, *_ in columns if column.lower() != "name"]


def spelling(connection: sqlite3.Connection, name: str) -> str:
    """Return a name as the database spells it: as given, else the first of equal `comparable` form."""
    if connection.execute("SELECT 1 FROM people WHERE people.name = ?", (name,)).fetchone():
        return name
    wanted, names = comparable(name), (other for (other,) in connection.execute("SELECT people.name FROM people"))
    return next((other for other in names if isinstance(other, str) and comparable(other) == wanted), name)


def quoted(column: str) -> str:
    """Return a column's name as SQL."""
    return '"' + column.replace('"', '""') + '"'


def interrupted(error: Exception) -> bool:
    """Return whether SQLite stopped a statement on request. Errors of Python itself have no code."""
    return getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_INTERRUPT


@contextmanager
def refusing(deed: str, path: str | Path) -> Iterator[None]:
    """Turn errors of SQLite or the system into an `InputError`, a full disk into a `WorkError`; both name `path`."""
    try:
        yield
    except (OSError, sqlite3.Error, UnicodeError) as error:  # UnicodeError: a lone surrogate, stored or read
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        hint = _HINTS.get(code, "")
        if code == sqlite3.SQLITE_FULL or (deed == "write" and hint == _BLOCKED):  # nobody else can lock a new file
            raise WorkError(f"cannot {deed} the database {path}: {error}") from None
        raise InputError(f"cannot {deed} the database {path}: {error}{hint}") from None


def _fill(path: Path, attributes: Sequence[str], rows: Iterable[Sequence], kind: str, insert: str) -> None:
    """Create a database of people at a new path; after an error the file must be deleted."""
    columns = "".join(f", {quoted(attribute)}{kind}" for attribute in attributes)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("PRAGMA journal_mode = OFF")
        connection.execute(f"CREATE TABLE people (name TEXT PRIMARY KEY{columns}) WITHOUT ROWID")
        connection.executemany(f"{insert} INTO people VALUES (?{', ?' * len(attributes)})", rows)


def _change(connection: sqlite3.Connection, name: str, attribute: str, value: str) -> str:
    check_known("attribute", attribute, attribute_columns(connection))
    name, column = spelling(connection, name), quoted(attribute)
    row = connection.execute(f"SELECT people.{column} FROM people WHERE people.name = ?", (name,)).fetchone()
    if row is None:
        raise InputError(f"nobody is called {name!r} in the database: give a name that is there")
    connection.execute(f"UPDATE people SET {column} = ? WHERE people.name = ?", (value, name))
    return str(row[0])


@contextmanager
def _changes(path: str | Path) -> Iterator[sqlite3.Connection]:
    """Open one transaction on an existing database; after an error, which becomes an `InputError`, nothing changed."""
    with refusing("change", path), closing(_connect(path, "rw", WHOLE_TABLE)) as connection, connection:
        yield connection


def _connect(path: str | Path, mode: str, time_budget: float) -> GuardedConnection:
    """Open an untrusted database, waiting for locks: mode "ro", or "rw", which denies triggers and views."""
    if not Path(path).is_file():
        raise InputError(f"there is no database {path}")
    uri, timeout = f"{Path(path).absolute().as_uri()}?mode={mode}", min(time_budget, 5.0)
    connection = sqlite3.connect(uri, timeout=timeout, factory=GuardedConnection, uri=True)
    connection.time_budget = time_budget
    for pragma in ("temp_store = MEMORY", "trusted_schema = OFF", "cell_size_check = ON"):
        connection.execute(f"PRAGMA {pragma}")
    if mode == "ro":
        connection.execute("BEGIN")  # one snapshot for all reads; a lock for each would take most of the time
    if connection.execute(_COMPUTED).fetchone():
        raise InputError(f"the database {path} computes a column, which may take for ever: store its values instead")
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 1_000_000)
    connection.set_progress_handler(lambda: monotonic() > connection.deadline, 10_000)

    def authorize(action: int, _1, _2, _3, origin: str | None) -> int:
        allowed = action in _READS if mode == "ro" else origin is None  # not from a trigger or view
        return sqlite3.SQLITE_OK if allowed else sqlite3.SQLITE_DENY

    connection.set_authorizer(authorize)
    return connection
