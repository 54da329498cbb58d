"""Rows of finished runs as tidy tables: read, publish, aggregate, compare with the paper."""

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from lib import paths
from lib.base import InputError
from lib.experiments import SIZES, Search, searches
from lib.facts import ATTRIBUTES, entropy_bits_by_attribute, entropy_bits_per_person
from lib.run import ROW, commit
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
    return pd.read_csv(path, dtype=dict.fromkeys(_TEXT, str))


#: Columns of which a value may look like a number: hexadecimal digits, versions.
_TEXT = ("run_id", "people_digest", "commit", "python", "torch")


def read_rows(section: str, profile: str, plan: Sequence[Search] | None = None) -> pd.DataFrame:
    """One row per finished run of a section in a profile: those in paper_data and those still in runs.

    A row counts only if `plan`, or else today's, can ask for it, and its tokenizer's file is what it was; one of an
    earlier plan stays where it is until rows are published.
    """
    plan = searches(section, profile) if plan is None else plan
    planned, tokenizers = _run_ids(plan), {load_tokenizer(spec).name for spec in {s.base.tokenizer for s in plan}}
    found = sorted(sweep_dir(section, profile).glob(f"*/{ROW}"))
    fresh = [json.loads(path.read_text()) for path in found if path.parent.name in planned]
    fresh = [row for row in fresh if row.get("tokenizer", "bytes") in tokenizers]
    rows = pd.DataFrame([{"profile": profile, **row} for row in fresh])
    known = committed_rows(section)
    if len(known):
        rows = pd.concat([known[(known.profile == profile) & known.run_id.isin(planned)], rows])
    return rows.drop_duplicates("run_id", keep="first").reset_index(drop=True) if len(rows) else rows


def _run_ids(plan: Sequence[Search]) -> set[str]:
    return {search.config(size).run_id for search in plan for size in search.sizes}


def counting_profile(profile: str) -> str:
    """Which profile's rows a notebook shows as results: its own if it publishes, laptop if not."""
    return profile if profile in paths.PUBLISHING else "laptop"


def counting_rows(section: str, profile: str) -> pd.DataFrame:
    """The rows that results are shown from, see `counting_profile`."""
    return read_rows(section, counting_profile(profile))


def bounds(profile: str, tokenizer: str = "bytes") -> pd.DataFrame:
    """`minimal_parameters` of Section 5.1 in a profile."""
    return minimal_parameters(bounds_rows(profile, tokenizer), bounds_searches(profile, tokenizer))


def bounds_of_seeds(profile: str, threshold: float) -> pd.DataFrame:
    """`minimal_parameters_of_seeds` of Section 5.1 in a profile."""
    return minimal_parameters_of_seeds(bounds_rows(profile), bounds_searches(profile), threshold)


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
    """Merge a sweep's finished rows into paper_data, sorted; returns how many are new.

    Rows of the profile that today's plan does not ask for leave the table.

    Only the profiles that count publish, and only rows whose commit is known and clean: others are an `InputError`.
    """
    check_publishes(profile)
    rows, known = read_rows(section, profile), committed_rows(section)
    if not len(rows):
        return 0
    bad = rows[~rows.commit.map(is_clean)]
    if len(bad):
        raise InputError(
            f"{len(bad)} rows were not made by a clean commit (run {bad.run_id.iloc[0]}, commit {bad.commit.iloc[0]}): "
            f"only rows that can be traced are published, delete these in {sweep_dir(section, profile)} and sweep again"
        )
    others = known[known.profile != profile] if len(known) else known
    merged = pd.concat([others, rows]).sort_values(["profile", "mode", "n_facts", "alpha", "seed", "d_model", "run_id"])
    with paths.replacing(table_path(section)) as temporary:
        merged.to_csv(temporary, index=False, lineterminator="\n")
    return len(merged) - len(known.merge(merged[["profile", "run_id"]])) if len(known) else len(merged)


def bounds_searches(profile: str, tokenizer: str = "bytes") -> list[Search]:
    """What Section 5.1 shows: its own searches, and in-tool the runs of 5.2 on databases that only it searches.

    Grids, searches without a threshold, do not count as that: they have no smallest model.
    """
    own = searches("05_1", profile, tokenizer)
    others = [search for search in searches("05_2", profile, tokenizer) if search.base.mode == "in-tool"]
    only_there = {_database_of(search) for search in others if search.threshold} - {_database_of(s) for s in own}
    return own + [search for search in others if _database_of(search) in only_there]


def _database_of(search: Search) -> tuple:
    return search.base.mode, search.base.facts


def bounds_rows(profile: str, tokenizer: str = "bytes") -> pd.DataFrame:
    """The finished runs of `bounds_searches`."""
    plans = {section: searches(section, profile, tokenizer) for section in ("05_1", "05_2")}
    rows = pd.concat([read_rows(section, profile, plan) for section, plan in plans.items()], ignore_index=True)
    if not len(rows):
        return rows
    return rows[rows.run_id.isin(_run_ids(bounds_searches(profile, tokenizer)))].reset_index(drop=True)


def generalization_rows(profile: str) -> pd.DataFrame:
    """The finished runs of Section 5.2 at the sizes that every seed is to have (`Search.certain`)."""
    rows = read_rows("05_2", profile)
    plan = searches("05_2", profile)
    certain = {search.config(size).run_id for search in plan for size in search.certain}
    return rows[rows.run_id.isin(certain)].reset_index(drop=True) if len(rows) else rows


def minimal_parameters(
    rows: pd.DataFrame, plan: Sequence[Search] = (), thresholds: Sequence[float] = THRESHOLDS
) -> pd.DataFrame:
    """Parameters of the smallest model that reaches each recall threshold, over seeds (Section 5.1).

    rows: of one profile, with at most one run per mode, number of facts, correlation, seed and size. plan: the searches
    that asked for them, for the sizes that were to be tried; all of `SIZES` where it says nothing.

    A seed counts only where the next smaller size was run and failed: the smallest size that a search has tried so far
    may not be the smallest that would do. A row per (mode, n_facts, alpha, recall_threshold): mean, standard deviation
    (of a sample, over n - 1; the published ones are over n), minimum and maximum over the `seeds_reaching_it`, of
    `seeds` that were tried. The columns shared with the published table have the published names.
    """
    if not len(rows):
        return pd.DataFrame(columns=[*_POINT, "recall_threshold", *_STATISTICS.values()])
    tables = []
    for threshold in thresholds:
        of_seeds = minimal_parameters_of_seeds(rows, plan, threshold).groupby(_POINT).min_params
        tables.append(of_seeds.agg(list(_STATISTICS)).reset_index().assign(recall_threshold=threshold))
    table = pd.concat(tables).rename(columns=_STATISTICS)
    return table.sort_values([*_POINT, "recall_threshold"], ignore_index=True)


def minimal_parameters_of_seeds(rows: pd.DataFrame, plan: Sequence[Search], threshold: float) -> pd.DataFrame:
    """What `minimal_parameters` summarizes, seed by seed: mode, n_facts, alpha, seed and min_params, NaN if unknown."""
    if not len(rows):
        return pd.DataFrame(columns=[*_POINT, "seed", "min_params"])
    sizes = defaultdict(set)
    for search in plan:
        facts = search.base.facts
        sizes[search.base.mode, 4 * facts.n_people, facts.alpha, search.base.seed] |= set(search.sizes)
    runs_of_seeds = rows.groupby([*_POINT, "seed"])
    smallest = {key: _smallest(runs, threshold, sizes.get(key, SIZES)) for key, runs in runs_of_seeds}
    return pd.DataFrame([(*key, n) for key, n in smallest.items()], columns=[*_POINT, "seed", "min_params"])


#: What a point of a figure is about.
_POINT = ["mode", "n_facts", "alpha"]
_STATISTICS = {
    "mean": "min_params_mean",
    "std": "min_params_std",
    "min": "min_params_min",
    "max": "min_params_max",
    "count": "seeds_reaching_it",
    "size": "seeds",
}


def _smallest(runs: pd.DataFrame, threshold: float, sizes: Sequence[int]) -> float:
    """Parameters of the smallest size that reached `threshold` if the next smaller of `sizes` did not, else NaN."""
    reached = dict(zip(runs.d_model, runs.recall >= threshold, strict=True))
    enough = min((size for size, yes in reached.items() if yes), default=None)
    below = max((size for size in sizes if enough is not None and size < enough), default=None)
    floor = enough is not None and below is None and enough > SIZES[0]  # nobody was to try smaller ones
    if enough is None or floor or (below is not None and reached.get(below, True)):
        return math.nan
    return float(runs.n_params[runs.d_model == enough].iloc[0])


def capacity(rows: pd.DataFrame) -> pd.DataFrame:
    """What in-weight models hold at least, in bits, for every run (Section 4's bound is about it).

    rows: of finished runs; given back are those in-weight, with what tells them apart and entropy_bits, the joint
    entropy of the database given the names; stored_bits, by how much knowing the model shortens a description of the
    answers for somebody who knows which values there are, added up over attributes where it does; and
    stored_bits_per_parameter. A lower bound: a model may know facts that it cannot spell yet.
    """
    columns = ["profile", "optimizer", "n_facts", "alpha", "seed", "d_model", "n_params", "steps", "stopped", "recall"]
    nll = {attribute: f"nll_bits_{attribute}" for attribute in ATTRIBUTES}
    rows = rows.reindex(columns=["mode", *columns, *nll.values()])
    rows = rows[rows["mode"] == "in-weight"].reset_index(drop=True)
    n_people = rows.n_facts.floordiv(4)
    entropy = pd.DataFrame(
        [
            entropy_bits_by_attribute(int(n), int(seed), alpha)
            for n, seed, alpha in zip(n_people, rows.seed, rows.alpha, strict=True)
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
    """Joint entropy of each row's database (n_facts, alpha) given the names, in bits; of seed 0 if there is none."""
    seeds = rows.get("seed", pd.Series(0, index=rows.index))
    bits = [
        n_facts // 4 * entropy_bits_per_person(n_facts // 4, seed, alpha)
        for n_facts, seed, alpha in zip(rows.n_facts, seeds, rows.alpha, strict=True)
    ]
    return pd.Series(bits, index=rows.index, dtype=float)


def compressibility_bounds(profile: str) -> pd.DataFrame:
    """`minimal_parameters` of Section 5.3's runs, with the entropy_bits of the databases."""
    bounds = minimal_parameters(read_rows("05_3", profile), searches("05_3", profile))
    return bounds.assign(entropy_bits=entropy_bits(bounds))


def biographies_bounds(profile: str, threshold: float = 0.95) -> pd.DataFrame:
    """Parameters needed without and with biographies among the training text, and their ratio, where both are known.

    A row per number of facts: needed_without and needed_with are means over the `seeds` of which both are known. Each
    seed has a database and weights of its own: what other seeds need says nothing about biographies.
    """
    plan = searches("05_1_biographies", profile)
    with_them = minimal_parameters_of_seeds(read_rows("05_1_biographies", profile), plan, threshold)
    both = bounds_of_seeds(profile, threshold).merge(with_them, on=[*_POINT, "seed"], suffixes=("_without", "_with"))
    needed = {f"needed_{which}": (f"min_params_{which}", "mean") for which in ("without", "with")}
    table = both.dropna().groupby("n_facts").agg(**needed, seeds=("seed", "size")).reset_index()
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
        return pd.DataFrame(columns=["mode", "n_facts", "n_params", "d_model", "seed", "share", "kind", "measure"])
    columns = [column for column in rows.columns if column.startswith(("trained_", "new_"))]
    tidy = rows.melt(["mode", "n_facts", "n_params", "d_model", "seed"], columns, "column", "share").dropna(
        subset="share"
    )
    kind_and_measure = tidy.pop("column").str.extract(r"^(trained|new_[a-z]+?)_(.+)$")
    return tidy.assign(kind=kind_and_measure[0], measure=kind_and_measure[1]).reset_index(drop=True)
