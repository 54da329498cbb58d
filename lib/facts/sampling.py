"""Sampled people, and people that nobody was trained on (Section 5)."""

from itertools import islice

import numpy as np

from lib.base import InputError
from lib.facts.csv import read_people_csv
from lib.facts.people import FIRST_NAMES, LAST_NAMES, MIDDLES, OURS, SHARED, VALUES, FactsConfig, Law, NameList, People


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
