"""Section 7.1, our own: which trained models are edited, and the rows of `lib.experiments.edited_models`."""

import pandas as pd

from lib import paths
from lib.config import config_of, read_row
from lib.experiments import sweep as sweeps
from lib.experiments.plan import searches
from lib.experiments.publishing import Table
from lib.experiments.rows import sweep_dir
from lib.experiments.search import Search
from lib.experiments.tables import rows_of_profile
from lib.paths import ROW, ROWS, write_json

SECTION, TABLE = "07_1", paths.PAPER_DATA / "edits.csv"


def plan(profile: str) -> list[Search]:
    """Return the searches of a profile's models; none for quick, which trains no model."""
    return searches(SECTION, profile) if profile != "quick" else []


def sweep(profile: str, *, dry_run: bool = False, **options) -> sweeps.Report:
    """Train the models that have no rows yet and measure each; the report counts those that have been measured.

    The quick profile trains none: it takes the committed checkpoints. options: as `lib.experiments.sweep.sweep` takes
    them.
    """
    home, planned, before = sweep_dir(SECTION, profile), plan(profile), {*rows(profile).run_id}
    models = {home / config.run_id: config for search in planned for config in search.pending({})}
    if profile == "quick":
        folders = (paths.CHECKPOINTS / mode for mode in ("in-weight", "in-tool"))
        models = {folder: config_of(read_row(folder / ROW)) for folder in folders}
    left = {folder: config for folder, config in models.items() if config.run_id not in before}
    todo = [search for search in planned if not before >= {*search.run_ids}]
    report = sweeps.sweep(SECTION, profile, plan=todo, dry_run=dry_run, **options)
    report.done_before, report.done_now = len(models) - len(left), 0
    if dry_run:
        report.missing, report.runs_ahead = [*left.values()], len(left)
        return report
    from lib.experiments.edited_models import measure  # imports torch

    for folder in left:
        if (folder / ROW).exists():  # it has no row if it failed, or the time was up
            (home / folder.name).mkdir(parents=True, exist_ok=True)
            write_json(home / folder.name / ROWS, measure(folder, profile))
            report.done_now += 1
    return report


def run(profile: str, jobs: int | None = None) -> pd.DataFrame:
    """Do all of a profile, `jobs` trainings at a time, and return `rows`. Raises `WorkError` if a training failed."""
    sweep(profile, jobs=jobs).check()
    return rows(profile)


def rows(profile: str) -> pd.DataFrame:
    """Return all rows of a profile, one per measurement: those in paper_data, and those still in runs.

    Columns that an experiment does not measure are empty.
    """
    planned = {run_id for search in plan(profile) for run_id in search.run_ids}
    table = rows_of_profile(TABLE, profile, sorted(sweep_dir(SECTION, profile).glob(f"*/{ROWS}")), planned)
    return table.assign(superseded=table.superseded & (profile != "quick"))


def table_of_rows() -> Table:
    """Return the table of `rows` in paper_data."""
    return Table(
        TABLE, ("profile", "mode", "n_facts", "seed", "experiment", "method", "n_edited", "who", "asked"), rows
    )
