"""The SQLite database of people: written, changed."""

import os
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from itertools import chain
from operator import itemgetter
from pathlib import Path

from lib.base import InputError
from lib.facts.csv import _FORBIDDEN
from lib.facts.people import People


def write_database(people: People, path: str | Path) -> None:
    """Store people as the SQLite table `people` (key: name, one text column per attribute), replacing the file.

    One transaction under a temporary name, then a rename. Raises `InputError` where that cannot be done.
    """
    path = Path(path)
    if (path.exists() and not path.is_file()) or not path.parent.is_dir():  # a device would be replaced, too
        raise InputError(f"cannot write the database {path}: a file name in an existing folder is expected")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    columns = "".join(f', "{attribute}" TEXT NOT NULL' for attribute in people.attributes)
    row = f"(?{', ?' * len(people.attributes)})"
    try:
        connection = sqlite3.connect(temporary)
        try:
            # No journal: a file that was not finished is thrown away.
            connection.execute("PRAGMA journal_mode = OFF")
            with connection:
                connection.execute(f"CREATE TABLE people (name TEXT PRIMARY KEY{columns}) WITHOUT ROWID")
                # In the order of the key the tree is filled from left to right; 20 rows a statement save a third.
                rows = sorted(zip(people.names, *people.columns.values(), strict=True), key=itemgetter(0))
                whole = len(rows) // 20 * 20
                connection.executemany(
                    f"INSERT INTO people VALUES {', '.join([row] * 20)}",
                    (list(chain.from_iterable(rows[i : i + 20])) for i in range(0, whole, 20)),
                )
                connection.executemany(f"INSERT INTO people VALUES {row}", rows[whole:])
        finally:
            connection.close()
        os.replace(temporary, path)
    except (OSError, sqlite3.Error) as error:
        raise InputError(f"cannot write the database {path}: {error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def add_people(people: People, path: str | Path) -> None:
    """Put people into a database that `write_database` made; somebody who is there already gets the new facts.

    All of them or, with an `InputError`, nobody.
    """
    columns = ", ".join(map(_quoted, ("name", *people.attributes)))
    values = f"?{', ?' * len(people.attributes)}"
    with _changes(path) as connection:
        rows = zip(people.names, *people.columns.values(), strict=True)
        connection.executemany(f"INSERT OR REPLACE INTO people ({columns}) VALUES ({values})", rows)


def change_fact(path: str | Path, name: str, attribute: str, value: str) -> str:
    """Give one attribute of one person another value in a database that `write_database` made; returns the old one.

    Name and value are bound as parameters, the attribute must be a column. Raises `InputError`, and changes nothing,
    for somebody who is not there, an unknown attribute, and a value that `read_people_csv` would refuse.
    """
    (old,) = change_facts([path], name, attribute, value)
    return old


def change_facts(paths: Iterable[str | Path], name: str, attribute: str, value: str) -> list[str]:
    """`change_fact` in each of several databases; what one of them refuses is changed in none."""
    if not value.strip() or _FORBIDDEN.search(value):
        raise InputError(f"{value!r} cannot be a value: one line of text without ``` is expected")
    with ExitStack() as stack:
        return [_change(stack.enter_context(_changes(path)), name, attribute, value) for path in paths]


def _change(connection: sqlite3.Connection, name: str, attribute: str, value: str) -> str:
    columns = [column for column, *_ in connection.execute("SELECT * FROM people LIMIT 0").description]
    if attribute not in columns or attribute == "name":
        known = ", ".join(column for column in columns if column != "name")
        raise InputError(f"unknown attribute {attribute!r}: the database has {known}")
    column = f"people.{_quoted(attribute)}"
    row = connection.execute(f"SELECT {column} FROM people WHERE people.name = ?", (name,)).fetchone()
    if row is None:
        raise InputError(f"nobody is called {name!r} in the database: change somebody who is there")
    connection.execute(f"UPDATE people SET {_quoted(attribute)} = ? WHERE people.name = ?", (value, name))
    return str(row[0])


def _quoted(column: str) -> str:
    """A column's name as SQL."""
    return '"' + column.replace('"', '""') + '"'


@contextmanager
def _changes(path: str | Path) -> Iterator[sqlite3.Connection]:
    """One transaction on a database that exists; what goes wrong is an `InputError`, and then nothing has changed."""
    try:
        with closing(sqlite3.connect(f"{Path(path).absolute().as_uri()}?mode=rw", uri=True)) as connection, connection:
            yield connection
    except (sqlite3.Error, UnicodeEncodeError) as error:  # half a surrogate pair cannot be stored
        raise InputError(f"cannot change the database {path}: {error}") from None
