"""Sampled people, and people that no model was trained on (Section 5)."""

from itertools import islice

import numpy as np

from lib.base import InputError
from lib.facts.csv import read_people_csv
from lib.facts.people import FIRST_NAMES, LAST_NAMES, LINK, MIDDLES, OURS, SHARED, VALUES, FactsConfig, Law, People

#: Unseen people by what is new in their names: the first name, the last name (Section 5.2).
UNSEEN = {"new_pair": (False, False), "new_first": (True, False), "new_last": (False, True), "new_both": (True, True)}

#: Ids of random streams. Draw i of a stream is the same however many are drawn, so the first n people never change.
_ORDER, _MIDDLE_ORDER, _OWN_VALUE, _FOLLOWS_FAMILY, _FAMILY_VALUE, _UNSEEN, _BOSS = range(7)


def load_people(config: FactsConfig) -> People:
    """Return the people that a configuration describes."""
    if config.csv is not None:
        return read_people_csv(config.csv)
    return sample_people(config.n_people, config.seed, config.alpha, law=config.law)


def sample_people(n: int, seed: int = 0, alpha: float = 0.0, start: int = 0, law: Law = OURS) -> People:
    """Return people `start` to `start + n` of the sequence that `seed` and `law` define (Section 5).

    Birth place, address and occupation are each, independently, the family's with probability `alpha`, otherwise a
    draw of the person's own. Names do not depend on `alpha`; a family's values do not depend on its members.

    Raises `InputError` for values that `FactsConfig` refuses, and if there are not enough names.
    """
    FactsConfig(n_people=n, seed=seed, alpha=alpha, **law._asdict())
    firsts, lasts = law.names()
    first, middle, last = name_codes(start, n, seed, law)
    parts = zip(_decode(firsts, first), _decode(MIDDLES, middle), _decode(lasts, last), strict=True)
    names = [f"{one} {two}{three}" for one, two, three in parts]
    columns = {}
    for k, attribute in enumerate(VALUES):
        values = law.values(attribute, alpha)
        codes = _choices(len(values), start, n, seed, _OWN_VALUE, 0, 0, k)
        if attribute in SHARED and alpha > 0:
            family = _choices(len(values), 0, len(lasts), seed, _FAMILY_VALUE, 0, k)
            codes = np.where(_uniform(start, n, seed, _FOLLOWS_FAMILY, 0, 0, k) < alpha, family[last], codes)
        columns[attribute] = _decode(values, codes)
    return People(names, columns)


def name_codes(start: int, n: int, seed: int, law: Law) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return each person's first name, middle and last name as indices: three (n,) arrays."""
    n_firsts, n_lasts = map(len, law.names())
    n_pairs = n_firsts * n_lasts
    if start < 0 or start + n > n_pairs * len(MIDDLES):
        raise InputError(
            f"people {start} to {start + n} do not exist: there are {n_pairs * len(MIDDLES)} names, numbered from 0"
        )
    order = np.argsort(_uniform(0, n_pairs, seed, _ORDER, 0, 0), kind="stable")
    if start + n > n_pairs:
        with_initial = _uniform(0, n_pairs * (len(MIDDLES) - 1), seed, _MIDDLE_ORDER, 0, 0)
        order = np.concatenate([order, n_pairs + np.argsort(with_initial, kind="stable")])
    middle, pair = np.divmod(order[start : start + n], n_pairs)
    first, last = np.divmod(pair, n_lasts)
    return first, middle, last


def unseen_people(config: FactsConfig, n: int) -> dict[str, People]:
    """Return `n` people of each kind of `UNSEEN`, or as many as exist; none is among the sampled people of `config`.

    New first and last names are in no training list; the others are names of people of `config`. Facts are independent
    draws. Raises `InputError` for people of a CSV file: which names are new is not known there.
    """
    if config.csv is not None:
        raise InputError(f"{config.csv} has no unseen people: they exist for sampled people only")
    trained = set(sample_people(config.n_people, config.seed, law=config.law).names)
    seen_firsts, seen_lasts = (sorted({name.split()[part] for name in trained}) for part in (0, -1))
    groups = {}
    for kind, new in UNSEEN.items():
        firsts = FIRST_NAMES["unseen"] if new[0] else seen_firsts
        lasts = LAST_NAMES["unseen"] if new[1] else seen_lasts
        order = np.argsort(_uniform(0, len(firsts) * len(lasts), config.seed, _UNSEEN, *new))
        pairs = (f"{firsts[i // len(lasts)]} {lasts[i % len(lasts)]}" for i in order.tolist())
        names = list(islice((name for name in pairs if name not in trained), n))
        columns = {}
        for k, attribute in enumerate(VALUES):
            values = config.law.values(attribute, config.alpha)
            columns[attribute] = _decode(values, _choices(len(values), 0, len(names), config.seed, _UNSEEN, *new, k))
        groups[kind] = People(names, columns)
    return groups


def with_bosses(people: People, seed: int = 0) -> People:
    """Return the same people with one more attribute, `LINK`: another person, drawn uniformly (our Section 7.2).

    A single person is an `InputError`.
    """
    if (n := len(people)) < 2:
        raise InputError("nobody is left to be the boss: give at least two people")
    bosses = (np.arange(n) + 1 + _choices(n - 1, 0, n, seed, _BOSS)) % n
    return People(people.names, {LINK: _decode(tuple(people.names), bosses), **people.columns})


def _uniform(start: int, n: int, seed: int, *stream: int) -> np.ndarray:
    """Return numbers `start` to `start + n` of a stream, uniform on [0, 1).

    Made from PCG64's raw bits, which are the same in all versions of numpy, unlike the numbers of `Generator`.
    """
    bits = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=stream))
    return (bits.advance(start).random_raw(n) >> np.uint64(11)) * 2.0**-53


def _choices(n_values: int, start: int, n: int, seed: int, *stream: int) -> np.ndarray:
    """Return indices (n,) of values, all equally likely."""
    return (_uniform(start, n, seed, *stream) * n_values).astype(int)


def _decode(values: tuple[str, ...], codes: np.ndarray) -> list[str]:
    return np.array(values, dtype=object)[codes].tolist()
