"""Rows enter and leave the tables of paper_data: publishing only adds, and only `Table.drop` takes out."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from lib import paths
from lib.base import InputError
from lib.experiments.rows import OWN, table_path
from lib.experiments.tables import COMPUTED, TABLE_ONLY, read_rows, read_table, stacked
from lib.provenance import commit


def check_publishes(profile: str) -> None:
    """Raise `InputError` for a profile whose results stay in runs."""
    if profile not in paths.PUBLISHING:
        raise InputError(f"the profile {profile} does not publish: {' and '.join(paths.PUBLISHING)} do")


def check_traceable() -> None:
    """Raise `InputError` if rows made now could not be published: no commit holds the code."""
    if not _is_clean(commit()):
        raise InputError(f"lib in {paths.ROOT} is not committed: commit it, so that its rows can be traced")


def _is_clean(commit: str) -> bool:
    return commit != "unknown" and not commit.endswith("-dirty")


@contextmanager
def _exclusive() -> Iterator[None]:
    """Let one process at a time rewrite a table, or one undoes what another wrote."""
    paths.runs().mkdir(parents=True, exist_ok=True)
    with paths.only_process(paths.runs() / ".paper_data.lock"):
        yield


class Table(NamedTuple):
    """A table of paper_data with one or more rows a run."""

    path: Path
    #: Columns to sort by.
    order: Sequence[str]
    #: Given a profile, all its rows, in the table and still in runs, with a column `superseded`.
    read: Callable[[str], pd.DataFrame]

    @_exclusive()
    def add(self, profile: str) -> int:
        """Add the finished rows of a profile, sorted; return how many are new. Rows leave a table only by `drop`.

        Only publishing profiles add, and only rows whose commit is known and clean: others are an `InputError`.
        """
        check_publishes(profile)
        rows, known = self.read(profile), read_table(self.path)
        if not len(rows):
            return 0
        bad = rows[~rows.commit.fillna("unknown").map(_is_clean)]
        if len(bad):
            told = f"{len(bad)} rows were not made by a clean commit (run {bad.run_id.iloc[0]}, commit"
            raise InputError(f"{told} {bad.commit.iloc[0]}) and cannot be traced: delete these runs and sweep again")
        others = known[known.profile != profile]
        self._write(stacked(others, rows))
        return len(others) + len(rows) - len(known)

    @_exclusive()
    def drop(
        self, profile: str | None = None, run_ids: Sequence[str] = (), superseded: bool = False, dry_run: bool = False
    ) -> pd.DataFrame:
        """Remove rows and return them; `dry_run` only returns them.

        profile, run_ids and superseded (rows that today's plan does not ask for) each narrow the selection. Rows of
        `TABLE_ONLY` profiles are removed only if `profile` or `run_ids` name them. `add` brings back a planned run that
        is still in `runs/`. Raises `InputError` without a condition, for an unknown id, or if nothing is selected.
        """
        if profile is None and not run_ids and not superseded:
            raise InputError("nothing says which rows to drop: give a profile, run ids, or superseded")
        known = read_table(self.path)
        if not len(known):
            raise InputError(f"there are no rows in {self.path}")
        if unknown := set(run_ids) - set(known.run_id):
            raise InputError(f"no row in {self.path} has the run id {', '.join(sorted(unknown))}")
        marks = pd.concat(self.read(name) for name in known.profile.unique())[["profile", "run_id", "superseded"]]
        known = known.merge(marks.drop_duplicates())
        gone = known.superseded | (not superseded)
        gone &= known.run_id.isin(run_ids or known.run_id)
        # Rows that no sweep could make again stay unless named.
        gone &= known.profile.eq(profile) if profile else ~known.profile.isin([] if run_ids else TABLE_ONLY)
        if not gone.any():
            raise InputError(f"no row in {self.path} is selected by all of these conditions")
        if not dry_run:
            self._write(known[~gone])
        return known[gone]

    def _write(self, rows: pd.DataFrame) -> None:
        rows = rows.drop(columns=COMPUTED, errors="ignore").sort_values(list(self.order))
        with paths.replacing(self.path) as temporary:
            rows.to_csv(temporary, index=False, lineterminator="\n")


def table_of(section: str) -> Table:
    """Return the table of a section. Raises `InputError` for one without a table, and outside a checkout."""
    paths.check_checkout()
    if section in OWN:
        own = import_module(OWN[section])
        return Table(table_path(section), own.ORDER, own.rows)
    order = ("profile", "mode", "n_facts", "alpha", "seed", "d_model", "run_id")
    return Table(table_path(section), order, partial(read_rows, section))
