import math
import re
import sqlite3
from collections import Counter
from itertools import product
from time import process_time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.base import InputError
from lib.facts.csv import read_people_csv, write_people_csv
from lib.facts.database import write_database
from lib.facts.entropy import bits_per_person, entropy_bits_per_person, family_entropies
from lib.facts.people import (
    ATTRIBUTES,
    FIRST_NAMES,
    LAST_NAMES,
    MAX_PEOPLE,
    RELEASED,
    SHARED,
    VALUES,
    FactsConfig,
    People,
)
from lib.facts.sampling import load_people, sample_people

N_PLAIN_NAMES = 437 * 388


def last_name(name: str) -> str:
    return name.split(" ")[-1]


# ---- Value sets and names


def test_a_person_has_31_and_a_quarter_bits():
    assert tuple(VALUES) == ATTRIBUTES
    assert [len(set(values)) for values in VALUES.values()] == [28 * 12 * 51, 7, 213, 100]
    assert bits_per_person() == pytest.approx(math.log2(28 * 12 * 51 * 7 * 213 * 100))
    assert round(bits_per_person(), 2) == 31.25


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


# ---- Sampling


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 2**70), st.floats(0, 1))
def test_the_first_people_do_not_depend_on_how_many_are_drawn(n, more, seed, alpha):
    everyone = sample_people(n + more, seed, alpha)
    assert sample_people(n, seed, alpha) == everyone[:n]
    assert sample_people(more, seed, alpha, start=n) == everyone[n:]


def test_names_get_an_initial_once_the_plain_ones_are_used_up():
    plain = sample_people(N_PLAIN_NAMES)
    assert len(set(plain.names)) == N_PLAIN_NAMES
    assert all(len(name.split(" ")) == 2 for name in plain.names)
    later = sample_people(5 + 30_000, start=N_PLAIN_NAMES - 5)
    assert later[:5] == plain[N_PLAIN_NAMES - 5 :]
    assert all(re.fullmatch(r"[A-Z][a-z]+ [A-Z]\. [A-Z][a-z]+", name) for name in later[5:].names)
    assert len({name.split(" ")[1] for name in later[5:].names}) == 26
    assert len(set(later.names)) == len(later)


def test_more_than_four_million_people_exist_and_no_more_than_there_are_names():
    assert MAX_PEOPLE == 437 * 388 * 27 > 4_000_000
    last = sample_people(2, start=MAX_PEOPLE - 2)
    assert len(set(last.names)) == 2
    with pytest.raises(InputError, match="4578012 distinct names"):
        sample_people(2, start=MAX_PEOPLE - 1)


def test_every_value_is_equally_likely_and_attributes_are_independent():
    n = 100_000
    people = sample_people(n, seed=3)
    groups = [(attribute,) for attribute in ATTRIBUTES]
    groups += [("birth_place", "occupation"), ("birth_place", "current_address"), ("occupation", "current_address")]
    for group in groups:
        cells = math.prod(len(VALUES[attribute]) for attribute in group)
        counts = Counter(zip(*(people.columns[attribute] for attribute in group), strict=True))
        chi2 = sum((count - n / cells) ** 2 for count in counts.values()) / (n / cells)
        chi2 += (cells - len(counts)) * n / cells
        assert abs(chi2 - cells) < 5 * math.sqrt(2 * cells), group


def test_another_seed_gives_other_names_and_other_values():
    ours, theirs = sample_people(1000, seed=0), sample_people(1000, seed=1)
    assert sum(a == b for a, b in zip(ours.names, theirs.names, strict=True)) < 5
    for attribute in ATTRIBUTES:
        same = np.mean([a == b for a, b in zip(ours.columns[attribute], theirs.columns[attribute], strict=True)])
        assert same < 1 / len(VALUES[attribute]) + 0.06


def test_a_person_follows_the_family_with_probability_alpha_independently_per_attribute():
    n, alpha = 60_000, 0.4
    people, families = sample_people(n, 5, alpha), sample_people(n, 5, alpha=1)
    follows = {a: np.array(people.columns[a]) == np.array(families.columns[a]) for a in SHARED}
    expected = {a: alpha + (1 - alpha) / len(VALUES[a]) for a in SHARED}
    for attribute in SHARED:
        assert follows[attribute].mean() == pytest.approx(expected[attribute], abs=0.01)
        assert set(people.columns[attribute]) == set(VALUES[attribute])
    for one, other in [SHARED[:2], SHARED[1:], SHARED[::2]]:
        both = (follows[one] & follows[other]).mean()
        assert both == pytest.approx(expected[one] * expected[other], abs=0.01)


def test_at_alpha_one_a_family_shares_all_but_the_birth_date():
    people = sample_people(5_000, seed=2, alpha=1)
    assert people.columns["birth_date"] == sample_people(5_000, seed=2).columns["birth_date"]
    shared = {(last_name(name), *(people.value(i, a) for a in SHARED)) for i, name in enumerate(people.names)}
    assert len(shared) == len({last_name(name) for name in people.names}) == 388


def test_a_family_has_the_same_values_whoever_its_members_are():
    some, others = sample_people(3_000, 7, 1.0), sample_people(3_000, 7, 1.0, start=9_000)
    families = {last_name(name): some.value(i, "occupation") for i, name in enumerate(some.names)}
    assert all(families[last_name(name)] == others.value(i, "occupation") for i, name in enumerate(others.names))


def test_seen_names_in_unseen_pairs_are_those_after_the_trained_ones():
    trained, new = sample_people(8192), sample_people(1000, start=8192)
    firsts, lasts = ({name.split(" ")[i] for name in trained.names} for i in (0, 1))
    assert not set(new.names) & set(trained.names)
    assert all(name.split(" ")[0] in firsts and name.split(" ")[1] in lasts for name in new.names)


def test_the_sample_stays_what_it_was_when_results_were_published():
    assert sample_people(1000, seed=0, alpha=0.5).digest() == "e0cbff0f5c7b07e1"


# ---- People


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
        ({"n_people": -3}, "n_people"),
        ({"n_people": MAX_PEOPLE + 1}, "n_people"),
        ({"n_people": 300_000, **RELEASED._asdict()}, "128 first and 64 last names make 221,184 people at most"),
        ({"csv": "people.csv", "n_families": 64}, "leave them out where facts.csv gives the people"),
        ({"n_families": 389}, "n_families"),
        ({"value_lists": "short"}, "value_lists"),
        ({"n_people": 2.5}, "n_people"),
        ({"seed": -1}, "seed"),
        ({"alpha": 1.1}, "alpha"),
        ({"alpha": -0.1}, "alpha"),
        ({"alpha": math.nan}, "alpha"),
        ({"alpha": "0.5"}, "alpha"),
        ({"csv": 3}, "csv"),
        ({"csv": "people.csv", "alpha": 0.5}, "alpha"),
        ({"people": 3}, "people"),
    ],
)
def test_impossible_facts_are_an_error_that_names_the_field(values, message):
    with pytest.raises(InputError, match=message):
        FactsConfig(**values)


def test_sampling_refuses_what_the_configuration_refuses():
    for arguments in [{"n": 0}, {"n": 3, "alpha": 2.0}, {"n": 3, "seed": -1}, {"n": 3, "start": -1}]:
        with pytest.raises(InputError):
            sample_people(**arguments)
    with pytest.raises(InputError, match="alpha"):
        entropy_bits_per_person(10, alpha=-1)


def test_a_configuration_gives_sampled_people_or_those_of_a_file(tmp_path):
    assert FactsConfig(alpha=1).alpha == 1.0
    config = FactsConfig(n_people=20, seed=3, alpha=0.5)
    assert load_people(config) == sample_people(20, 3, 0.5)
    (tmp_path / "people.csv").write_text("name,pet\nAnn Lee,cat\n")
    assert load_people(FactsConfig(csv=str(tmp_path / "people.csv"))) == People(["Ann Lee"], {"pet": ["cat"]})


_cells = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).map(str.strip).filter(
    lambda cell: cell and "```" not in cell
)  # fmt: skip


@given(st.lists(st.tuples(_cells, _cells, _cells), min_size=1, unique_by=lambda row: row[0]))
def test_people_are_read_from_a_csv_as_they_were_written(tmp_path_factory, rows):
    names, pets, towns = map(list, zip(*rows, strict=True))
    people, path = People(names, {"pet": pets, "town": towns}), tmp_path_factory.mktemp("people") / "people.csv"
    write_people_csv(people, path)
    assert read_people_csv(path) == people and read_people_csv(path).digest() == people.digest()


# ---- Entropy

ALPHAS = (0.0, 1e-6, 0.1, 0.25, 0.5, 0.75, 0.99, 1.0)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize(("n_values", "n_members"), [(2, 1), (2, 8), (3, 6), (5, 4)])
def test_the_entropy_of_a_family_equals_the_sum_over_all_databases(n_values, n_members, alpha):
    b = (1 - alpha) / n_values
    entropy = 0.0
    for values in product(range(n_values), repeat=n_members):
        shares = (values.count(f) for f in range(n_values))
        p = sum((alpha + b) ** count * b ** (n_members - count) for count in shares) / n_values
        entropy -= p * math.log2(p) if p else 0
    assert family_entropies(n_members, n_values, alpha)[-1] == pytest.approx(entropy, abs=0.02)


@pytest.mark.parametrize(("n_members", "alpha"), [(40, 0.5), (40, 0.02), (300, 0.05), (1000, 0.01)])
def test_the_entropy_of_a_large_family_equals_the_sum_over_counts(n_members, alpha):
    """Of two values, the count of the first decides the probability of a database."""
    b = (1 - alpha) / 2
    log_a, log_b = math.log(alpha + b), math.log(b)
    entropy = 0.0
    for count in range(n_members + 1):
        one, other = (k * log_a + (n_members - k) * log_b for k in (count, n_members - count))
        log_p = max(one, other) + math.log1p(math.exp(-abs(one - other))) - math.log(2)
        entropy -= math.exp(math.log(math.comb(n_members, count)) + log_p) * log_p / math.log(2)
    assert family_entropies(n_members, 2, alpha)[-1] == pytest.approx(entropy, abs=0.02)


def test_a_database_without_correlation_has_the_bits_of_its_people():
    assert entropy_bits_per_person(1000) == pytest.approx(bits_per_person(), abs=1e-9)


def test_a_database_of_like_families_has_the_bits_of_its_families():
    n = 2000
    n_families = len({last_name(name) for name in sample_people(n, seed=6).names})
    bits = math.log2(28 * 12 * 51) + n_families * math.log2(7 * 213 * 100) / n
    assert entropy_bits_per_person(n, seed=6, alpha=1.0) == pytest.approx(bits, abs=1e-9)


def test_the_entropy_of_a_database_is_that_of_its_families():
    n, alpha = 3000, 0.3
    families = Counter(last_name(name) for name in sample_people(n, seed=8).names)
    entropies = {a: family_entropies(max(families.values()), len(VALUES[a]), alpha) for a in SHARED}
    bits = sum(entropies[a][m] for m in families.values() for a in SHARED)
    expected = math.log2(28 * 12 * 51) + bits / n
    assert entropy_bits_per_person(n, seed=8, alpha=alpha) == pytest.approx(expected, abs=1e-9)


# ---- The law of the released files


def test_released_people_are_all_pairs_of_128_first_and_64_last_names():
    names = sample_people(8192, seed=3, law=RELEASED).names
    firsts, lasts = ({name.split(" ")[part] for name in names} for part in (0, 1))
    assert (len(firsts), len(lasts)) == (128, 64) and set(names) == {f"{a} {b}" for a in firsts for b in lasts}


@pytest.mark.parametrize(("alpha", "kept"), [(0.0, (7, 213, 100)), (0.25, (5, 159, 75)), (0.5, (3, 106, 50)),
                                             (0.75, (2, 53, 25)), (1.0, (2, 2, 2))])  # fmt: skip
def test_released_value_lists_are_cut_to_what_is_independent(alpha, kept):
    """max(2, floor((1 - alpha) n)) values of each; with 30,000 people every one of them occurs."""
    columns = sample_people(30_000, seed=1, alpha=alpha, law=RELEASED).columns
    assert tuple(len(set(columns[attribute])) for attribute in SHARED) == kept
    assert len(set(columns["birth_date"])) > 10_000


@pytest.mark.parametrize(("n", "alpha", "bits"), [(1000, 1.0, 14.3), (1000, 0.75, 19.4), (1000, 0.5, 24.3)])
def test_released_databases_have_the_bits_that_follow_from_the_released_files(n, alpha, bits):
    assert entropy_bits_per_person(n, alpha=alpha, law=RELEASED) == pytest.approx(bits, abs=0.05)
    assert entropy_bits_per_person(8192, alpha=1.0, law=RELEASED) == pytest.approx(
        math.log2(28 * 12 * 51) + 64 * 3 / 8192, abs=1e-9
    )  # 64 families with three values of two each


def test_of_a_released_family_a_share_alpha_and_the_lucky_ones_have_its_value():
    people = sample_people(20_000, 5, 0.75, law=RELEASED)
    families = Counter(map(last_name, people.names))
    pairs = Counter(zip(map(last_name, people.names), people.columns["occupation"], strict=True))
    with_the_familys = sum(max(n for (name, _), n in pairs.items() if name == family) for family in families)
    assert with_the_familys / len(people) == pytest.approx(0.75 + 0.25 / 25, abs=0.01)


def test_entropy_falls_with_correlation_to_what_the_members_choose_themselves():
    n = 150_000
    bits = [entropy_bits_per_person(n, alpha=alpha) for alpha in (0.0, 0.4, 0.5, 1.0)]
    assert bits == sorted(bits, reverse=True)
    # In a large family the family's value is settled: only the members' own choices are left.
    b = 0.5 / np.array([7, 213, 100])
    own = -((0.5 + b) * np.log2(0.5 + b) + (0.5 - b) * np.log2(b)).sum()
    settled = math.log2(28 * 12 * 51) + own + 388 * math.log2(7 * 213 * 100) / n
    assert bits[2] == pytest.approx(settled, abs=1e-9)


# ---- CSV


def test_people_come_from_a_csv_file_with_attributes_of_its_own(tmp_path):
    path = tmp_path / "people.csv"
    path.write_text('pet,name,first_car\n cat ,"Lee, Ann","a ""red"" Fiat"\ndog,Søren Æ,Saab\n\n', encoding="utf-8-sig")
    assert read_people_csv(path) == People(
        ["Lee, Ann", "Søren Æ"], {"pet": ["cat", "dog"], "first_car": ['a "red" Fiat', "Saab"]}
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no people"),
        ("name,pet\n", "no people"),
        ("who,pet\nAnn,cat\n", "no column 'name'"),
        ("name\nAnn\n", "no attributes"),
        ("name,pet\nAnn,cat\nAnn,dog\n", "'Ann' twice"),
        ("name,pet\nAnn,\n", "person 1"),
        ("name,pet\nAnn,cat\n  ,dog\n", "person 2"),
        ("name,pet\nAnn,cat\nBo\n", "person 2"),
        ("name,pet\nAnn,cat,dog\n", "person 1"),
        ('name,pet\n"Ann\nLee",cat\n', "line break"),
        ('name,pet\nAnn,"big\rcat"\n', "line break"),
        ("name,pet\nAnn,a```b\n", "```"),
        ("name,pet\nAnn,a\0b\n", "control character"),
        ("name,first car\nAnn,Fiat\n", "bad column name 'first car'"),
        ('name,"x"";--"\nAnn,Fiat\n', "bad column name"),
        ("name,\nAnn,Fiat\n", "bad column name ''"),
        ("name,pet,Pet\nAnn,cat,dog\n", "same name"),
        ('name,pet\nAnn,"cat', "cannot read"),
    ],
)
def test_a_bad_csv_file_is_one_sentence(tmp_path, text, message):
    path = tmp_path / "people.csv"
    path.write_text(text, newline="")
    with pytest.raises(InputError, match=message) as caught:
        read_people_csv(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_csv_file_that_cannot_be_read_is_one_sentence(tmp_path):
    (tmp_path / "latin.csv").write_bytes("name,pet\nSøren,cat\n".encode("latin-1"))
    for path in [tmp_path / "missing.csv", tmp_path, tmp_path / "latin.csv"]:
        with pytest.raises(InputError, match=f"cannot read people from {path}"):
            read_people_csv(path)


# ---- The database


def rows(path, query="SELECT * FROM people"):
    connection = sqlite3.connect(path)
    try:
        return connection.execute(query).fetchall()
    finally:
        connection.close()


@pytest.mark.parametrize("n", [1, 20, 47])
def test_the_database_holds_everyone_by_name(tmp_path, n):
    people, path = sample_people(n, seed=1), tmp_path / "people.db"
    write_database(people, path)
    assert sorted(rows(path)) == sorted(zip(people.names, *people.columns.values(), strict=True))
    columns = [(name, kind, key) for _, name, kind, _, _, key in rows(path, "PRAGMA table_info(people)")]
    assert columns == [("name", "TEXT", 1), *((attribute, "TEXT", 0) for attribute in ATTRIBUTES)]
    plan = rows(path, "EXPLAIN QUERY PLAN SELECT occupation FROM people WHERE name = 'Ann Lee'")
    assert "PRIMARY KEY" in plan[0][3]
    assert [file.name for file in tmp_path.iterdir()] == ["people.db"]


def test_columns_may_be_words_of_sql(tmp_path):
    people = People(['Ann "Bo" O\'Lee'], {"order": ["x'y"], "group": ["select"]})
    write_database(people, tmp_path / "people.db")
    assert rows(tmp_path / "people.db", 'SELECT name, "order", "group" FROM people') == [
        ('Ann "Bo" O\'Lee', "x'y", "select")
    ]


def test_a_database_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "people.db"
    write_database(sample_people(5), path)
    before = path.read_bytes()
    twins = People(["Ann", "Ann"], {"pet": ["cat", "dog"]})
    with pytest.raises(InputError, match="cannot write the database"):
        write_database(twins, path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["people.db"]


def test_a_database_takes_a_file_name_in_an_existing_folder(tmp_path):
    (tmp_path / "file").touch()
    for path in [tmp_path, tmp_path / "missing" / "people.db", tmp_path / "file" / "people.db"]:
        with pytest.raises(InputError, match="existing folder"):
            write_database(sample_people(1), path)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_million_people_take_at_most_ten_seconds_at_the_rate_of_a_tenth(tmp_path):
    start = process_time()
    write_database(sample_people(100_000), tmp_path / "people.db")
    assert process_time() - start < 1.0
