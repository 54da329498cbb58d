"""The paper's experiments as data: a section and a profile give searches, and searches give the runs to do.

A search looks for the smallest model that reaches a recall threshold on one database: from where it is expected by
growing strides to a bracket, then by bisection, then below what it found, for luck makes recall uneven in size. What it
needs next is a function of the finished rows alone, so a sweep of searches resumes from the rows and repeats nothing.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from itertools import product

from lib.base import InputError
from lib.config import EvaluationConfig, ModelConfig, OptimConfig, RunConfig, TrainingConfig, override
from lib.dialogs.tokenizers import load_tokenizer
from lib.experiments.search import SIZES, Search
from lib.facts.people import OURS, RELEASED, FactsConfig, Law
from lib.paths import PUBLISHING


def searches(section: str, profile: str, tokenizer: str = "bytes") -> list[Search]:
    """All searches of a section in a profile, in the order in which they are worth doing.

    tokenizer: as `RunConfig.tokenizer`, for profiles that do not publish; what is published is of bytes.
    """
    if profile not in _SECTIONS.get(section, ()):
        known = ", ".join(f"{name} ({', '.join(profiles)})" for name, profiles in _SECTIONS.items())
        raise InputError(f"there is no experiment {section} in the profile {profile}: there are {known}")
    plan = list(_SECTIONS[section][profile]())
    if tokenizer == "bytes":
        return plan
    if profile in PUBLISHING:
        raise InputError(f"tokenizer = {tokenizer!r} in the profile {profile}, which publishes: its runs are of bytes")
    fields = {"tokenizer": tokenizer, "model.vocab_size": load_tokenizer(tokenizer).vocab_size}
    return [dataclasses.replace(search, base=override(search.base, fields)) for search in plan]


# Recipes --------------------------------------------------------------------------------------------------------------

#: Ours, for both modes, frozen on 2026-11-28 as "focal-32" (LOG.md has the measurements); `_focal` is the rest of it.
FOCAL_32 = OptimConfig(
    name="muon", lr=1e-2, muon_lr=2e-2, weight_decay=0.1, beta2=0.95, schedule="linear", clip_norm=1.0
)
#: For quick runs: complete recall of small databases in hundreds of steps.
FAST = OptimConfig(name="muon", lr=1e-2, muon_lr=2e-2, beta2=0.95, schedule="cosine", clip_norm=1.0)
#: The same in-tool, with the decay that is published: it makes models copy names.
COPYING = FAST.model_copy(update={"weight_decay": 0.1})
#: As published, and as the files released with the paper say.
PAPER = OptimConfig(
    name="adamw", lr=1e-3, weight_decay=0.1, decay_norms=True, beta2=0.95, warmup_steps=50, clip_norm=None
)


# 5.1 Parameter bounds -------------------------------------------------------------------------------------------------


def _database(mode: str, n_facts: int, seed: int, **groups) -> RunConfig:
    """A run on a database of its own: the seed draws the people, the initialization and the order of the data."""
    return RunConfig(mode=mode, seed=seed, facts=FactsConfig(n_people=n_facts // 4, seed=seed), **groups)


def _expected_start(mode: str, n_facts: int) -> int:
    """Where to begin: a line near the published points, in-tool a steeper one that ends at 23,000 parameters."""
    expected = 5000 + 8 * n_facts if mode == "in-weight" else min(5000 + 40 * n_facts, 23_000)
    sizes = [ModelConfig(d_model=size).n_params for size in SIZES]
    return next((i for i, n_params in enumerate(sizes) if n_params >= expected), len(sizes) - 1)


def _bounds(mode: str, n_facts: int, seed: int, training: TrainingConfig, evaluation: EvaluationConfig) -> Search:
    base = _database(mode, n_facts, seed, optim=FAST, training=training, evaluation=evaluation)
    return Search(base, start=_expected_start(mode, n_facts))


def _bounds_smoke() -> Iterator[Search]:
    for mode in ("in-weight", "in-tool"):
        base = _database(mode, 8, 0, training=TrainingConfig(steps=20), evaluation=EvaluationConfig(every=None))
        yield Search(base, threshold=None, sizes=(4,))


def _bounds_quick() -> Iterator[Search]:
    training, evaluation = TrainingConfig(steps=600, batch_size=32), EvaluationConfig(every=50)
    for mode, n_facts in (("in-tool", 16), ("in-weight", 64), ("in-weight", 16)):
        yield _bounds(mode, n_facts, 0, training, evaluation)


def _focal(steps: int) -> TrainingConfig:
    return TrainingConfig(steps=steps, batch_size=32, length_pool=1, loss="focal")


def _enough_steps(n_facts: int) -> TrainingConfig:
    """300 passes over the facts, for a fixed number of steps would bend the slope; small databases take more."""
    return _focal(max(8000, 300 * n_facts // 32))


def _bounds_laptop() -> Iterator[Search]:
    """In-weight; in-tool the runs of 5.2 serve here, too."""
    for n_facts in (2**k for k in range(6, 15)):  # twice the facts, four times the work: all seeds of few facts first
        for seed in range(3):
            training = _enough_steps(n_facts)
            evaluation = EvaluationConfig(every=training.steps // 40, give_up_below=0.01)
            base = _database("in-weight", n_facts, seed, optim=FOCAL_32, training=training, evaluation=evaluation)
            yield Search(base, start=_expected_start("in-weight", n_facts))


def _published_recipe(mode: str, n_facts: int, seed: int, **evaluation) -> RunConfig:
    """A run as published: 100,000 steps of 128 dialogs.

    One difference stays: the published seeds change the order of the data alone, ours the people and the initialization
    as well.
    """
    return _database(
        mode,
        n_facts,
        seed,
        model=ModelConfig(rope="paper"),
        optim=PAPER,
        training=TrainingConfig(steps=100_000, batch_size=128, checkpoint_every=5000),
        evaluation=EvaluationConfig(every=5000, stop_at_recall=None, **evaluation),
    )


def _bounds_paper() -> Iterator[Search]:
    """26 sizes, 2 to 32,768 people, 10 seeds, both modes: 7,800 runs of 100,000 steps."""
    for n_facts in (4 * 2**k for k in range(1, 16)):
        for mode in ("in-weight", "in-tool"):
            for seed in range(10):
                yield Search(_published_recipe(mode, n_facts, seed), threshold=None)


# 5.1, biographies as well as questions --------------------------------------------------------------------------------


def _with_biographies(search: Search) -> Search:
    """The same search with a biography of everyone for each time that their four questions are asked.

    A quarter more dialogs, so that the questions are asked as often as without.
    """
    base = search.base
    steps = math.ceil(base.training.total_steps(4 * base.facts.n_people) / (1 - BIOGRAPHIES))
    training = base.training.model_copy(update={"biographies": BIOGRAPHIES, "steps": steps})
    return dataclasses.replace(search, base=base.model_copy(update={"training": training}))


#: Their share of the dialogs: one biography for every four questions.
BIOGRAPHIES = 0.2


def _biographies_smoke() -> Iterator[Search]:
    yield from (_with_biographies(search) for search in _bounds_smoke() if search.base.mode == "in-weight")


def _biographies_quick() -> Iterator[Search]:
    yield from (_with_biographies(search) for search in _bounds_quick() if search.base.mode == "in-weight")


def _biographies_laptop() -> Iterator[Search]:
    """Two numbers of facts."""
    for search in _bounds_laptop():
        if 4 * search.base.facts.n_people in (512, 1024):
            yield _with_biographies(search)


def _biographies_paper() -> Iterator[Search]:
    for search in _bounds_paper():
        if search.base.mode == "in-weight" and 4 * search.base.facts.n_people in (1024, 8192):
            yield _with_biographies(search)


# 5.2 Generalization ---------------------------------------------------------------------------------------------------


def _generalization(
    mode: str, n_facts: int, seed: int, sizes: tuple[int, ...], training: TrainingConfig, unseen: int
) -> Search:
    """Every run takes all its steps: the rule for copying comes later than the recall of those who were trained on."""
    every = 500 * 64 // training.batch_size
    evaluation = EvaluationConfig(every=every, questions=256, stop_at_recall=None, unseen_people=unseen)
    quick = COPYING if mode == "in-tool" else FAST
    optim = FOCAL_32 if training.loss == "focal" else quick
    base = _database(mode, n_facts, seed, optim=optim, training=training, evaluation=evaluation)
    return Search(base, threshold=None, sizes=sizes)


def _generalization_smoke() -> Iterator[Search]:
    for mode in ("in-tool", "in-weight"):
        yield _generalization(mode, 8, 0, (4,), TrainingConfig(steps=20, batch_size=64), 2)


def _generalization_quick() -> Iterator[Search]:
    for n_facts in (16, 256):
        yield _generalization("in-tool", n_facts, 0, (24,), TrainingConfig(steps=1500, batch_size=16), 25)
    yield _generalization("in-weight", 256, 0, (24,), TrainingConfig(steps=500, batch_size=64), 25)


def _generalization_laptop() -> Iterator[Search]:
    """In-tool, the smallest model that recalls 95%. Where these searches begin, at d = 24, every seed has a model of
    every number of facts, ten seeds at three of them: they show how many seeds generalize. In-weight is the control.
    """
    ten_seeds = (1024, 8192, 32_768)
    for n_facts in (*ten_seeds, *(2**k for k in range(14, 5, -1) if 2**k not in ten_seeds)):
        for seed in range(3):
            grid = _generalization("in-tool", n_facts, seed, IN_TOOL_SIZES, IN_TOOL, 1000)
            yield dataclasses.replace(grid, threshold=0.95, start=IN_TOOL_SIZES.index(24), neighbours=1)
        for seed in range(3, 10 if n_facts in ten_seeds else 3):
            yield _generalization("in-tool", n_facts, seed, (24,), IN_TOOL, 1000)
    for seed in range(3):
        for n_facts in (256, 1024, 4096):
            yield _generalization("in-weight", n_facts, seed, (36,), _enough_steps(n_facts), 1000)


#: 384,000 dialogs, whatever the number of facts.
IN_TOOL = _focal(12_000)
#: Around the smallest that reached 95% with any number of facts.
IN_TOOL_SIZES = (8, 12, 16, 20, 24, 28)


def _generalization_paper() -> Iterator[Search]:
    """Five sizes, 64 to 32,768 people, both modes, one seed: as published, but 1,000 unseen people of each kind."""
    for n_facts in (2**k for k in range(8, 18)):
        for mode in ("in-tool", "in-weight"):
            yield Search(_published_recipe(mode, n_facts, 0, unseen_people=1000), None, sizes=(24, 36, 56, 96, 128))


# 5.3 Compressibility --------------------------------------------------------------------------------------------------

ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)


def _correlated(base: RunConfig, alpha: float) -> RunConfig:
    return override(base, {"facts.alpha": alpha})


def _with_law(base: RunConfig, law: Law) -> RunConfig:
    return override(base, {f"facts.{field}": value for field, value in law._asdict().items()})


def _compressibility_smoke() -> Iterator[Search]:
    base = _database("in-weight", 8, 0, training=TrainingConfig(steps=20), evaluation=EvaluationConfig(every=None))
    yield Search(_correlated(base, 0.5), threshold=None, sizes=(4,))


def _compressibility_quick() -> Iterator[Search]:
    training, evaluation = TrainingConfig(steps=1000, batch_size=32), EvaluationConfig(every=100)
    base = _database("in-weight", 128, 0, optim=FAST, training=training, evaluation=evaluation)
    for alpha in (0.0, 1.0):
        yield Search(_correlated(base, alpha), threshold=None, sizes=(8, 12, 16))


def _compressibility_laptop() -> Iterator[Search]:
    """4,000 facts, of the released law and of ours; each search begins at the published size. The ends first.

    Of the runs of 5.1 that reached 95%, none recalled less than 28% half-way: below half of that a run is given up.
    """
    training = _enough_steps(4000)
    evaluation = EvaluationConfig(every=training.steps // 40, give_up_below=0.14)
    published = dict(zip(ALPHAS, (32, 28, 28, 24, 20), strict=True))
    for alphas in ((1.0, 0.0, 0.5), (0.25, 0.75)):
        for seed in range(3):
            base = _database("in-weight", 4000, seed, optim=FOCAL_32, training=training, evaluation=evaluation)
            for alpha, law in product(alphas, (RELEASED, OURS)):
                of_law = _correlated(_with_law(base, law), alpha)
                yield Search(of_law, start=SIZES.index(published[alpha]), neighbours=1)


def _compressibility_paper() -> Iterator[Search]:
    for n_facts in (4000, 32_768):
        base = _with_law(_published_recipe("in-weight", n_facts, 0), RELEASED)
        for alpha in ALPHAS:
            yield Search(_correlated(base, alpha), threshold=None)


# 00 Quickstart --------------------------------------------------------------------------------------------------------


def quickstart(profile: str, seed: int = 0) -> dict[str, RunConfig]:
    """The two models that 00_quickstart trains: a few people each, more steps than they need."""
    smoke = profile == "smoke"
    training = TrainingConfig(steps=10 if smoke else 800, batch_size=32)
    configs = {}
    for mode, n_facts, d_model in (("in-weight", 64, 16), ("in-tool", 16, 16)):
        configs[mode] = _database(
            mode,
            n_facts,
            seed,
            model=ModelConfig(d_model=d_model),
            training=training,
            evaluation=EvaluationConfig(every=25),
        )
    return configs


_SECTIONS: dict[str, dict[str, Callable[[], Iterator[Search]]]] = {
    "05_1": {"smoke": _bounds_smoke, "quick": _bounds_quick, "laptop": _bounds_laptop, "paper": _bounds_paper},
    "05_1_biographies": {
        "smoke": _biographies_smoke,
        "quick": _biographies_quick,
        "laptop": _biographies_laptop,
        "paper": _biographies_paper,
    },
    "05_2": {
        "smoke": _generalization_smoke,
        "quick": _generalization_quick,
        "laptop": _generalization_laptop,
        "paper": _generalization_paper,
    },
    "05_3": {
        "smoke": _compressibility_smoke,
        "quick": _compressibility_quick,
        "laptop": _compressibility_laptop,
        "paper": _compressibility_paper,
    },
}
