"""Chains of calls (our Section 7.2): models trained on questions of one and two hops, asked up to three.

The folder of a run, runs/<profile>/07_2/<run_id>, holds the people and the dialogs of two hops that it is trained on,
the training run itself in `run/`, and in the end its row.
"""

import math
from itertools import islice, product
from pathlib import Path
from statistics import fmean

import pandas as pd

from lib import paths
from lib.base import to_json
from lib.config import RunConfig
from lib.dialogs.chains import chain_dialog, chain_question, chains
from lib.dialogs.templates import Role, Turn, answer
from lib.dialogs.tokenizers import Tokenizer
from lib.experiments.plan import searches
from lib.experiments.rows import sweep_dir
from lib.experiments.sweep import Report, one_by_one
from lib.experiments.tables import rows_of_plan
from lib.facts.csv import read_people_csv, write_people_csv
from lib.facts.database import temporary_database
from lib.facts.people import ATTRIBUTES, FactsConfig, People
from lib.facts.sampling import sample_people, unseen_people, with_bosses
from lib.provenance import commit

SECTION = "07_2"
ORDER = ("profile", "n_facts", "seed", "run_id")
#: The hops that every model is asked about.
ASKED = (1, 2, 3)
_PEOPLE, _DIALOGS = "people.csv", "dialogs_2.jsonl"

#: How many trained people, at most, a model is asked about; and as many unseen ones.
MOST_ASKED = 100


def configurations(profile: str) -> list[RunConfig]:
    """Return the runs of a profile, one per seed, trained on equal shares of dialogs of one and two hops.

    Their files are those of `write_inputs`. An unknown profile is an `InputError`.
    """
    return [config for search in searches(SECTION, profile) for config in search.pending({})]


def write_inputs(config: RunConfig, folder: Path) -> dict[str, str]:
    """Write the files that a run names into a folder; return their paths by these names, as `run` takes them."""
    people = with_bosses(sample_people(config.facts.n_people, config.facts.seed), config.facts.seed)
    folder.mkdir(parents=True, exist_ok=True)
    write_people_csv(people, folder / _PEOPLE)
    with paths.replacing(folder / _DIALOGS) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(f"{to_json(chain_dialog(each))}\n" for each in chains(people, 2))
    return {name: str(folder / name) for name in (_PEOPLE, _DIALOGS)}


def run_chains(config: RunConfig, folder: Path, **options) -> None:
    """Do or resume one run of `configurations`; write its row: that of `lib.training.run` with recall by hops.

    trained_HOPS is the recall of questions about the first people of training (`MOST_ASKED`), unseen_HOPS about as many
    people whose first and last names the model never saw; bosses are of the same group. An answer counts only if every
    look-up was made. trained_3_as_2: the share of questions of three hops that are answered as if they had two.
    options: as `lib.training.run.run` takes them.
    """
    from lib.training.run import run
    from lib.training.saved import load_model, run_tokenizer

    inputs = write_inputs(config, folder)
    row = run(config, folder / "run", inputs=inputs, **options)
    model, _ = load_model(folder / "run", "cpu")
    row["hops"], people = [1, 2], read_people_csv(inputs[_PEOPLE])
    row |= recall_by_hops(model, config.facts, people, run_tokenizer(config), min(MOST_ASKED, len(people)))
    paths.write_json(folder / paths.ROWS, [row | {"measured_commit": commit()}])


def sweep(profile: str, *, dry_run: bool = False, max_hours: float = math.inf, device: str = "auto") -> Report:
    """Run all that is missing in a profile; if `dry_run`, only report it. After `max_hours` no new run is started."""

    def work(config: RunConfig) -> None:
        run_chains(config, sweep_dir(SECTION, profile) / config.run_id, device=device, description=config.title)

    title, todo = f"Section 7.2, {profile}", configurations(profile)
    return one_by_one(title, todo, lambda: rows(profile), work, dry_run=dry_run, max_hours=max_hours)


def rows(profile: str) -> pd.DataFrame:
    """Return one row per finished run: those in paper_data, and those of today's plan still in `runs/`."""
    return rows_of_plan(SECTION, profile, configurations(profile))


def recall_by_hops(model, facts: FactsConfig, people: People, tokenizer: Tokenizer, asked: int) -> dict[str, float]:
    """Return recall by group and hops, as `run_chains` describes it; trained and unseen people share one database."""
    from lib.agent.generation import generate
    from lib.agent.tools import SqlTool
    from lib.dialogs.tokens import encode_prompt
    from lib.evaluation.recall import measure_recall

    sampled = facts.model_copy(update={"csv": None})
    groups = {"trained": people, "unseen": with_bosses(unseen_people(sampled, max(2, asked))["new_both"], facts.seed)}
    n_questions, recalls = asked * len(ATTRIBUTES), {}
    with temporary_database(groups["trained"] + groups["unseen"]) as path, SqlTool(path) as tool:
        for (group, members), hops in product(groups.items(), ASKED):
            questions = list(islice(chains(members, hops), n_questions))
            recalls[f"{group}_{hops}"] = measure_recall(model, questions, tokenizer, tool).overall
        longer, shorter = ([*islice(chains(people, hops), n_questions)] for hops in (3, 2))  # the same people
        prompts = [encode_prompt([Turn(Role.USER, chain_question(chain))], tokenizer) for chain in longer]
        ends = [
            each.turns(tokenizer)[-1].text for each in generate(model, prompts, tokenizer, tool, max_new_tokens=512)
        ]
    recalls["trained_3_as_2"] = fmean(end == answer(*chain[-1]) for end, chain in zip(ends, shorter, strict=True))
    return recalls
