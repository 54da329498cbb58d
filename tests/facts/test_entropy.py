"""Entropy against brute force: sums over all databases, and over counts."""

import math
from collections import Counter
from itertools import product

import numpy as np
import pytest

from lib.facts.entropy import bits_per_person, entropy_bits_per_person, family_entropies
from lib.facts.people import ATTRIBUTES, RELEASED, SHARED, VALUES
from lib.facts.sampling import sample_people


def last_name(name: str) -> str:
    return name.split(" ")[-1]


def test_a_person_has_31_and_a_quarter_bits():
    assert tuple(VALUES) == ATTRIBUTES
    assert [len(set(values)) for values in VALUES.values()] == [28 * 12 * 51, 7, 213, 100]
    assert bits_per_person() == pytest.approx(math.log2(28 * 12 * 51 * 7 * 213 * 100))
    assert round(bits_per_person(), 2) == 31.25


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


@pytest.mark.parametrize(("n", "alpha", "bits"), [(1000, 1.0, 14.3), (1000, 0.75, 19.4), (1000, 0.5, 24.3)])
def test_released_databases_have_the_bits_that_follow_from_the_released_files(n, alpha, bits):
    assert entropy_bits_per_person(n, alpha=alpha, law=RELEASED) == pytest.approx(bits, abs=0.05)
    assert entropy_bits_per_person(8192, alpha=1.0, law=RELEASED) == pytest.approx(
        math.log2(28 * 12 * 51) + 64 * 3 / 8192, abs=1e-9
    )  # 64 families with three values of two each


def test_entropy_falls_with_correlation_to_what_the_members_choose_themselves():
    n = 150_000
    bits = [entropy_bits_per_person(n, alpha=alpha) for alpha in (0.0, 0.4, 0.5, 1.0)]
    assert bits == sorted(bits, reverse=True)
    # In a large family the family's value is settled: only the members' own choices are left.
    b = 0.5 / np.array([7, 213, 100])
    own = -((0.5 + b) * np.log2(0.5 + b) + (0.5 - b) * np.log2(b)).sum()
    settled = math.log2(28 * 12 * 51) + own + 388 * math.log2(7 * 213 * 100) / n
    assert bits[2] == pytest.approx(settled, abs=1e-9)
