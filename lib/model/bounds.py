"""Section 4's lower bound on the parameters of a model that recalls facts from its weights.

There are at most 2^(bP) models of P parameters with b bits each. A model that recalls all facts determines the
database, so |D| possible databases need |D| models: bP >= log2 |D|. For random databases bP >= H(D), the entropy
(`lib.facts.entropy`).
"""

from collections.abc import Sequence
from math import log2

from lib.base import InputError
from lib.facts.people import VALUES

#: The most bits that a trained parameter was measured to hold, by source.
MEASURED_BITS = {"Allen-Zhu & Li 2024": 2.0, "Morris et al. 2025": 3.6}
#: Parameters of `lib.model.circuit.Circuit()`, which is not imported here because it needs torch.
BY_HAND_PARAMETERS = 66_016


def database_bits(n_names: int, n_values: Sequence[int]) -> float:
    """Return log2 of the number of databases: |N| sum_a log2 |V_a| for names N and `n_values` = |V_a|."""
    return n_names * sum(map(log2, n_values))


def bits_at_recall(recall: float, n_values: Sequence[int] = tuple(map(len, VALUES.values()))) -> float:
    """Return the bits per name that it takes to recall a share of independent uniform facts (share 1: `database_bits`).

    By Fano's inequality a fact with V values that is wrong with probability e leaves h(e) + e log2(V - 1) bits open,
    h the binary entropy. For errors of mean 1 - `recall`, the sum of these bits over attributes is largest at
    e = (V - 1) t / (1 + (V - 1) t) with one t for all. An optimal code takes as many bits (rate-distortion), so this
    bounds any model.
    """
    if not 0 < recall <= 1:
        raise InputError(f"recall = {recall}: give more than 0 and at most 1")
    low, high = 0.0, 1.0  # t = 1 is guessing
    for _ in range(100):
        t = (low + high) / 2
        errors = [(n - 1) * t / (1 + (n - 1) * t) for n in n_values]
        low, high = (t, high) if sum(errors) < (1 - recall) * len(errors) else (low, t)
    # (p, k): k values share the probability p; the right one has 1 - e, the V - 1 others have e.
    outcomes = [(p, k) for n, e in zip(n_values, errors, strict=True) for p, k in ((1 - e, 1), (e, n - 1)) if p > 0]
    return sum(map(log2, n_values)) + sum(p * log2(p / k) for p, k in outcomes)
