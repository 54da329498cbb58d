"""Entropy of the facts, in bits: what an in-weight model has to store (Sections 4 and 5.3)."""

from functools import cache
from math import ceil, exp, lgamma, log, log2, pi, sqrt

import numpy as np

from lib.facts.people import OURS, SHARED, VALUES, FactsConfig, Law
from lib.facts.sampling import _name_codes

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


def shared_value_entropy(n_members: int, n_values: int, alpha: float) -> float:
    """Joint entropy in bits of one attribute over the `n_members` of a family whose own value is unknown.

    The family's value F is uniform over V = `n_values`; each member takes it with probability `alpha` and draws
    uniformly otherwise, so that a member shows F with probability a = alpha + b and any other value with
    b = (1 - alpha) / V. By the chain rule H(X) = H(F) + H(X | F) - H(F | X). Exact to about 1e-10 bits.
    """
    if alpha == 0:
        return n_members * log2(n_values)
    if alpha == 1:
        return log2(n_values)
    b = (1 - alpha) / n_values
    a = alpha + b
    given_family = -n_members * (a * log2(a) + (n_values - 1) * b * log2(b))
    return log2(n_values) + given_family - _family_given_members(n_members, n_values, a, b)


def _family_given_members(m: int, n_values: int, a: float, b: float, step: float = 0.25) -> float:
    """H(F | X) in bits: how uncertain the family's value still is to one who knows all m members.

    With r = a / b and c_f the number of members that show f, the posterior of f is r^c_f / S, S = sum_f r^c_f, hence
    H(F | X) = E[log S] - m a log r in nats. The expectation comes from log S = integral of (e^-t - e^-tS) du with
    t = e^u. That integrand is analytic for |Im u| < pi / 2: the trapezoid rule converges like exp(-pi^2 / step).

    The counts become independent when m is made Poisson, which gives m! [z^m] A(z) B(z)^(V-1) for E[e^-tS], with
    A(z) = sum_c (a z)^c / c! exp(-t r^c) for the family's value and B, with b, for each other one. Cauchy's formula
    reads that coefficient off the circle |z| = m.
    """
    # log(1 + sum w) <= sum sqrt(w) bounds the answer: large families settle what their value is.
    if (n_values - 1) * (1 - (sqrt(a) - sqrt(b)) ** 2) ** m < 1e-14:
        return 0.0
    log_r = log(a / b)
    # Bernstein's inequality: a count leaves [low, high] with probability below e^-45.
    margin = 15 + sqrt(225 + 90 * m * a)
    low, high = max(0.0, m * a - margin), min(m, ceil(m * a + margin))
    counts = np.arange(high + 1)
    # S is taken in units of r^low, hence log S lies between 0 and log V + (high - low) log r.
    u = np.arange(-45 - log(n_values) - (high - low) * log_r, 4, step)
    decay = np.exp(-np.exp(np.minimum(u[:, None] + (counts - low) * log_r, 50)))  # exp(-t r^c), (T, C)
    # Coefficients of e^z at m + n_points and m - n_points, which alias onto m, are smaller by e^-45 on this circle.
    n_points = 20 + ceil(10 * sqrt(m))
    angles = 2j * pi / n_points * np.arange(n_points)
    log_factorials = np.cumsum(np.log(np.maximum(counts, 1)))

    def series(p: float) -> np.ndarray:
        """A or B on the circle, times exp(-p m): (T, n_points)."""
        poisson = np.exp(counts * log(p * m) - log_factorials - p * m)
        return decay @ (poisson[:, None] * np.exp(np.outer(counts, angles)))

    product = series(a) * series(b) ** (n_values - 1) * np.exp(-m * angles)
    laplace = product.mean(axis=1).real / exp(m * log(m) - lgamma(m + 1) - m)
    expected_log = step * float(np.sum(np.exp(-np.exp(u)) - laplace))
    return (expected_log + (low - m * a) * log_r) / log(2)
