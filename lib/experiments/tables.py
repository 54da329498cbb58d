"""Rows of finished runs as tidy tables: read and aggregate. `lib.experiments.publishing` writes them."""

import json
from ast import literal_eval
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from lib import paths
from lib.base import InputError
from lib.dialogs.tokenizers import load_tokenizer
from lib.experiments.plan import searches
from lib.experiments.search import Search
from lib.facts.people import LAWS, Law
from lib.paths import ROW

#: How the tables name a section's rows.
TABLES = {
    "05_1": "parameter_bounds",
    "05_1_biographies": "biographies",
    "05_2": "generalization",
    "05_3": "compressibility",
}
#: The recalls that the paper counts as knowing.
THRESHOLDS = (0.5, 0.9, 0.95, 0.99)


def check_threshold(threshold: float) -> None:
    """Raise `InputError` for a recall that the paper does not count as knowing."""
    if threshold not in THRESHOLDS:
        known = ", ".join(map(str, THRESHOLDS))
        raise InputError(f"threshold = {threshold}: the published thresholds are {known}")


def sweep_dir(section: str, profile: str) -> Path:
    """Where a sweep keeps its runs: runs/<profile>/<section>/<run id>."""
    return paths.profile_dir(profile) / section


def table_path(section: str) -> Path:
    """Where a section's rows are committed: paper_data/<table>.csv."""
    if section not in TABLES:
        raise InputError(f"there is no table for section {section}: there are {', '.join(TABLES)}")
    return paths.PAPER_DATA / f"{TABLES[section]}.csv"


def committed_rows(section: str) -> pd.DataFrame:
    """The rows in paper_data, of all profiles; empty before anything was published."""
    path = table_path(section)
    if not path.exists():
        return pd.DataFrame()
    return pd.read_csv(path, dtype=_DTYPES)


#: Columns whose values may look like numbers (hexadecimal digits, versions), and those that may be empty.
_DTYPES = dict.fromkeys(("run_id", "people_digest", "commit", "python", "torch"), str)
_DTYPES |= {"next_smaller": "Int64", "every_seed": "boolean"}
#: Columns that are computed whenever rows are read, and never stored: a stored one would go stale with the plan.
COMPUTED = ["superseded", "law", "recipe"]
#: Profiles that only tables have: no plan asks for their rows (paper_data/README.md).
TABLE_ONLY = ("near-paper",)


def read_rows(section: str, profile: str, plan: Sequence[Search] | None = None) -> pd.DataFrame:
    """Return a row per finished run of a section in a profile: all in paper_data, and those of `plan` still in runs.

    plan: the searches that ask for runs, today's unless given. A run in runs counts only if its tokenizer's file is
    what it was. The columns `COMPUTED` come on top: superseded (the plan does not ask for this run), and `described`.
    """
    plan = _plan(section, profile) if plan is None else plan
    planned = _planned(plan)
    tokenizers = {load_tokenizer(spec).name for spec in {s.base.tokenizer for s in plan}}
    found = sorted(sweep_dir(section, profile).glob(f"*/{ROW}")) if planned else []
    fresh = [json.loads(path.read_text()) for path in found if path.parent.name in planned]
    fresh = [row for row in fresh if row.get("tokenizer", "bytes") in tokenizers]
    known = committed_rows(section)
    tables = [known[known.profile == profile]] if len(known) else []
    tables = [table for table in (*tables, pd.DataFrame(fresh).assign(profile=profile)) if len(table)]
    rows = pd.concat(tables) if tables else pd.DataFrame(columns=["run_id"])
    return _marked(rows.drop_duplicates("run_id", keep="first").reset_index(drop=True), planned)


def _plan(section: str, profile: str, tokenizer: str = "bytes") -> list[Search]:
    return [] if profile in TABLE_ONLY else searches(section, profile, tokenizer)


def _planned(plan: Sequence[Search]) -> dict[str, tuple[int, bool]]:
    """What a plan says of each run: the next smaller size tried on its database (0: none), and `Search.certain`."""
    sizes = defaultdict(set)
    for search in plan:
        sizes[search.base.canonical_json()] |= set(search.sizes)
    planned = {}
    for search in plan:
        for size in search.sizes:
            below = max((s for s in sizes[search.base.canonical_json()] if s < size), default=0)
            run_id = search.config(size).run_id
            planned[run_id] = below, size in search.certain or planned.get(run_id, (0, False))[1]
    return planned


def _marked(rows: pd.DataFrame, planned: dict[str, tuple[int, bool]]) -> pd.DataFrame:
    """Rows as a plan sees them; those it does not ask for keep what the plan they were published under said."""
    rows = rows.assign(superseded=~rows.run_id.isin(planned))
    for i, (column, dtype) in enumerate({"next_smaller": "Int64", "every_seed": "boolean"}.items()):
        stored = rows.get(column, pd.Series(pd.NA, rows.index, dtype))
        marks = [
            planned[run_id][i] if run_id in planned else old for run_id, old in zip(rows.run_id, stored, strict=True)
        ]
        rows[column] = pd.array(marks, dtype)
    return described(rows)


def marked_rows(section: str) -> list[pd.DataFrame]:
    """Return all rows of a section's table, a table for each profile, marked as today's plans see them."""
    known = committed_rows(section)
    profiles = known.profile.unique() if len(known) else []
    return [_marked(known[known.profile == name], _planned(_plan(section, name))) for name in profiles]


def described(rows: pd.DataFrame) -> pd.DataFrame:
    """Add what tells rows of one point apart, read off their `config`: `law` and `recipe`; `superseded` if missing.

    law: how the database was drawn, a name of `lib.facts.people.LAWS` (or the fields of another law).
    recipe: the model but for its width, the optimizer and the training. Not the number of steps, which grows with the
    facts, but how often each question is asked: runs of 12,000 and 24,000 steps on one database are of two recipes,
    runs with and without biographies that ask equally often of one.
    """
    configs = [json.loads(c) if isinstance(c, str) else {} for c in rows.get("config", [None] * len(rows))]
    sizes = rows.reindex(columns=["steps_budget", "batch_size", "n_facts"]).itertuples(index=False)
    computed = {
        "superseded": [False] * len(rows),
        "law": [_law(config.get("facts", {})) for config in configs],
        "recipe": [_recipe(config, *size) for config, size in zip(configs, sizes, strict=True)],
    }
    return rows.assign(**{name: values for name, values in computed.items() if name not in rows})


def _law(facts: dict) -> str:
    law = Law(**{field: facts[field] for field in Law._fields if field in facts})
    return next((name for name, known in LAWS.items() if known == law), str(tuple(law)))


def law_named(name: str) -> Law:
    """Return the law that a row's column `law` names."""
    return LAWS.get(name) or Law(*literal_eval(name))


def _recipe(config: dict, steps: float, batch_size: float, n_facts: float) -> str:
    model = {name: value for name, value in config.get("model", {}).items() if name != "d_model"}
    training = dict(config.get("training", {}))
    for name in ("steps", "checkpoint_every", "keep_checkpoints"):
        training.pop(name, None)
    questions = 1 - training.pop("biographies", 0) - sum(training.get("files", {}).values())
    passes = float(f"{steps * batch_size * questions / n_facts:.3g}")
    return json.dumps({**model, **config.get("optim", {}), **training, "passes": passes}, sort_keys=True)


#: What a point of a figure is about; results of different recipes are never averaged.
_POINT = ["mode", "n_facts", "alpha", "law"]
_GROUP = [*_POINT, "recipe", "superseded"]


def shown(table: pd.DataFrame, value: str, on: Sequence[str] = _POINT) -> pd.DataFrame:
    """Return what figures show of a table: one recipe for each point `on`.

    It is today's plan's where it has a `value`, else the latest (`finished_at`) superseded one's that has.
    """
    table = described(table)
    latest = table.get("finished_at", pd.Series("", table.index)).astype(object).fillna("")
    order = table.assign(unknown=table[value].isna(), latest=latest).sort_values("latest", ascending=False)
    first = order.sort_values(["unknown", "superseded"], kind="stable").drop_duplicates(on)
    return table.merge(first[[*on, "recipe", "superseded"]])


def sizes_shown(rows: pd.DataFrame) -> pd.DataFrame:
    """`shown` of the recall of finished runs, where every size is a point."""
    return shown(rows, "recall", [*_POINT, "d_model"]) if len(rows) else rows


def counting_profile(profile: str) -> str:
    """Which profile's rows a notebook shows as results: its own if it publishes, laptop if not."""
    return profile if profile in paths.PUBLISHING else "laptop"


def counting_rows(section: str, profile: str) -> pd.DataFrame:
    """The rows that results are shown from, see `counting_profile`."""
    return read_rows(section, counting_profile(profile))
