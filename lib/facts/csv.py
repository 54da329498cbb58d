"""People from a CSV file, and back."""

import codecs
import csv
import re
import unicodedata
from collections import Counter
from io import BytesIO, TextIOWrapper
from itertools import chain
from pathlib import Path

from lib.base import InputError
from lib.facts.people import People, comparable
from lib.paths import read_bytes, reading, replacing

#: Forbidden in names and values: control characters, and the fence that would end a request.
FORBIDDEN = re.compile(r"[\x00-\x1f\x7f]|```")
#: The delimiter is the first of these in the header, unless a line `sep=;` before it names one (Excel).
_DELIMITERS = ",;\t|"


def read_people_csv(path: str | Path) -> People:
    """Read people from a CSV file with a header: the column `name`, and every other column is an attribute.

    Drops blanks around cells, empty lines, empty trailing cells, and a first column of row numbers.
    Raises `InputError` if the file cannot be read, columns or cells are missing, two names have one `comparable` form,
    a column's name is not letters, digits and underscores, or a cell matches `FORBIDDEN`.
    """
    rows = _read(path)
    if len(rows) < 2:
        raise InputError(f"{path} has no people: a header line and one line per person are expected")
    header, *rows = _without_counter(rows)
    header = ["name" if column.lower() == "name" else unicodedata.normalize("NFC", column) for column in header]
    _check_header(path, header)
    for number, row in enumerate(rows, start=1):
        if len(row) != len(header) or "" in row:
            raise InputError(f"{path}, person {number}: each of {', '.join(header)} needs one non-empty cell")
        if FORBIDDEN.search(" ".join(row)):
            cell = next(filter(FORBIDDEN.search, row))
            raise InputError(f"{path}, person {number}: {cell!r} holds a line break, a control character or ```")
    columns = dict(zip(header, map(list, zip(*rows, strict=True)), strict=True))
    names = columns.pop("name")
    read, count = Counter(map(comparable, names)).most_common(1)[0]
    if count > 1:
        one, other = [name for name in names if comparable(name) == read][:2]
        told = repr(one) if one == other else f"{one!a}, also spelled {other!a},"
        raise InputError(f"{path} has the name {told} twice: names must be unique")
    return People(names, columns)


def write_people_csv(people: People, path: str | Path) -> None:
    """Store people so that `read_people_csv` reads them again, in their order."""
    with replacing(Path(path)) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("name", *people.attributes))
        writer.writerows(people.rows())


def _read(path: str | Path) -> list[list[str]]:
    """Return the stripped cells of the header and of each person, without empty lines and trailing cells."""
    with reading(f"people from {path}, a file of CSV UTF-8"):
        content = read_bytes(path)
        if content[:4] in (b"PK\x03\x04", b"\xd0\xcf\x11\xe0"):  # .xlsx and .ods, .xls
            raise ValueError("it is a workbook, which the program that made it can save as CSV UTF-8")
        encoding = "utf-16" if content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
        if encoding != "utf-16" and b"\0" in content[:4]:
            raise ValueError("it has NUL bytes, as UTF-16 without a byte order mark does: save it as CSV UTF-8")
        lines = TextIOWrapper(BytesIO(content), encoding, newline="")
        first = next(filter(str.strip, lines), "")
        named = re.fullmatch(f'"?sep=([{_DELIMITERS}])"?[\r\n]*', first)
        delimiter = named[1] if named else next((each for each in _DELIMITERS if each in first), ",")
        reader = csv.reader(lines if named else chain([first], lines), delimiter=delimiter, strict=True)
        try:
            return list(filter(None, map(_cells, reader)))
        except csv.Error as error:  # most often an unclosed quote, which runs to the end of the file
            raise ValueError(f"{error} in or before line {reader.line_num}, is there a quote too many?") from None


def _cells(row: list[str]) -> list[str]:
    cells = [cell.strip() for cell in row]
    while cells and not cells[-1]:
        cells.pop()
    return cells


def _without_counter(rows: list[list[str]]) -> list[list[str]]:
    """Drop an unnamed first column that counts rows from 0 or 1: pandas writes its index like that."""
    cells = [row[0] for row in rows[1:]]
    counters = (list(map(str, range(start, start + len(cells)))) for start in (0, 1))
    return [row[1:] for row in rows] if rows[0][0] in ("", "Unnamed: 0") and cells in counters else rows


def _check_header(path: str | Path, header: list[str]) -> None:
    """Raise `InputError` unless a header has `name`, and attributes valid in requests, SQL and result tables."""
    if "name" not in header:
        raise InputError(f"{path} has no column 'name' among {', '.join(header)}: the first line names the columns")
    for column in header:
        if not (column and f"_{column}".isidentifier()):
            better = re.sub(r"\W+", "_", column).strip("_") or "attribute"
            raise InputError(f"{path}: bad column name {column!r}, it takes letters, digits and _: rename it {better}")
    if len({column.lower() for column in header}) < len(header):
        raise InputError(f"{path}: two columns have the same name (case is ignored) in {', '.join(header)}")
    if len(header) == 1:
        raise InputError(f"{path} has no attributes: at least one column besides 'name' is expected")
