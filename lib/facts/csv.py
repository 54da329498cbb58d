"""People from a CSV file, and back."""

import csv
import re
from collections import Counter
from pathlib import Path

from lib.base import InputError
from lib.facts.people import People
from lib.paths import replacing

#: What no name and no value may hold: control characters, and what would end a request.
FORBIDDEN = re.compile(r"[\x00-\x1f\x7f]|```")


def read_people_csv(path: str | Path) -> People:
    """Read people from a CSV file with a header: the column `name`, and every other column is an attribute.

    Blanks around a cell are dropped. Raises `InputError` if the file cannot be read, columns or cells are missing, a
    name occurs twice, a column is not letters, digits and underscores, or a cell holds something of `FORBIDDEN`.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = [[cell.strip() for cell in row] for row in csv.reader(file, strict=True) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"cannot read people from {path}: {error}") from None
    if len(rows) < 2:
        raise InputError(f"{path} has no people: a header line and one line per person are expected")
    header, *rows = rows
    for column in header:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", column):
            raise InputError(f"{path}: bad column name {column!r}, letters, digits and underscores are accepted")
    if len({column.lower() for column in header}) < len(header):
        raise InputError(f"{path}: two columns have the same name, upper or lower case, in {', '.join(header)}")
    if "name" not in header:
        raise InputError(f"{path} has no column 'name' among {', '.join(header)}")
    if len(header) == 1:
        raise InputError(f"{path} has no attributes: at least one column besides 'name' is expected")
    for number, row in enumerate(rows, start=1):
        if len(row) != len(header) or "" in row:
            raise InputError(f"{path}, person {number}: every one of {', '.join(header)} takes one non-empty cell")
        for cell in filter(FORBIDDEN.search, row):
            raise InputError(f"{path}, person {number}: {cell!r} holds a line break, a control character or ```")
    columns = dict(zip(header, map(list, zip(*rows, strict=True)), strict=True))
    names = columns.pop("name")
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise InputError(f"{path} has the name {name!r} twice: names must be unique")
    return People(names, columns)


def write_people_csv(people: People, path: str | Path) -> None:
    """Store people so that `read_people_csv` reads them again, in their order."""
    with replacing(Path(path)) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("name", *people.attributes))
        writer.writerows(zip(people.names, *people.columns.values(), strict=True))
