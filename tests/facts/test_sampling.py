"""Sampled people: their streams, families and laws."""

import math
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.base import InputError
from lib.facts.entropy import entropy_bits_per_person
from lib.facts.people import ATTRIBUTES, MAX_PEOPLE, RELEASED, SHARED, VALUES, FactsConfig, People
from lib.facts.sampling import load_people, sample_people, with_bosses

N_PLAIN_NAMES = 437 * 388


def last_name(name: str) -> str:
    return name.split(" ")[-1]


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 2**63 - 1), st.floats(0, 1))
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
    with pytest.raises(InputError, match="4578012 names"):
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


def test_the_sample_stays_what_it_was_when_results_were_published():
    assert sample_people(1000, seed=0, alpha=0.5).digest() == "e0cbff0f5c7b07e1"


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


def test_of_a_released_family_a_share_alpha_and_the_lucky_ones_have_its_value():
    people = sample_people(20_000, 5, 0.75, law=RELEASED)
    families = Counter(map(last_name, people.names))
    pairs = Counter(zip(map(last_name, people.names), people.columns["occupation"], strict=True))
    with_the_familys = sum(max(n for (name, _), n in pairs.items() if name == family) for family in families)
    assert with_the_familys / len(people) == pytest.approx(0.75 + 0.25 / 25, abs=0.01)


def test_everybody_has_a_boss_who_is_any_of_the_others():
    people = sample_people(5)
    drawn = [with_bosses(people, seed) for seed in range(2_000)]
    assert with_bosses(people, 7) == drawn[7]
    for i, name in enumerate(people.names):
        counts = Counter(each.columns["boss"][i] for each in drawn)
        assert set(counts) == {*people.names} - {name}
        assert all(abs(count - 500) < 5 * math.sqrt(2_000 * 3 / 16) for count in counts.values())
    assert drawn[0].attributes == ("boss", *people.attributes) and drawn[0].names == people.names
    assert {a: drawn[0].columns[a] for a in people.attributes} == people.columns


def test_nobody_is_his_own_boss():
    with pytest.raises(InputError, match="^nobody is left to be the boss: give at least two people$"):
        with_bosses(sample_people(1))
