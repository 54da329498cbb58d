"""Rows enter and leave the tables of paper_data: publishing only adds, and only `drop` takes out."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from lib import paths
from lib.base import InputError
from lib.experiments.tables import COMPUTED, TABLE_ONLY, committed_rows, marked_rows, read_rows, sweep_dir, table_path
from lib.provenance import commit


def check_publishes(profile: str) -> None:
    """Raise `InputError` for a profile whose results stay in runs."""
    if profile not in paths.PUBLISHING:
        raise InputError(f"the profile {profile} does not publish: {' and '.join(paths.PUBLISHING)} do")


def check_traceable() -> None:
    """Raise `InputError` if rows made now could not be published: no commit holds the code."""
    if not is_clean(commit()):
        raise InputError(f"lib in {paths.ROOT} is not as in a commit: only rows that can be traced are published")


def is_clean(commit: str) -> bool:
    return commit != "unknown" and not commit.endswith("-dirty")


def publish(section: str, profile: str) -> int:
    """Add a sweep's finished rows to paper_data, sorted; returns how many are new. Rows leave a table only by `drop`.

    Only the profiles that count publish, and only rows whose commit is known and clean: others are an `InputError`.
    """
    rows, known = read_rows(section, profile), committed_rows(section)
    return add_rows(table_path(section), profile, rows, known, _ORDER, sweep_dir(section, profile))


_ORDER = ["profile", "mode", "n_facts", "alpha", "seed", "d_model", "run_id"]


def add_rows(
    path: Path, profile: str, rows: pd.DataFrame, known: pd.DataFrame, order: Sequence[str], source: Path
) -> int:
    """Write a table: `known` of other profiles and `rows`, all of this one; returns how many runs' rows are new.

    order: the columns to sort by. source: where the runs are, for who must delete one. See `publish`.
    """
    check_publishes(profile)
    if not len(rows):
        return 0
    bad = rows[~rows.commit.map(is_clean)]
    if len(bad):
        raise InputError(
            f"{len(bad)} rows were not made by a clean commit (run {bad.run_id.iloc[0]}, commit {bad.commit.iloc[0]}): "
            f"only rows that can be traced are published, delete these in {source} and sweep again"
        )
    others = known[known.profile != profile] if len(known) else known
    _write(path, pd.concat([others, rows]), order)
    return len(others) + len(rows) - len(known)


def _write(path: Path, rows: pd.DataFrame, order: Sequence[str]) -> None:
    rows = rows.drop(columns=COMPUTED, errors="ignore").sort_values(order)
    with paths.replacing(path) as temporary:
        rows.to_csv(temporary, index=False, lineterminator="\n")


def drop(
    section: str,
    profile: str | None = None,
    run_ids: Sequence[str] = (),
    superseded: bool = False,
    dry_run: bool = False,
) -> pd.DataFrame:
    """Take rows out of a section's table and return them; `dry_run` only returns them.

    profile, run_ids, superseded (only rows that today's plan does not ask for): each narrows the selection; none of
    them, an id that the table lacks, or a selection without rows is an `InputError`. Rows of `TABLE_ONLY` profiles go
    only where `profile` or `run_ids` name them. A planned run that is still in runs comes back with the next `publish`.
    """
    marked = marked_rows(section)
    return drop_rows(table_path(section), marked, _ORDER, profile, run_ids, superseded, dry_run)


def drop_rows(
    path: Path,
    tables: list[pd.DataFrame],
    order: Sequence[str],
    profile: str | None,
    run_ids: Sequence[str],
    superseded: bool,
    dry_run: bool,
) -> pd.DataFrame:
    """Do what `drop` does. tables: all rows of the table, marked as `superseded` or not."""
    if profile is None and not run_ids and not superseded:
        raise InputError("nothing says which rows to drop: give a profile, run ids, or superseded")
    if not tables:
        raise InputError(f"there are no rows in {path}")
    rows = pd.concat(tables)
    if unknown := set(run_ids) - set(rows.run_id):
        raise InputError(f"no row in {path} has the run id {', '.join(sorted(unknown))}")
    if profile not in (None, *rows.profile):
        raise InputError(f"no row in {path} has the profile {profile}: there are {', '.join(rows.profile.unique())}")
    gone = (rows.profile == profile) if profile else pd.Series(True, rows.index)
    gone &= rows.run_id.isin(run_ids) if run_ids else True
    gone &= rows.superseded if superseded else True
    if not (profile or run_ids):  # no sweep could make them again
        gone &= ~rows.profile.isin(TABLE_ONLY)
    if not gone.any():
        raise InputError(f"no row in {path} is selected by all of these conditions")
    if not dry_run:
        _write(path, rows[~gone], order)
    return rows[gone]
