"""The SQLite database of people: written, changed."""

import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from operator import itemgetter
from pathlib import Path

from lib.base import InputError
from lib.facts.csv import FORBIDDEN
from lib.facts.people import People
from lib.paths import replacing


def write_database(people: People, path: str | Path) -> None:
    """Store people as the SQLite table `people` (key: name, one text column per attribute), replacing the file.

    The file is whole or, after an `InputError`, as it was.
    """
    path = Path(path)
    columns = "".join(f', "{attribute}" TEXT NOT NULL' for attribute in people.attributes)
    try:
        with (
            replacing(path, "the database ") as temporary,
            closing(sqlite3.connect(temporary)) as connection,
            connection,
        ):
            connection.execute("PRAGMA journal_mode = OFF")  # an unfinished file is thrown away
            connection.execute(f"CREATE TABLE people (name TEXT PRIMARY KEY{columns}) WITHOUT ROWID")
            rows = sorted(_rows(people), key=itemgetter(0))  # in the order of the key the tree fills from left to right
            connection.executemany(f"INSERT INTO people VALUES (?{', ?' * len(people.attributes)})", rows)
    except (OSError, sqlite3.Error) as error:
        raise InputError(f"cannot write the database {path}: {error}") from None


def add_people(people: People, path: str | Path) -> None:
    """Add people to a database that `write_database` made; a person who is there already gets the new facts.

    Adds all of them or, with an `InputError`, nobody.
    """
    columns = ", ".join(map(quoted, ("name", *people.attributes)))
    values = f"?{', ?' * len(people.attributes)}"
    with _changes(path) as connection:
        connection.executemany(f"INSERT OR REPLACE INTO people ({columns}) VALUES ({values})", _rows(people))


def change_fact(path: str | Path, name: str, attribute: str, value: str) -> str:
    """Give one attribute of one person another value in a database that `write_database` made; return the old value.

    Name and value are bound as parameters; the attribute must be a column. Raises `InputError`, and changes nothing,
    for an unknown person or attribute, and for a value that `read_people_csv` would refuse.
    """
    return change_facts([path], name, attribute, value)[0]


def change_facts(paths: Iterable[str | Path], name: str, attribute: str, value: str) -> list[str]:
    """Apply `change_fact` to each of several databases: to all of them or, with an `InputError`, to none."""
    if not value.strip() or FORBIDDEN.search(value):
        raise InputError(f"{value!r} cannot be a value: one line of text without ``` is expected")
    with ExitStack() as stack:
        return [_change(stack.enter_context(_changes(path)), name, attribute, value) for path in paths]


def attribute_columns(connection: sqlite3.Connection) -> list[str]:
    """Return the columns of the table `people` besides `name`; without table or name it is an sqlite3.Error."""
    columns = connection.execute("SELECT people.name, * FROM people LIMIT 0").description
    return [column for column, *_ in columns if column != "name"]


def quoted(column: str) -> str:
    """Return a column's name as SQL."""
    return '"' + column.replace('"', '""') + '"'


def _rows(people: People) -> Iterator[tuple[str, ...]]:
    return zip(people.names, *people.columns.values(), strict=True)


def _change(connection: sqlite3.Connection, name: str, attribute: str, value: str) -> str:
    known = attribute_columns(connection)
    if attribute not in known:
        raise InputError(f"unknown attribute {attribute!r}: the database has {', '.join(known)}")
    column = quoted(attribute)
    row = connection.execute(f"SELECT people.{column} FROM people WHERE people.name = ?", (name,)).fetchone()
    if row is None:
        raise InputError(f"nobody is called {name!r} in the database: change somebody who is there")
    connection.execute(f"UPDATE people SET {column} = ? WHERE people.name = ?", (value, name))
    return str(row[0])


@contextmanager
def _changes(path: str | Path) -> Iterator[sqlite3.Connection]:
    """Open one transaction on an existing database; after an error, which becomes an `InputError`, nothing changed."""
    try:
        with closing(sqlite3.connect(f"{Path(path).absolute().as_uri()}?mode=rw", uri=True)) as connection, connection:
            yield connection
    except (sqlite3.Error, UnicodeEncodeError) as error:  # half a surrogate pair cannot be stored
        raise InputError(f"cannot change the database {path}: {error}") from None
