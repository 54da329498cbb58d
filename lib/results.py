"""Rows of finished runs as tidy tables: read and aggregate. `lib.publishing` writes them."""

import json
import math
from ast import literal_eval
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from lib import paths
from lib.base import InputError
from lib.experiments import SIZES, Search, searches
from lib.facts import ATTRIBUTES, LAWS, Law, entropy_bits_by_attribute, entropy_bits_per_person
from lib.run import ROW
from lib.tokenizers import load_tokenizer

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

    law: how the database was drawn, a name of `lib.facts.LAWS` (or the fields of another law).
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


def bounds(profile: str, tokenizer: str = "bytes") -> pd.DataFrame:
    """`minimal_parameters` of Section 5.1 in a profile, as `shown`."""
    return _shown_bounds(bounds_rows(profile, tokenizer))


def bounds_of_seeds(profile: str, threshold: float) -> pd.DataFrame:
    """`minimal_parameters_of_seeds` of Section 5.1 in a profile, of what `bounds` shows."""
    rows = bounds_rows(profile)
    return minimal_parameters_of_seeds(behind(rows, threshold), threshold)


def behind(rows: pd.DataFrame, threshold: float) -> pd.DataFrame:
    """Return the rows behind the points that `bounds` shows at a threshold."""
    points = minimal_parameters(rows, [threshold])
    return described(rows).merge(shown(points, "min_params_mean")[_GROUP]) if len(rows) else rows


def _shown_bounds(rows: pd.DataFrame) -> pd.DataFrame:
    return shown(minimal_parameters(rows), "min_params_mean", [*_POINT, "recall_threshold"])


def bounds_searches(profile: str, tokenizer: str = "bytes") -> list[Search]:
    """What Section 5.1 shows: its own searches, and in-tool the runs of 5.2 on databases that only it searches.

    Grids, searches without a threshold, do not count as that: they have no smallest model.
    """
    own = _plan("05_1", profile, tokenizer)
    others = [search for search in _plan("05_2", profile, tokenizer) if search.base.mode == "in-tool"]
    only_there = {_database_of(search) for search in others if search.threshold} - {_database_of(s) for s in own}
    return own + [search for search in others if _database_of(search) in only_there]


def _database_of(search: Search) -> tuple:
    return search.base.mode, search.base.facts


def bounds_rows(profile: str, tokenizer: str = "bytes") -> pd.DataFrame:
    """The finished runs of `bounds_searches`, and superseded ones of 5.2 where 5.1 itself has found no bound."""
    own, others = (read_rows(s, profile, _plan(s, profile, tokenizer)) for s in ("05_1", "05_2"))
    planned = {s.config(size).run_id for s in bounds_searches(profile, tokenizer) for size in s.sizes}
    if len(others):
        earlier = others.superseded & (others["mode"] == "in-tool")
        is_grid = others.every_seed.fillna(False).groupby([others[name] for name in _GROUP]).transform("all")
        found_here = minimal_parameters(own, [0.95]).dropna(subset="min_params_mean")[_POINT]
        found_here = pd.MultiIndex.from_frame(others[_POINT]).isin(pd.MultiIndex.from_frame(found_here))
        earlier &= ~is_grid.astype(bool) & ~found_here
        others = others[earlier | others.run_id.isin(planned)]
    return pd.concat([rows for rows in (own, others) if len(rows)] or [own], ignore_index=True)


def generalization_rows(profile: str) -> pd.DataFrame:
    """The finished runs of Section 5.2 at the sizes that every seed is to have (`Search.certain`), as `shown`."""
    rows = read_rows("05_2", profile)
    return sizes_shown(rows[rows.every_seed.fillna(False).astype(bool)])


def minimal_parameters(rows: pd.DataFrame, thresholds: Sequence[float] = THRESHOLDS) -> pd.DataFrame:
    """Parameters of the smallest model that reaches each recall threshold, over seeds (Section 5.1).

    rows: of one profile, with at most one run per mode, number of facts, correlation, law, recipe, seed and size.

    A seed counts only where the next smaller size was run and failed (`next_smaller`, or else that of `SIZES`): the
    smallest size that a search has tried so far may not be the smallest that would do. A row per (mode, n_facts, alpha,
    law, recipe, superseded, recall_threshold): mean, standard deviation (of a sample, over n - 1; the published ones
    are over n), minimum and maximum over the `seeds_reaching_it`, of `seeds` that were tried, and when the last run
    ended. The columns shared with the published table have the published names.
    """
    if not len(rows):
        return pd.DataFrame(columns=[*_GROUP, "recall_threshold", *_STATISTICS.values(), "finished_at"])
    tables = []
    for threshold in thresholds:
        of_seeds = minimal_parameters_of_seeds(rows, threshold).groupby(_GROUP)
        table = of_seeds.min_params.agg(list(_STATISTICS)).assign(finished_at=of_seeds.finished_at.max())
        tables.append(table.reset_index().assign(recall_threshold=threshold))
    table = pd.concat(tables).rename(columns=_STATISTICS)
    return table.sort_values([*_GROUP, "recall_threshold"], ignore_index=True)


def minimal_parameters_of_seeds(rows: pd.DataFrame, threshold: float) -> pd.DataFrame:
    """What `minimal_parameters` summarizes, seed by seed: also seed and min_params, NaN if unknown."""
    columns = [*_GROUP, "seed", "min_params", "finished_at"]
    if not len(rows):
        return pd.DataFrame(columns=columns)
    of_size = ["d_model", "n_params", "recall", "next_smaller", "finished_at"]
    runs_of_seeds = described(rows).reindex(columns=[*_GROUP, "seed", *of_size]).groupby([*_GROUP, "seed"])
    found = [(*key, _smallest(runs, threshold), runs.finished_at.max()) for key, runs in runs_of_seeds]
    return pd.DataFrame(found, columns=columns)


_STATISTICS = {
    "mean": "min_params_mean",
    "std": "min_params_std",
    "min": "min_params_min",
    "max": "min_params_max",
    "count": "seeds_reaching_it",
    "size": "seeds",
}


def _smallest(runs: pd.DataFrame, threshold: float) -> float:
    """Parameters of the smallest size that reached `threshold` if the next smaller one did not, else NaN."""
    reached = dict(zip(runs.d_model, runs.recall >= threshold, strict=True))
    enough = min((size for size, yes in reached.items() if yes), default=None)
    if enough is None:
        return math.nan
    run = runs[runs.d_model == enough].iloc[0]
    below = run.next_smaller
    if pd.isna(below):  # unless said otherwise, all sizes are to be tried
        below = max((size for size in SIZES if size < enough), default=0)
    known = not reached.get(below, True) if below else enough == SIZES[0]
    return float(run.n_params) if known else math.nan


def capacity(rows: pd.DataFrame) -> pd.DataFrame:
    """What in-weight models hold at least, in bits, for every run (Section 4's bound is about it).

    rows: of finished runs; given back are those in-weight, with what tells them apart and entropy_bits, the joint
    entropy of the database given the names; stored_bits, by how much knowing the model shortens a description of the
    answers for somebody who knows which values there are, added up over attributes where it does; and
    stored_bits_per_parameter. A lower bound: a model may know facts that it cannot spell yet.
    """
    columns = ["profile", "optimizer", "n_facts", "alpha", "seed", "d_model", "n_params", "steps", "stopped", "recall"]
    columns += COMPUTED
    nll = {attribute: f"nll_bits_{attribute}" for attribute in ATTRIBUTES}
    rows = described(rows).reindex(columns=["mode", *columns, *nll.values()])
    rows = rows[rows["mode"] == "in-weight"].reset_index(drop=True)
    n_people = rows.n_facts.floordiv(4)
    entropy = pd.DataFrame(
        [
            entropy_bits_by_attribute(int(n), int(seed), alpha, law_named(law))
            for n, seed, alpha, law in zip(n_people, rows.seed, rows.alpha, rows.law, strict=True)
        ],
        index=rows.index,
        columns=list(nll),
    )
    known = entropy.sub(rows[list(nll.values())].to_numpy(float)).clip(lower=0).sum(axis=1, skipna=False)
    return rows[columns].assign(
        entropy_bits=n_people * entropy.sum(axis=1),
        stored_bits=n_people * known,
        stored_bits_per_parameter=n_people * known / rows.n_params,
    )


def entropy_bits(rows: pd.DataFrame) -> pd.Series:
    """Joint entropy in bits of each row's database (n_facts, alpha, law) given the names; without a seed, of seed 0."""
    seeds = rows.get("seed", pd.Series(0, index=rows.index))
    bits = [
        n_facts // 4 * entropy_bits_per_person(n_facts // 4, seed, alpha, law_named(law))
        for n_facts, seed, alpha, law in zip(rows.n_facts, seeds, rows.alpha, rows.law, strict=True)
    ]
    return pd.Series(bits, index=rows.index, dtype=float)


def compressibility_bounds(profile: str) -> pd.DataFrame:
    """`minimal_parameters` of Section 5.3's runs, as `shown`, with the entropy_bits of the databases."""
    bounds = _shown_bounds(read_rows("05_3", profile))
    return bounds.assign(entropy_bits=entropy_bits(bounds))


def biographies_bounds(profile: str, threshold: float = 0.95) -> pd.DataFrame:
    """Parameters needed without and with biographies among the training text, and their ratio, where both are known.

    A row per number of facts: needed_without and needed_with are means over the `seeds` of which both are known. Each
    seed has a database and weights of its own: what other seeds need says nothing about biographies.
    """
    with_them = minimal_parameters_of_seeds(read_rows("05_1_biographies", profile), threshold)
    without = minimal_parameters_of_seeds(bounds_rows(profile), threshold)
    both = without.merge(with_them, on=[*_POINT, "recipe", "seed"], suffixes=("_without", "_with"))
    both = both.dropna(subset=["min_params_without", "min_params_with"])
    both["superseded"] = both.superseded_without.astype(bool) | both.superseded_with.astype(bool)
    needed = {f"needed_{which}": (f"min_params_{which}", "mean") for which in ("without", "with")}
    table = both.groupby(_GROUP).agg(**needed, seeds=("seed", "size"), finished_at=("finished_at_with", "max"))
    table = shown(table.reset_index(), "needed_with")[["n_facts", "superseded", *needed, "seeds"]]
    return table.assign(ratio=table.needed_with / table.needed_without)


def fit_line(points: pd.DataFrame, of: str = "min_params_mean", resamples: int = 2000) -> dict[str, float]:
    """Parameters needed as a line in the facts: slope (parameters a fact), its 95% interval, intercept, n_points.

    points: n_facts and the column `of`; those without a value are left out. The interval is the bootstrap's, over
    points: of means it says how much the slope depends on which numbers of facts were tried, of `min_params` also on
    the seeds. It is too narrow where points are few (of three seeds at two numbers of facts it covers the truth five
    times in six), has no width where all are equal, and is not given for fewer than five (NaN).
    """
    points = points.dropna(subset=of)
    x, y = points.n_facts.to_numpy(float), points[of].to_numpy(float)
    fit = dict.fromkeys(("slope", "low", "high", "intercept"), math.nan) | {"n_points": len(x)}
    if len(x) < 2:
        return fit
    fit["slope"], fit["intercept"] = map(float, np.polyfit(x, y, 1))
    if len(x) > 4:
        rng = np.random.default_rng(0)
        draws = [rng.integers(len(x), size=len(x)) for _ in range(resamples)]
        slopes = [np.polyfit(x[i], y[i], 1)[0] for i in draws if len(set(x[i])) > 1]
        fit["low"], fit["high"] = map(float, np.quantile(slopes, [0.025, 0.975]))
    return fit


def unseen_shares(rows: pd.DataFrame) -> pd.DataFrame:
    """The columns about unseen people (`lib.generalization`) as a tidy table: a row per run, kind and measure.

    kind: what is new in the names, or `trained`; measure: recall, well_formed, right_attribute or right_name; share.
    """
    if not len(rows):
        return pd.DataFrame(columns=[*_OF_RUN, "share", "kind", "measure"])
    columns = [column for column in rows.columns if column.startswith(("trained_", "new_"))]
    tidy = described(rows).melt(_OF_RUN, columns, "column", "share").dropna(subset="share")
    kind_and_measure = tidy.pop("column").str.extract(r"^(trained|new_[a-z]+?)_(.+)$")
    return tidy.assign(kind=kind_and_measure[0], measure=kind_and_measure[1]).reset_index(drop=True)


_OF_RUN = ["mode", "n_facts", "n_params", "d_model", "seed", *COMPUTED]
