"""Section 6 as data: the fine-tunings of each profile, run one after the other, and their rows as one table."""

import json
import math
from contextlib import suppress
from functools import reduce
from itertools import product
from operator import or_
from pathlib import Path

import pandas as pd
import yaml
from filelock import Timeout

from lib import paths
from lib.experiments.plan import points_of
from lib.experiments.rows import sweep_dir
from lib.experiments.sweep import Report, one_by_one
from lib.experiments.tables import publishing_profile, rows_of_plan, shown, stacked
from lib.finetune.config import FinetuneConfig
from lib.paths import ROWS

SECTION = "06"
ORDER = ("profile", "base", "task", "mode", "n_facts", "seed", "step", "run_id")


def plan(profile: str) -> list[FinetuneConfig]:
    """Return the fine-tunings of a profile, as lib/data/finetunings.yaml lists them."""
    paths.profile_dir(profile)  # an unknown profile is an `InputError`
    return [
        FinetuneConfig.parse(reduce(or_, point, grid.get("base", {})))
        for grid in yaml.safe_load((paths.DATA / "finetunings.yaml").read_text(encoding="utf-8"))[profile]
        for point in product(*map(points_of, grid["axes"]))
    ]


def folder(config: FinetuneConfig, profile: str) -> Path:
    """Return where a fine-tuning of a profile is kept."""
    return sweep_dir(SECTION, profile) / config.run_id


def sweep(profile: str, *, dry_run: bool = False, max_hours: float = math.inf, device: str = "auto") -> Report:
    """Run all that is missing in a profile; if `dry_run`, only report it. After `max_hours` no new run is started.

    A failure is reported; the others continue. Several processes may call it: each takes runs that no other started.
    """

    def work(config: FinetuneConfig) -> bool:
        from lib.finetune.train import finetune  # torch and transformers: a dry run does without them

        directory = folder(config, profile)
        directory.parent.mkdir(parents=True, exist_ok=True)
        with suppress(Timeout), paths.only_process(f"{directory}.lock", timeout=0):
            if not (directory / ROWS).exists():
                finetune(config, directory, device=device, description=config.title)
                return True
        return False  # another process took it

    title, todo = f"Section 6, {profile}", plan(profile)
    return one_by_one(title, todo, lambda: rows(profile), work, dry_run=dry_run, max_hours=max_hours)


def rows(profile: str) -> pd.DataFrame:
    """Return one row per checkpoint of finished runs: all in paper_data, and those of today's plan still in `runs/`.

    Two columns are added and never stored: recipe, and superseded (today's plan does not ask for the run).
    """
    table = rows_of_plan(SECTION, profile, plan(profile), ("run_id", "config"))
    recipes = [json.loads(config) | {"seed": None} for config in table.get("config", [])]
    return table.assign(recipe=[json.dumps(recipe, sort_keys=True) for recipe in recipes])


def shown_rows(profile: str) -> pd.DataFrame:
    """Return the rows that figures are drawn from: those of the publishing profile, and the profile's own.

    Each point has one recipe (`lib.experiments.tables.shown`); the profile of superseded rows says "earlier recipe".
    """
    table = stacked(*map(rows, dict.fromkeys((publishing_profile(profile), profile))))
    if not len(table):
        return table
    table = shown(table, "step", ["profile", "base", "task", "mode", "adaptation", "n_facts", "lr"])
    earlier = table.profile.where(~table.superseded, table.profile + ", earlier recipe")
    return table.assign(profile=earlier).drop(columns="superseded")
