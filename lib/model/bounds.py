"""Section 4's lower bound: how many parameters a model needs at least that recalls facts from its weights.

A model of P parameters with b bits each is one of at most 2^(bP). Where the facts can be read off the model, two
databases take two models: of |D| databases, bP >= log2 |D|. Of random ones, bP >= H(D), the entropy.
"""

from collections.abc import Sequence
from math import log2

from lib.base import InputError
from lib.facts.entropy import entropy_bits_per_person
from lib.facts.people import VALUES

#: Bits that a trained parameter was measured to hold at most, by who measured it.
MEASURED_BITS = {"Allen-Zhu & Li 2024": 2.0, "Morris et al. 2025": 3.6}
#: Parameters of `lib.model.circuit.Circuit()`, which is not imported here because it needs torch.
BY_HAND_PARAMETERS = 66_016


def parameters_needed(bits: float, bits_per_parameter: float) -> float:
    """P >= bits / b, for `bits` = log2 of how many databases there may be, or their entropy (Section 4)."""
    if not bits_per_parameter > 0:
        raise InputError(f"bits_per_parameter = {bits_per_parameter}: give more than 0")
    return bits / bits_per_parameter


def database_bits(n_names: int, n_values: Sequence[int]) -> float:
    """log2 of the number of databases: |N| sum_a log2 |V_a| for names N and `n_values` = |V_a| of each attribute."""
    return n_names * sum(map(log2, n_values))


def people_bits(n_people: int, alpha: float = 0.0, seed: int = 0) -> float:
    """Entropy in bits of the database of `sample_people(n_people, seed, alpha)`, given the names.

    At alpha = 0 it is `database_bits`. Otherwise all those databases are still possible, but not alike: the bound is
    then one for recalling a random one.
    """
    return n_people * entropy_bits_per_person(n_people, seed, alpha)


def bits_at_recall(recall: float, n_values: Sequence[int] = tuple(map(len, VALUES.values()))) -> float:
    """Bits a name that are needed to recall only a share of independent uniform facts: `database_bits` if it is 1.

    By Fano's inequality a fact with V values that is wrong with probability e leaves h(e) + e log2(V - 1) bits open.
    The sum over attributes is largest, for errors of mean 1 - `recall`, where e = (V - 1) t / (1 + (V - 1) t) with the
    same t for all. It is what a best code takes (the rate-distortion function), so the bound is one for any model.
    """
    if not 0 < recall <= 1:
        raise InputError(f"recall = {recall}: give more than 0 and at most 1")
    low, high = 0.0, 1.0  # t = 1 is guessing
    for _ in range(100):
        t = (low + high) / 2
        errors = [(n - 1) * t / (1 + (n - 1) * t) for n in n_values]
        low, high = (t, high) if sum(errors) < (1 - recall) * len(errors) else (low, t)
    return sum(log2(n) - _open_bits(error, n) for n, error in zip(n_values, errors, strict=True))


def _open_bits(error: float, n_values: int) -> float:
    """h(e) + e log2(V - 1): the entropy of a value that is known but for an error."""
    outcomes = [(1 - error, 1), (error, n_values - 1)]
    return -sum(p * log2(p / n) for p, n in outcomes if p > 0)
