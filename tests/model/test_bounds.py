"""Section 4's lower bound against counting: all databases, all decoders, all errors."""

from itertools import product
from math import log2

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.base import InputError
from lib.facts.entropy import entropy_bits_per_person
from lib.facts.people import VALUES
from lib.facts.sampling import sample_people
from lib.model.bounds import bits_at_recall, database_bits


@pytest.mark.parametrize("n_names, n_values", [(1, [2]), (3, [2]), (2, [3, 2]), (2, [4, 3, 1]), (1, [5, 3, 2])])
def test_bits_are_the_logarithm_of_how_many_databases_there_are(n_names, n_values):
    people = list(product(*map(range, n_values)))
    databases = set(product(people, repeat=n_names))
    assert 2 ** database_bits(n_names, n_values) == pytest.approx(len(databases))


@pytest.mark.parametrize("n_databases", [1, 2, 3, 4, 5])
def test_no_decoder_recalls_more_databases_than_the_bound_allows_and_some_decoder_does_with_that_many(n_databases):
    for n_bits in range(4):  # a model of so many parameters of one bit each is a choice of one of 2^n_bits weights
        decoders = product(range(n_databases), repeat=2**n_bits)
        most = max(len(set(recalled)) for recalled in decoders)
        assert (most == n_databases) == (n_bits >= log2(n_databases) - 1e-9)


def test_independent_people_are_one_of_all_databases_and_families_at_alpha_1_share_what_is_not_a_birth_date():
    sizes = [len(values) for values in VALUES.values()]
    assert 50 * entropy_bits_per_person(50) == pytest.approx(database_bits(50, sizes))
    people = sample_people(50, seed=3, alpha=1.0)
    families = {name.split()[-1] for name in people.names}
    births, *shared = sizes
    assert 1 < len(families) < 50
    alike, half, independent = (50 * entropy_bits_per_person(50, 3, alpha) for alpha in (1.0, 0.5, 0.0))
    assert alike == pytest.approx(50 * log2(births) + len(families) * sum(map(log2, shared)))
    assert alike < half < independent


@given(st.lists(st.integers(1, 50), min_size=1, max_size=4))
def test_recalling_everything_takes_all_bits_and_guessing_takes_none(n_values):
    assert bits_at_recall(1, n_values) == pytest.approx(database_bits(1, n_values), abs=1e-6)
    by_chance = sum(1 / n for n in n_values) / len(n_values)
    assert bits_at_recall(by_chance, n_values) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("n_values, recall", [((2, 30), 0.9), ((5, 5), 0.7), ((3, 100), 0.6), ((2, 2), 0.55)])
def test_a_share_of_recall_takes_what_the_best_choice_of_errors_leaves(n_values, recall):
    """Two attributes, all ways to share the errors out: the least rate of a code is at the best of them."""
    first = np.linspace(1e-9, 1 - 1e-9, 20_001)
    errors = np.stack([first, 2 * (1 - recall) - first])
    allowed = [(0 < e) & (e <= 1 - 1 / n) for e, n in zip(errors, n_values, strict=True)]
    errors = errors[:, allowed[0] & allowed[1]]
    n = np.array(n_values)[:, None]
    rate = np.log2(n) + errors * np.log2(errors / (n - 1)) + (1 - errors) * np.log2(1 - errors)
    assert bits_at_recall(recall, n_values) == pytest.approx(rate.sum(0).min(), abs=1e-6)


def test_one_attribute_at_a_share_of_recall_is_the_rate_that_blahut_and_arimoto_find():
    n, multiplier = 6, 2.5
    weights = np.exp(-multiplier * (1 - np.eye(n)))  # distortion: wrong or not
    output = np.full(n, 1 / n)
    for _ in range(200):
        channel = weights * output
        channel /= channel.sum(1, keepdims=True)
        output = channel.mean(0)
    rate = (channel * np.log2(channel / output)).sum() / n
    assert bits_at_recall(np.trace(channel) / n, [n]) == pytest.approx(rate)


@pytest.mark.parametrize("recall", [0, -0.1, 1.01, float("nan")])
def test_a_recall_that_is_no_share_is_refused(recall):
    with pytest.raises(InputError, match="^recall = .*: give more than 0 and at most 1$"):
        bits_at_recall(recall)
