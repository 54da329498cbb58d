"""Chains of calls (our Section 7.2): models trained on some numbers of hops, asked these and more.

The folder of a run, runs/<profile>/07_2/<run_id>, holds the people and the dialogs of several hops that it is trained
on, the training run itself in `run/`, and in the end its row.
"""

import tempfile
from collections.abc import Sequence
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from lib import paths
from lib.agent.tools import SqlTool
from lib.base import InputError, to_json
from lib.config import RunConfig
from lib.dialogs.chains import chain_dialog, chains
from lib.dialogs.tokenizers import Tokenizer
from lib.evaluation.recall import measure_chains
from lib.experiments.plan import RECIPES
from lib.facts.csv import read_people_csv, write_people_csv
from lib.facts.database import write_database
from lib.facts.people import ATTRIBUTES, FactsConfig, People
from lib.facts.sampling import sample_people, unseen_people, with_bosses
from lib.provenance import commit

SECTION = "07_2"
#: The hops that every model is asked about.
ASKED = (1, 2, 3)
#: What the people of a run are called, in its configuration and in its folder.
_PEOPLE = "people.csv"


class Setting(NamedTuple):
    """The models of one profile, one a seed."""

    n_people: int
    d_model: int
    steps: int
    recipe: str  # in lib/experiments/plans/recipes.yaml
    n_seeds: int
    #: How many trained people, and unseen ones, are asked about.
    asked: int


SETTINGS = {
    "smoke": Setting(4, 8, 5, "copying", 1, 2),
    "quick": Setting(8, 24, 400, "copying", 1, 8),
    "laptop": Setting(256, 24, 24_000, "focal-32", 3, 100),
    "paper": Setting(256, 24, 24_000, "focal-32", 10, 100),
}


def configurations(profile: str, hops: Sequence[int] = (1, 2)) -> list[RunConfig]:
    """Return the runs of a profile, trained on equal shares of dialogs of each of `hops`, 1 among them."""
    paths.profile_dir(profile)  # an unknown one is refused
    *sizes, n_seeds, _ = SETTINGS[profile]
    return [configuration(*sizes, seed, hops) for seed in range(n_seeds)]


def configuration(
    n_people: int, d_model: int, steps: int, recipe: str, seed: int, hops: Sequence[int] = (1, 2)
) -> RunConfig:
    """Return one run. Its files are those of `write_inputs`. Hops without 1 are an `InputError`."""
    if 1 not in hops or {*hops} - {*ASKED} or len({*hops}) < len(hops):
        raise InputError(f"hops = {[*hops]}: 1 is expected, and others of {ASKED}, each once")
    groups = RECIPES[recipe]
    return RunConfig.parse(
        {
            "mode": "in-tool",
            "seed": seed,
            "facts": {"n_people": n_people, "seed": seed, "csv": _PEOPLE},
            "model": {"d_model": d_model},
            "optim": groups["optim"],
            "training": {
                **groups.get("training", {"batch_size": 32}),
                "steps": steps,
                "files": {_dialogs(each): 1 / len(hops) for each in hops if each > 1},
            },
            "evaluation": {"every": None, "stop_at_recall": None},
        }
    )


def _dialogs(hops: int) -> str:
    return f"dialogs_{hops}.jsonl"


def trained_hops(config: RunConfig) -> list[int]:
    """Return the hops that a run is trained on."""
    return [1, *(hops for hops in ASKED if _dialogs(hops) in config.training.files)]


def write_inputs(config: RunConfig, folder: Path) -> dict[str, str]:
    """Write the files that a run names into a folder; return their paths by these names, as `run` takes them."""
    people = with_bosses(sample_people(config.facts.n_people, config.facts.seed), config.facts.seed)
    folder.mkdir(parents=True, exist_ok=True)
    write_people_csv(people, folder / _PEOPLE)
    for hops in trained_hops(config)[1:]:
        with paths.replacing(folder / _dialogs(hops)) as temporary, temporary.open("w", encoding="utf-8") as file:
            file.writelines(f"{to_json(chain_dialog(each))}\n" for each in chains(people, hops))
    return {name: str(folder / name) for name in (_PEOPLE, *config.training.files)}


def run_chains(config: RunConfig, folder: Path, asked: int, description: str | None = None) -> dict:
    """Do one run of `configurations`, or go on with it; return its row: that of `lib.training.run`, and recall by hop.

    trained_HOPS and unseen_HOPS are shares of questions of so many hops, answered with every look-up made. They are
    about the first `asked` people that the model was trained on, and as many whose first and last name it never met; a
    boss is of the same group.
    """
    from lib.training.run import run
    from lib.training.saved import load_model, run_tokenizer

    if (folder / paths.ROW).exists():
        return paths.read_json(folder / paths.ROW, fields=("recall", "trained_1"))
    inputs = write_inputs(config, folder)
    row = run(config, folder / "run", inputs=inputs, description=description)
    model, _ = load_model(folder / "run" / paths.MODEL, "cpu")
    people = read_people_csv(inputs[_PEOPLE])
    row |= recall_by_hops(model, config.facts, people, run_tokenizer(config), asked)
    paths.write_json(folder / paths.ROW, row | {"hops": trained_hops(config), "measured_commit": commit()})
    return paths.read_json(folder / paths.ROW)


def run_profile(profile: str, recompute: bool = True) -> pd.DataFrame:
    """Return the rows of a profile's finished runs, after doing those that are not, unless `recompute` is false."""
    folder, rows = paths.profile_dir(profile) / SECTION, []
    for config in configurations(profile):
        if recompute or (folder / config.run_id / paths.ROW).exists():
            description = f"{SECTION}: seed {config.seed}"
            rows.append(run_chains(config, folder / config.run_id, SETTINGS[profile].asked, description))
    return pd.DataFrame(rows).assign(profile=profile)


def recall_by_hops(model, facts: FactsConfig, people: People, tokenizer: Tokenizer, asked: int) -> dict[str, float]:
    """Ask a model about people, and unseen ones, all in one database (see `run_chains`)."""
    sampled = facts.model_copy(update={"csv": None})
    groups = {"trained": people, "unseen": with_bosses(unseen_people(sampled, max(2, asked))["new_both"], facts.seed)}
    questions = {
        f"{group}_{hops}": list(islice(chains(members, hops), asked * len(ATTRIBUTES)))
        for group, members in groups.items()
        for hops in ASKED
    }
    with tempfile.TemporaryDirectory() as folder:
        write_database(groups["trained"] + groups["unseen"], Path(folder, paths.DATABASE))
        with SqlTool(Path(folder, paths.DATABASE)) as tool:
            correct = measure_chains(model, [*chain.from_iterable(questions.values())], tokenizer, tool).correct
    ends = list(accumulate(map(len, questions.values())))
    return {name: float(part.mean()) for name, part in zip(questions, np.split(correct, ends[:-1]), strict=True)}
