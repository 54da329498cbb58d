"""Section 7.1, our own: which trained models are edited, and their rows (`lib.experiments.edited_models`)."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd

from lib import paths
from lib.base import InputError
from lib.config import config_of, read_row
from lib.experiments import sweep as sweeps
from lib.experiments.plan import searches
from lib.experiments.rows import sweep_dir, table_path
from lib.experiments.search import Search
from lib.experiments.tables import rows_of_profile
from lib.paths import MODEL, ROW, ROWS, write_json

SECTION = "07_1"
ORDER = ("profile", "mode", "n_facts", "seed", "experiment", "method", "n_edited", "who", "asked")


def plan(profile: str) -> list[Search]:
    """Return the searches of a profile's models; none for quick, which trains no model."""
    return searches(SECTION, profile) if profile != "quick" else []


def chat_models(profile: str) -> dict[Path, Any]:
    """Return by folder the fine-tunings of Section 6 whose last models are edited: per mode and seed the first.

    There are none for quick, and none without the extra `scale`.
    """
    found = {}
    with suppress(InputError):
        from lib.finetune import experiments as finetunings

        for config in finetunings.plan(profile) if profile != "quick" else ():
            if config.task == "facts" and not config.lora_rank:
                found.setdefault((config.base, config.mode, config.seed), config)
        return {finetunings.folder(config, profile) / MODEL: config for config in found.values()}
    return {}


def sweep(profile: str, *, dry_run: bool = False, **options) -> sweeps.Report:
    """Train the models that have no rows yet and measure each; the report counts those that have been measured.

    The quick profile trains none: it takes the committed checkpoints. `chat_models` are those that `itl sweep 06` has
    left in the folder of runs: none is trained here. options: as `lib.experiments.sweep.sweep` takes them.
    """
    home, planned, before = sweep_dir(SECTION, profile), plan(profile), {*rows(profile).run_id}
    models = {home / config.run_id: config for search in planned for config in search.pending({})}
    if profile == "quick":
        folders = (paths.CHECKPOINTS / mode for mode in ("in-weight", "in-tool"))
        models = {folder: config_of(read_row(folder / ROW)) for folder in folders}
    models |= {folder: config for folder, config in chat_models(profile).items() if folder.exists()}
    left = {folder: config for folder, config in models.items() if config.run_id not in before}
    todo = [search for search in planned if not before >= {*search.run_ids}]
    report = sweeps.sweep(SECTION, profile, plan=todo, dry_run=dry_run, **options)
    report.done_before, report.done_now = len(models) - len(left), 0
    if dry_run:
        report.missing, report.runs_ahead = [*left.values()], len(left)
        return report
    for folder, config in left.items():
        if folder.name == MODEL:
            from lib.experiments.edited_chat_models import measure_chat  # imports transformers

            found = measure_chat(folder, config, profile)
        elif (folder / ROW).exists():  # it has no row if it failed, or the time was up
            from lib.experiments.edited_models import measure  # imports torch

            found = measure(folder, profile)
        else:
            continue
        (home / config.run_id).mkdir(parents=True, exist_ok=True)
        write_json(home / config.run_id / ROWS, found)
        report.done_now += 1
    return report


def run(profile: str, jobs: int | None = None) -> pd.DataFrame:
    """Do all of a profile, `jobs` trainings at a time, and return `rows`. Raises `WorkError` if a training failed."""
    sweep(profile, jobs=jobs).check()
    return rows(profile)


def rows(profile: str) -> pd.DataFrame:
    """Return all rows of a profile, one per measurement: those in paper_data, and those still in runs.

    Columns that an experiment does not measure are empty, and so is `base` except for chat models.
    """
    planned = {run_id for search in plan(profile) for run_id in search.run_ids}
    planned |= {config.run_id for config in chat_models(profile).values()}
    found = sorted(sweep_dir(SECTION, profile).glob(f"*/{ROWS}"))
    table = rows_of_profile(table_path(SECTION), profile, found, planned)
    return table.assign(superseded=table.superseded & (profile != "quick"), base=table.get("base"))
