"""People: their names, their attributes, and the law by which both are drawn."""

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, Self

from pydantic import Field, model_validator

from lib.base import Config
from lib.paths import DATA


def _words(name: str) -> tuple[str, ...]:
    return tuple((DATA / f"{name}.txt").read_text(encoding="ascii").splitlines())


VALUES = {
    "birth_date": tuple(
        f"{day}/{month}/{year}" for year in range(1950, 2001) for month in range(1, 13) for day in range(1, 29)
    ),
    "birth_place": _words("countries"),
    "current_address": _words("cities"),
    "occupation": _words("occupations"),
}
ATTRIBUTES = tuple(VALUES)
#: The attribute whose value is another person (`lib.dialogs.chains`). Only `with_bosses` gives it to sampled people.
LINK = "boss"
#: The attributes that a family shares when facts are correlated; birth dates stay independent.
SHARED = ATTRIBUTES[1:]
FIRST_NAMES = {"train": _words("first_names"), "unseen": _words("unseen_first_names")}
LAST_NAMES = {"train": _words("last_names"), "unseen": _words("unseen_last_names")}
#: Middle names: none until every first-last pair is used up, then an initial.
MIDDLES = ("", *(f"{letter}. " for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"))
#: 437 x 388 x 27 = 4,578,012 distinct names.
MAX_PEOPLE = len(FIRST_NAMES["train"]) * len(LAST_NAMES["train"]) * len(MIDDLES)


class Law(NamedTuple):
    """The distribution of names and values of sampled people; a family is a last name.

    `n_first_names` and `n_families` take that many names from the start of the lists; None takes all. People and
    families draw from the whole lists of values if `value_lists` is "full". If it is "cut", they draw from the first
    max(2, floor((1 - alpha) x length)) values of each list, except for birth dates.
    """

    n_first_names: int | None = None
    n_families: int | None = None
    value_lists: Literal["full", "cut"] = "full"

    def names(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the first and the last names of the people that models are trained on."""
        return FIRST_NAMES["train"][: self.n_first_names], LAST_NAMES["train"][: self.n_families]

    def values(self, attribute: str, alpha: float) -> tuple[str, ...]:
        """Return the values that an attribute can have at correlation `alpha`."""
        values = VALUES[attribute]
        if self.value_lists == "cut" and attribute in SHARED:
            values = values[: max(2, int((1 - alpha) * len(values)))]
        return values


#: Our law: all names, full lists.
OURS = Law()
#: The law of the files released with Section 5.3: at alpha = 1 two values of each attribute remain, except birth dates.
#: The released 8,192 people have these 128 x 64 names. No names of the 1,000 people are released; we assume the same.
RELEASED = Law(n_first_names=128, n_families=64, value_lists="cut")
#: The laws that tables and figures know by name.
LAWS = {"ours": OURS, "released": RELEASED}


class FactsConfig(Config):
    """The people that a model learns: `n_people` sampled ones, or all people of a CSV file.

    `alpha` is the probability that a person takes a family's value; `n_first_names`, `n_families` and `value_lists` are
    the `Law`. With `csv` the file alone decides: `n_people` and `seed` are ignored.
    """

    n_people: int = Field(64, ge=1, le=MAX_PEOPLE)
    seed: int = Field(0, ge=0)
    alpha: float = Field(0.0, ge=0, le=1)
    n_first_names: int | None = Field(None, ge=1, le=len(FIRST_NAMES["train"]))
    n_families: int | None = Field(None, ge=1, le=len(LAST_NAMES["train"]))
    value_lists: Literal["full", "cut"] = "full"
    csv: str | None = None

    @property
    def n_facts(self) -> int:
        """The number of facts about sampled people; a CSV file has its own (`lib.facts.sampling.load_people`)."""
        return len(ATTRIBUTES) * self.n_people

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
        n_firsts, n_lasts = map(len, self.law.names())
        if self.n_people > (most := n_firsts * n_lasts * len(MIDDLES)):
            raise ValueError(
                f"facts.n_people = {self.n_people}: {n_firsts} first and {n_lasts} last names make "
                f"{most:,} people at most"
            )
        return self


@dataclass(frozen=True)
class People:
    """Facts in columns: `columns[attribute][i]` is a fact about `names[i]`. Names are unique."""

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
        """Return these people, then the others. All must have the same attributes, and no name may occur twice."""
        columns = {name: column + other.columns[name] for name, column in self.columns.items()}
        return People(self.names + other.names, columns)

    def value(self, i: int, attribute: str) -> str:
        return self.columns[attribute][i]

    def rows(self) -> Iterator[tuple[str, ...]]:
        """Yield (name, *values), person by person."""
        return zip(self.names, *self.columns.values(), strict=True)

    def facts(self) -> Iterator[tuple[str, str, str]]:
        """Yield (name, attribute, value), person by person."""
        for name, *values in self.rows():
            for attribute, value in zip(self.columns, values, strict=True):
                yield name, attribute, value

    def digest(self) -> str:
        """Return 16 hexadecimal digits that identify these people, their order and their facts."""
        content = hashlib.sha256("\t".join(("name", *self.columns)).encode())
        for column in (self.names, *self.columns.values()):
            content.update(b"\n\n" + "\n".join(column).encode())
        return content.hexdigest()[:16]


def comparable(name: str) -> str:
    """Return a name in the form in which names are compared: NFC, with every run of blanks made one space."""
    return " ".join(unicodedata.normalize("NFC", name).split())


def best_constant_guess(people: People) -> float:
    """Return the recall of a model that answers every attribute with its most frequent value among `people`."""
    most = [Counter(column).most_common(1)[0][1] for column in people.columns.values()]
    return sum(most) / people.n_facts
