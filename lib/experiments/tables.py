"""Rows of finished runs as tidy tables: read, and one recipe chosen for each point of a figure."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd

from lib import paths
from lib.base import check_known
from lib.config import FINISHED, TEXT, TrainingConfig, read_row
from lib.experiments.plan import Search, searches
from lib.experiments.rows import TABLES, rows_in_runs, sweep_dir, table_path, text_rows
from lib.facts.people import LAWS, Law
from lib.paths import ROWS, whole

#: Profiles that only tables have: no plan asks for their rows (paper_data/README.md).
TABLE_ONLY = ("near-paper",)
#: The paper's recall thresholds.
THRESHOLDS = (0.5, 0.9, 0.95, 0.99)
#: Columns that a plan decides and a table keeps for runs that no plan asks for any more.
_MARKS = {"next_smaller": "Int64", "every_seed": "boolean"}
#: Text may look like numbers (hexadecimal digits, versions), and marks may be empty.
_DTYPES = dict.fromkeys(TEXT, str) | _MARKS
#: Columns that are computed whenever rows are read, and never stored: a stored one would go stale with the plan.
COMPUTED = ["superseded", "law", "recipe"]
#: A table before anything was published.
NO_ROWS = pd.DataFrame(columns=["profile", "run_id"])
#: Columns that identify a point of a figure; results of different recipes are never averaged.
POINT = ["mode", "n_facts", "alpha", "law"]
GROUP = [*POINT, "recipe", "superseded"]


def check_threshold(threshold: float) -> None:
    """Raise `InputError` unless `threshold` is one of `THRESHOLDS`."""
    check_known("published threshold", threshold, THRESHOLDS)


def read_table(path: Path, fields: Iterable[str] = ()) -> pd.DataFrame:
    """Return the rows of a table of runs, empty before anything was published. Raises as `text_rows` does."""
    return pd.read_csv(path, dtype=_DTYPES) if text_rows(path, fields) else NO_ROWS.copy()


def stacked(*tables: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of all tables; empty tables are left out, as their columns would change the others' types."""
    return pd.concat([table for table in tables if len(table)] or tables[:1], ignore_index=True)


def rows_of_plan(section: str, profile: str, plan: Sequence, fields: Sequence[str] = ("run_id",)) -> pd.DataFrame:
    """Return a profile's rows in the table of a section, and those that it lacks from the runs of a plan in `runs/`.

    plan: configurations. Skips files that are missing, damaged, or lack one of `fields` in a row. Adds superseded:
    whether the run is not planned.
    """
    planned, folder = [config.run_id for config in plan], sweep_dir(section, profile)
    found = filter(Path.exists, (folder / run_id / ROWS for run_id in planned))
    fresh = [row for _, rows in whole(found, lambda file: read_row(file, list, fields)) for row in rows]
    rows = _with_fresh(read_table(table_path(section), fields), profile, fresh)
    return rows.assign(superseded=~rows.run_id.isin(planned))


def _with_fresh(known: pd.DataFrame, profile: str, fresh: list[dict]) -> pd.DataFrame:
    known = known[known.profile == profile]
    done = {*known.run_id}
    return stacked(known, pd.DataFrame([row for row in fresh if row["run_id"] not in done]).assign(profile=profile))


def committed_rows(section: str) -> pd.DataFrame:
    """Return a section's rows in paper_data, of all profiles."""
    return read_table(table_path(section), FINISHED)


def read_rows(section: str, profile: str, plan: Sequence[Search] | None = None) -> pd.DataFrame:
    """Return a row per finished run of a section in a profile: all in paper_data, and those of `plan` still in runs/.

    plan: the searches that ask for runs, today's unless given. A run in `runs/` counts only if its tokenizer file is
    unchanged. Adds `COMPUTED`: superseded (the plan no longer asks for this run), law and recipe (see `described`).
    """
    plan = searches_of(section, profile) if plan is None else plan
    known = committed_rows(section) if section in TABLES else NO_ROWS
    return _marked(_with_fresh(known, profile, rows_in_runs(section, profile, plan) if plan else []), plan)


def searches_of(section: str, profile: str, tokenizer: str = "bytes") -> list[Search]:
    """Return the searches of an experiment, none for a profile that only tables have."""
    return [] if profile in TABLE_ONLY else searches(section, profile, tokenizer)


def _marked(rows: pd.DataFrame, plan: Sequence[Search]) -> pd.DataFrame:
    """Return rows as a plan sees them; those it does not ask for keep the marks that they were published with.

    The `_MARKS` are a run's next smaller planned size (0: none), and whether its own is of `Search.certain`.
    """
    runs = [
        (search.base.canonical_json(), size, run_id, size in search.certain)
        for search in plan
        for size, run_id in zip(search.sizes, search.run_ids, strict=True)
    ]
    by = ["base", "next_smaller", "run_id"]
    runs = pd.DataFrame(runs, columns=[*by, "every_seed"]).groupby(by, as_index=False).any()
    planned = runs.assign(next_smaller=runs.groupby("base").next_smaller.shift(fill_value=0)).set_index("run_id")
    stored = rows.reindex(columns=[*_MARKS]).astype(_MARKS)
    marks = planned[[*_MARKS]].reindex(rows.run_id).set_axis(rows.index).astype(_MARKS).fillna(stored)
    return described(rows.assign(**marks, superseded=~rows.run_id.isin(planned.index)))


def described(rows: pd.DataFrame) -> pd.DataFrame:
    """Add what tells rows of one point apart, read off their `config`: `law` and `recipe`; `superseded` if missing.

    law: how the database was drawn, a name of `lib.facts.people.LAWS` (or the fields of another law).
    recipe: the optimizer, the training, and the model without its width. In tool, the steps are part of it, whatever
    the number of facts. In weights steps grow with the facts, so the passes over the questions take their place:
    equally many passes with and without biographies are one recipe.
    """
    configs = [json.loads(c) if isinstance(c, str) else {} for c in rows.get("config", [None] * len(rows))]
    laws = [Law(**{name: v for name, v in c.get("facts", {}).items() if name in Law._fields}) for c in configs]
    names = {law: name for name, law in LAWS.items()}
    sizes = rows.reindex(columns=["mode", "steps_budget", "batch_size", "n_facts"]).itertuples(index=False)
    computed = {
        "superseded": False,
        "law": [names.get(law, str(tuple(law))) for law in laws],
        "recipe": [_recipe(config, *size) for config, size in zip(configs, sizes, strict=True)],
    }
    return rows.assign(**{name: values for name, values in computed.items() if name not in rows})


def _recipe(config: dict, mode: str, steps: float, batch_size: float, n_facts: float) -> str:
    groups = {name: value for group in ("model", "optim", "training") for name, value in config.get(group, {}).items()}
    questions = 1 - groups.get("biographies", 0) - sum(groups.get("files", {}).values())
    for name in ("d_model", "steps", "checkpoint_every", "keep_checkpoints", "biographies"):
        groups.pop(name, None)
    passes = float(f"{steps * batch_size * questions / n_facts:.3g}")
    return json.dumps(groups | ({"steps": steps} if mode == "in-tool" else {"passes": passes}), sort_keys=True)


def recipe_in_words(recipe: str) -> str:
    """Return the loss and the batch size of a `recipe` (see `described`)."""
    fields = TrainingConfig().model_dump() | json.loads(recipe)
    return f"{fields['loss']} loss, batches of {fields['batch_size']}"


def shown(table: pd.DataFrame, value: str, on: Sequence[str] = POINT) -> pd.DataFrame:
    """Return what figures show of a table: one recipe for each point `on`.

    It is the recipe of today's plan if that has a `value`, else the latest superseded one (`finished_at`) with a value.
    """
    table = described(table)
    order = table.assign(unknown=table[value].isna(), latest=table.get("finished_at", ""))
    order = order.sort_values(["unknown", "superseded", "latest"], ascending=[True, True, False])
    return table.merge(order.drop_duplicates(on)[[*on, "recipe", "superseded"]])


def of_todays_plan(rows: pd.DataFrame, on: Sequence[str]) -> pd.DataFrame:
    """Return the rows of today's plan; earlier plans' rows only for points `on` of which today's has none."""
    earlier = rows.superseded.astype(bool)
    return rows[earlier == earlier.groupby([rows[name] for name in on], dropna=False).transform("min")]


def sizes_shown(rows: pd.DataFrame) -> pd.DataFrame:
    """Return `shown` of the recall of finished runs, where every size is a point."""
    return shown(rows, "recall", [*POINT, "d_model"]) if len(rows) else rows


def publishing_profile(profile: str) -> str:
    """Return the profile whose rows a notebook shows as results: its own if it publishes, laptop if not."""
    return profile if profile in paths.PUBLISHING else "laptop"
