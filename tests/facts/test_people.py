"""Value sets, names, and people in columns."""

import re

import pytest

from lib.base import InputError
from lib.facts.people import FIRST_NAMES, LAST_NAMES, MAX_PEOPLE, RELEASED, SHARED, VALUES, FactsConfig, People


def test_birth_dates_are_day_month_year_without_padding():
    assert {"1/1/1950", "28/12/2000", "9/10/1987"} <= set(VALUES["birth_date"])
    for value in VALUES["birth_date"]:
        day, month, year = map(int, value.split("/"))
        assert value == f"{day}/{month}/{year}" and day <= 28 and month <= 12 and 1950 <= year <= 2000


def test_name_lists_are_ascii_words_of_the_right_size_without_overlap():
    lists = [FIRST_NAMES["train"], LAST_NAMES["train"], FIRST_NAMES["unseen"], LAST_NAMES["unseen"]]
    assert [len(words) for words in lists[:2]] == [437, 388]
    assert min(len(words) for words in lists[2:]) >= 64
    words = [word for words in lists for word in words]
    assert len(set(words)) == len(words)
    assert all(re.fullmatch("[A-Z][a-z]+", word) for word in words)


def test_values_are_ascii_and_need_no_quoting():
    for attribute in SHARED:
        assert all(re.fullmatch("[A-Za-z]+( [A-Za-z]+)*", value) for value in VALUES[attribute])
    assert all(value == value.lower() for value in VALUES["occupation"])


def test_facts_come_person_by_person():
    people = People(["Ann Lee", "Bo Ek"], {"pet": ["cat", "dog"], "car": ["Fiat", "Saab"]})
    assert list(people.facts()) == [
        ("Ann Lee", "pet", "cat"),
        ("Ann Lee", "car", "Fiat"),
        ("Bo Ek", "pet", "dog"),
        ("Bo Ek", "car", "Saab"),
    ]
    assert (len(people), people.n_facts, people.attributes) == (2, 4, ("pet", "car"))
    assert people.value(1, "car") == "Saab"
    assert list(people[1:].facts()) == list(people.facts())[2:]


def test_the_digest_tells_people_apart():
    people = [
        People(["A", "B"], {"x": ["1", "2"], "y": ["3", "4"]}),
        People(["A", "B"], {"x": ["1", "2"], "y": ["4", "3"]}),
        People(["A", "B"], {"x": ["3", "4"], "y": ["1", "2"]}),
        People(["B", "A"], {"x": ["1", "2"], "y": ["3", "4"]}),
        People(["A", "B"], {"x": ["1", "2"], "z": ["3", "4"]}),
        People(["A", "B"], {"x": ["1", "2"]}),
        People(["A"], {"x": ["1"], "y": ["3"]}),
    ]
    assert len({someone.digest() for someone in people}) == len(people)
    assert people[0].digest() == People(["A", "B"], {"x": ["1", "2"], "y": ["3", "4"]}).digest()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n_people": 0}, "n_people"),
        ({"n_people": MAX_PEOPLE + 1}, "n_people"),
        ({"n_people": 300_000, **RELEASED._asdict()}, "128 first and 64 last names make 221,184 people at most"),
        ({"csv": "people.csv", "n_families": 64}, "leave them out where facts.csv gives the people"),
        ({"n_families": 389}, "n_families"),
        ({"value_lists": "short"}, "value_lists"),
        ({"alpha": 1.1}, "alpha"),
        ({"csv": "people.csv", "alpha": 0.5}, "alpha"),
    ],
)
def test_impossible_facts_are_an_error_that_names_the_field(values, message):
    with pytest.raises(InputError, match=message):
        FactsConfig(**values)
