"""Section 7.1, our own: which trained models are edited, and their rows (`lib.experiments.edited_models`)."""

import math
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd

from lib import paths
from lib.base import InputError
from lib.config import config_of, read_row
from lib.experiments import sweep as sweeps
from lib.experiments.plan import searches
from lib.experiments.rows import sweep_dir
from lib.experiments.tables import rows_of_plan
from lib.paths import MODEL, ROW, ROWS, write_json

SECTION = "07_1"
ORDER = ("profile", "mode", "n_facts", "seed", "experiment", "method", "n_edited", "who", "asked")


def models(profile: str) -> dict[Path, Any]:
    """Return the trainings of a profile's models, by the folder that each leaves its model in.

    The quick profile trains none: it takes the committed checkpoints. Others train those of a plan, and take the chat
    models that Section 6 fine-tuned on facts: the first of each base, mode and seed; none without the extra `scale`.
    """
    if profile == "quick":
        folders = (paths.CHECKPOINTS / mode for mode in ("in-weight", "in-tool"))
        return {folder: config_of(read_row(folder / ROW)) for folder in folders}
    home, chats = sweep_dir(SECTION, profile), {}
    found = {home / config.run_id: config for search in searches(SECTION, profile) for config in search.pending({})}
    with suppress(InputError):
        from lib.finetune import experiments as finetunings

        for config in finetunings.plan(profile):
            if config.task == "facts" and not config.lora_rank:
                chats.setdefault((config.base, config.mode, config.seed), config)
        found |= {finetunings.folder(config, profile) / MODEL: config for config in chats.values()}
    return found


def sweep(profile: str, *, dry_run: bool = False, max_hours: float = math.inf, **options) -> sweeps.Report:
    """Train the models that have no rows yet and measure each; the report counts those that have been measured.

    Chat models are measured where `itl sweep 06` has left them: none is trained here. options: as
    `lib.experiments.sweep.sweep` takes them.
    """
    before, began = {*rows(profile).run_id}, time.monotonic()
    planned = searches(SECTION, profile) if profile != "quick" else []
    todo = [search for search in planned if not before >= {*search.run_ids}]
    trained = sweeps.sweep(SECTION, profile, plan=todo, dry_run=dry_run, max_hours=max_hours, **options)
    here = {folder: config for folder, config in models(profile).items() if folder.name != MODEL or folder.exists()}
    folders = {config.run_id: folder for folder, config in here.items()}

    def work(config: Any) -> bool:
        folder = folders[config.run_id]
        if folder.name == MODEL:
            from lib.experiments.edited_chat_models import measure_chat  # imports transformers

            measured = measure_chat(folder, config, profile)
        elif (folder / ROW).exists():  # it has no row if it failed, or the time was up
            from lib.experiments.edited_models import measure  # imports torch

            measured = measure(folder, profile)
        else:
            return False
        home = sweep_dir(SECTION, profile) / config.run_id
        home.mkdir(parents=True, exist_ok=True)
        write_json(home / ROWS, measured)
        return True

    left, title = max_hours - (time.monotonic() - began) / 3600, f"Section 7.1, {profile}"
    plan = [*here.values()]
    report = sweeps.one_by_one(title, plan, lambda: rows(profile), work, dry_run=dry_run, max_hours=left)
    report.failed, report.hours_ahead = trained.failed | report.failed, trained.hours_ahead
    return report


def run(profile: str, jobs: int | None = None) -> pd.DataFrame:
    """Do all of a profile, `jobs` trainings at a time, and return `rows`. Raises `WorkError` if a training failed."""
    sweep(profile, jobs=jobs).check()
    return rows(profile)


def rows(profile: str) -> pd.DataFrame:
    """Return all rows of a profile, one per measurement: those in paper_data, and those of `models` still in `runs/`.

    Columns that an experiment does not measure are empty, and so is `base` except for chat models.
    """
    table = rows_of_plan(SECTION, profile, [*models(profile).values()])
    return table.assign(base=table.get("base"))
