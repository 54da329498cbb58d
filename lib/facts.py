"""People and what is true of them: sampling, people from a CSV file, entropy, the SQLite database."""

import csv
import hashlib
import os
import re
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import chain, islice
from math import log2
from operator import itemgetter
from pathlib import Path
from typing import Literal, NamedTuple, Self

import numpy as np
from pydantic import Field, model_validator

from lib.base import Config, InputError
from lib.entropy import shared_value_entropy
from lib.paths import replacing

ATTRIBUTES = ("birth_date", "birth_place", "current_address", "occupation")
#: What a family shares when attributes are correlated; birth dates stay independent.
SHARED = ATTRIBUTES[1:]


def _words(name: str) -> tuple[str, ...]:
    return tuple((Path(__file__).parent / "data" / f"{name}.txt").read_text(encoding="ascii").splitlines())


VALUES = {
    "birth_date": tuple(
        f"{day}/{month}/{year}" for year in range(1950, 2001) for month in range(1, 13) for day in range(1, 29)
    ),
    "birth_place": _words("countries"),
    "current_address": _words("cities"),
    "occupation": _words("occupations"),
}
NameList = Literal["train", "unseen"]
FIRST_NAMES: dict[NameList, tuple[str, ...]] = {"train": _words("first_names"), "unseen": _words("unseen_first_names")}
LAST_NAMES: dict[NameList, tuple[str, ...]] = {"train": _words("last_names"), "unseen": _words("unseen_last_names")}
#: What stands between first and last name: nothing until every plain pair is used up, then an initial.
MIDDLES = ("", *(f"{letter}. " for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"))
#: 437 x 388 x 27 = 4,578,012 distinct names.
MAX_PEOPLE = len(FIRST_NAMES["train"]) * len(LAST_NAMES["train"]) * len(MIDDLES)


class Law(NamedTuple):
    """How names and values of sampled people are distributed; a family is a last name.

    `n_first_names` and `n_families` take that many names from the start of the lists, None takes all. `value_lists`:
    "cut" keeps the first max(2, floor((1 - alpha) x length)) values of each list but that of birth dates, from which
    both people and families draw; "full" keeps all.
    """

    n_first_names: int | None = None
    n_families: int | None = None
    value_lists: Literal["full", "cut"] = "full"

    def names(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """First and last names of the people that models are trained on."""
        return FIRST_NAMES["train"][: self.n_first_names], LAST_NAMES["train"][: self.n_families]

    def values(self, attribute: str, alpha: float) -> tuple[str, ...]:
        """The values that an attribute can have where facts correlate by `alpha`."""
        values = VALUES[attribute]
        if self.value_lists == "cut" and attribute in SHARED:
            values = values[: max(2, int((1 - alpha) * len(values)))]
        return values


#: Ours: all names; families draw from the full lists.
OURS = Law()
#: That of the files released with the paper's Section 5.3: at alpha = 1 two values of each attribute remain, birth
#: dates aside. The 128 x 64 names are its 8,192 people; which names its 1,000 people had is not released, so we assume
#: that they come from the same.
RELEASED = Law(n_first_names=128, n_families=64, value_lists="cut")
#: The laws that tables and figures know by name.
LAWS = {"ours": OURS, "released": RELEASED}


class FactsConfig(Config):
    """Which people a model is to know: `n_people` sampled ones, or all those of a CSV file.

    `alpha` is the probability with which a person takes a family's value; `n_first_names`, `n_families` and
    `value_lists` are the `Law`. With `csv`, the file alone says who there is: `n_people` and `seed` describe sampling
    and are not looked at.
    """

    n_people: int = Field(64, ge=1, le=MAX_PEOPLE)
    seed: int = Field(0, ge=0)
    alpha: float = Field(0.0, ge=0, le=1)
    n_first_names: int | None = Field(None, ge=1, le=len(FIRST_NAMES["train"]))
    n_families: int | None = Field(None, ge=1, le=len(LAST_NAMES["train"]))
    value_lists: Literal["full", "cut"] = "full"
    csv: str | None = None

    @property
    def law(self) -> Law:
        return Law(self.n_first_names, self.n_families, self.value_lists)

    @model_validator(mode="after")
    def _people_are_sampled(self) -> Self:
        if self.csv is not None and self.alpha > 0:
            raise ValueError("facts.alpha is for sampled people: it must be 0 where facts.csv gives the people")
        if self.csv is not None and self.law != OURS:
            fields = ", ".join(f"facts.{field}" for field in Law._fields)
            raise ValueError(f"{fields} are for sampled people: leave them out where facts.csv gives the people")
        firsts, lasts = self.law.names()
        if self.n_people > len(firsts) * len(lasts) * len(MIDDLES):
            raise ValueError(
                f"facts.n_people = {self.n_people}: {len(firsts)} first and {len(lasts)} last names make "
                f"{len(firsts) * len(lasts) * len(MIDDLES):,} people at most"
            )
        return self


@dataclass(frozen=True)
class People:
    """Facts in columns: `columns[attribute][i]` holds of `names[i]`. Names are unique."""

    names: list[str]
    columns: dict[str, list[str]]

    @property
    def attributes(self) -> tuple[str, ...]:
        return tuple(self.columns)

    @property
    def n_facts(self) -> int:
        return len(self.names) * len(self.columns)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, part: slice) -> "People":
        return People(self.names[part], {name: column[part] for name, column in self.columns.items()})

    def __add__(self, other: "People") -> "People":
        """These people, then the others: all with the same attributes, no name twice."""
        columns = {name: column + other.columns[name] for name, column in self.columns.items()}
        return People(self.names + other.names, columns)

    def value(self, i: int, attribute: str) -> str:
        return self.columns[attribute][i]

    def facts(self) -> Iterator[tuple[str, str, str]]:
        """(name, attribute, value), person by person."""
        for name, *values in zip(self.names, *self.columns.values(), strict=True):
            for attribute, value in zip(self.columns, values, strict=True):
                yield name, attribute, value

    def digest(self) -> str:
        """16 hexadecimal digits that tell these people, their order and their facts from any others."""
        content = hashlib.sha256("\t".join(("name", *self.columns)).encode())
        for column in (self.names, *self.columns.values()):
            content.update(b"\n\n" + "\n".join(column).encode())
        return content.hexdigest()[:16]


def load_people(config: FactsConfig) -> People:
    """The people that a configuration describes."""
    if config.csv is not None:
        return read_people_csv(config.csv)
    return sample_people(config.n_people, config.seed, config.alpha, law=config.law)


# ---- Sampling: every draw is one position of a stream of its own, so the first n people are the same whatever n is.

_ORDER, _MIDDLE_ORDER, _OWN_VALUE, _FOLLOWS_FAMILY, _FAMILY_VALUE, _STRANGERS = range(6)


def _uniform(start: int, n: int, seed: int, *stream: int) -> np.ndarray:
    """Numbers `start` to `start + n` of a stream, uniform on [0, 1).

    Made from the raw bits of PCG64, which numpy keeps the same in all versions, as it does not keep `Generator`.
    """
    bits = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=stream))
    return (bits.advance(start).random_raw(n) >> np.uint64(11)) * 2.0**-53


def sample_people(
    n: int,
    seed: int = 0,
    alpha: float = 0.0,
    start: int = 0,
    first_names: NameList = "train",
    last_names: NameList = "train",
    law: Law = OURS,
) -> People:
    """People `start` to `start + n` of the sequence that `seed`, `law` and the two name lists define (Section 5).

    A person has the family's birth place, address and occupation with probability `alpha`, each for itself, and
    an independent draw otherwise; who a person is does not depend on `alpha`, nor a family's values on the people.
    The "unseen" lists give out-of-distribution people; `start` beyond the trained ones gives new pairs of names.

    Raises `InputError` for values that `FactsConfig` refuses and where the names run out.
    """
    FactsConfig(n_people=n, seed=seed, alpha=alpha, **law._asdict())
    firsts, lasts = (
        trained if kind == "train" else _name_list(lists, kind)
        for trained, lists, kind in zip(law.names(), (FIRST_NAMES, LAST_NAMES), (first_names, last_names), strict=True)
    )
    population = (int(first_names == "unseen"), int(last_names == "unseen"))
    first, middle, last = _name_codes(start, n, seed, population, len(firsts), len(lasts))
    parts = zip(_decode(firsts, first), _decode(MIDDLES, middle), _decode(lasts, last), strict=True)
    names = [f"{one} {two}{three}" for one, two, three in parts]
    columns = {}
    for k, attribute in enumerate(VALUES):
        values = law.values(attribute, alpha)
        codes = (_uniform(start, n, seed, _OWN_VALUE, *population, k) * len(values)).astype(int)
        if attribute in SHARED and alpha > 0:
            family = (_uniform(0, len(lasts), seed, _FAMILY_VALUE, population[1], k) * len(values)).astype(int)
            follows = _uniform(start, n, seed, _FOLLOWS_FAMILY, *population, k) < alpha
            codes = np.where(follows, family[last], codes)
        columns[attribute] = _decode(values, codes)
    return People(names, columns)


def _name_list(lists: dict[NameList, tuple[str, ...]], name: str) -> tuple[str, ...]:
    if name not in lists:
        raise InputError(f"unknown list of names {name!r}: there are {', '.join(lists)}")
    return lists[name]


def _name_codes(
    start: int, n: int, seed: int, population: tuple[int, int], n_firsts: int, n_lasts: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First name, middle and last name of each person, as indices: three (n,) arrays."""
    n_pairs = n_firsts * n_lasts
    if start < 0 or start + n > n_pairs * len(MIDDLES):
        raise InputError(
            f"people {start} to {start + n} do not exist: there are {n_pairs * len(MIDDLES)} distinct names, from 0 on"
        )
    order = np.argsort(_uniform(0, n_pairs, seed, _ORDER, *population), kind="stable")
    if start + n > n_pairs:
        with_initial = _uniform(0, n_pairs * (len(MIDDLES) - 1), seed, _MIDDLE_ORDER, *population)
        order = np.concatenate([order, n_pairs + np.argsort(with_initial, kind="stable")])
    middle, pair = np.divmod(order[start : start + n], n_pairs)
    first, last = np.divmod(pair, n_lasts)
    return first, middle, last


def _decode(values: tuple[str, ...], codes: np.ndarray) -> list[str]:
    return np.array(values, dtype=object)[codes].tolist()


# ---- People that nobody was trained on

#: People that nobody was trained on, by what is new in their names: whether first and last name are (Section 5.2).
UNSEEN = {"new_pair": (False, False), "new_first": (True, False), "new_last": (False, True), "new_both": (True, True)}


def unseen_people(config: FactsConfig, n: int) -> dict[str, People]:
    """`n` people of each kind of `UNSEEN`, or as many as there are; none is among the sampled people of `config`.

    A name that is not new is that of somebody among the people of `config`; a new one stands in no list that is trained
    on. Their facts are independent draws. Raises `InputError` for people of a CSV file, whose kind is not known.
    """
    if config.csv is not None:
        raise InputError(f"the people of {config.csv} are all there are: unseen people exist for sampled ones only")
    trained = set(sample_people(config.n_people, config.seed, law=config.law).names)
    seen_firsts, seen_lasts = (sorted({name.split()[part] for name in trained}) for part in (0, -1))
    groups = {}
    for kind, (new_first, new_last) in UNSEEN.items():
        firsts = FIRST_NAMES["unseen"] if new_first else seen_firsts
        lasts = LAST_NAMES["unseen"] if new_last else seen_lasts
        order = np.argsort(_uniform(0, len(firsts) * len(lasts), config.seed, _STRANGERS, new_first, new_last))
        pairs = (f"{firsts[i // len(lasts)]} {lasts[i % len(lasts)]}" for i in order.tolist())
        names = list(islice((name for name in pairs if name not in trained), n))
        columns = {
            attribute: [values[int(u * len(values))] for u in draws]
            for k, attribute in enumerate(VALUES)
            for values in [config.law.values(attribute, config.alpha)]
            for draws in [_uniform(0, len(names), config.seed, _STRANGERS, new_first, new_last, k).tolist()]
        }
        groups[kind] = People(names, columns)
    return groups


# ---- Entropy


def bits_per_person() -> float:
    """Entropy of one person's facts given the name, in bits, where attributes are independent: 31.25."""
    return sum(log2(len(values)) for values in VALUES.values())


def entropy_bits_per_person(n_people: int, seed: int = 0, alpha: float = 0.0, law: Law = OURS) -> float:
    """Joint entropy in bits of the facts of `sample_people(n_people, seed, alpha, law=law)`, divided by `n_people`.

    Given the names; what the families' values are is not known. Exact for any `alpha`, to about 1e-10.
    """
    return sum(entropy_bits_by_attribute(n_people, seed, alpha, law).values())


@cache
def entropy_bits_by_attribute(n_people: int, seed: int = 0, alpha: float = 0.0, law: Law = OURS) -> dict[str, float]:
    """`entropy_bits_per_person` of each attribute: given the names, attributes are independent of each other."""
    FactsConfig(n_people=n_people, seed=seed, alpha=alpha, **law._asdict())
    _, _, last = _name_codes(0, n_people, seed, (0, 0), *map(len, law.names()))
    _, members = np.unique(last, return_counts=True)
    sizes, n_families = np.unique(members, return_counts=True)
    n_values = {attribute: len(law.values(attribute, alpha)) for attribute in VALUES}
    bits = {attribute: log2(n) for attribute, n in n_values.items()}
    for attribute in SHARED:
        families = zip(sizes.tolist(), n_families.tolist(), strict=True)
        held = (count * shared_value_entropy(size, n_values[attribute], alpha) for size, count in families)
        bits[attribute] = sum(held) / n_people
    return bits


# ---- People from a file, people to a database

_FORBIDDEN = re.compile(r"[\x00-\x1f\x7f]|```")


def read_people_csv(path: str | Path) -> People:
    """People from a CSV file with a header: a column `name`, and every other column is an attribute.

    Blanks around a cell are dropped. Raises `InputError` where the file cannot be read, columns or cells are
    missing, a name occurs twice, a column is not letters, digits and underscores, or a cell holds a line break,
    another control character or ``` (which would end a request).
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = [[cell.strip() for cell in row] for row in csv.reader(file, strict=True) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"cannot read people from {path}: {error}") from None
    if len(rows) < 2:
        raise InputError(f"{path} has no people: a header line and one line per person are expected")
    header, *rows = rows
    _check_header(path, header)
    for number, row in enumerate(rows, start=1):
        if len(row) != len(header) or "" in row:
            raise InputError(f"{path}, person {number}: every one of {', '.join(header)} takes one non-empty cell")
        for cell in filter(_FORBIDDEN.search, row):
            raise InputError(f"{path}, person {number}: {cell!r} holds a line break, a control character or ```")
    columns = dict(zip(header, map(list, zip(*rows, strict=True)), strict=True))
    names = columns.pop("name")
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise InputError(f"{path} has the name {name!r} twice: names must be unique")
        seen.add(name)
    return People(names, columns)


def write_people_csv(people: People, path: str | Path) -> None:
    """Store people so that `read_people_csv` reads them again, in their order."""
    with replacing(Path(path)) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("name", *people.attributes))
        writer.writerows(zip(people.names, *people.columns.values(), strict=True))


def _check_header(path: str | Path, header: list[str]) -> None:
    for column in header:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", column):
            raise InputError(f"{path}: bad column name {column!r}, letters, digits and underscores are accepted")
    if len({column.lower() for column in header}) < len(header):
        raise InputError(f"{path}: two columns have the same name, upper or lower case, in {', '.join(header)}")
    if "name" not in header:
        raise InputError(f"{path} has no column 'name' among {', '.join(header)}")
    if len(header) == 1:
        raise InputError(f"{path} has no attributes: at least one column besides 'name' is expected")


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
