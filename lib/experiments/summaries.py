"""Tables of rows summarized: parameters needed, capacity, slopes, recall of unseen people."""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from lib.config import config_of
from lib.experiments import tables
from lib.experiments.plan import SIZES, Search
from lib.experiments.rows import SHARED
from lib.experiments.tables import COMPUTED, GROUP, POINT, THRESHOLDS, described, read_rows, searches_of
from lib.facts.entropy import entropy_bits_by_attribute
from lib.facts.people import ATTRIBUTES, LAWS, VALUES
from lib.model.bounds import bits_at_recall


def bounds_searches(profile: str, tokenizer: str = "bytes") -> list[Search]:
    """Return the searches of Section 5.1, and 5.2's in-tool searches on databases that 5.1 does not search.

    Grids (searches without a threshold) are left out: they have no smallest model.
    """
    own = searches_of("05_1", profile, tokenizer)
    searched = {(search.base.mode, search.base.facts) for search in own}
    others = [s for s in searches_of("05_2", profile, tokenizer) if s.base.mode == "in-tool" and s.threshold]
    return own + [search for search in others if (search.base.mode, search.base.facts) not in searched]


def bounds_rows(profile: str, tokenizer: str = "bytes") -> pd.DataFrame:
    """Return 5.1's runs, 5.2's in `bounds_searches`, and 5.2's superseded in-tool searches in place of 5.1's.

    These have one recipe over all numbers of facts; 5.1's superseded in-tool runs, of twice the steps, fill gaps.
    """
    own, others = (read_rows(s, profile, searches_of(s, profile, tokenizer)) for s in ("05_1", "05_2"))
    planned = {run_id for search in bounds_searches(profile, tokenizer) for run_id in search.run_ids}
    if len(others):
        is_grid = others.fillna({"every_seed": False}).groupby(GROUP).every_seed.transform("all")
        earlier = others.superseded & (others["mode"] == "in-tool") & ~is_grid.astype(bool)
        points = pd.MultiIndex.from_frame(others.loc[earlier, POINT])
        others = others[earlier | others.run_id.isin(planned)]
        own = own[~(own.superseded & pd.MultiIndex.from_frame(own[POINT]).isin(points))] if len(own) else own
    return tables.stacked(own, others)


def generalization_rows(profile: str) -> pd.DataFrame:
    """Return the finished runs of Section 5.2 at the sizes that every seed runs (`Search.certain`), as `shown`."""
    rows = read_rows("05_2", profile)
    return tables.sizes_shown(rows[rows.every_seed.fillna(False).astype(bool)])


def rows_with_shared(section: str, profile: str) -> pd.DataFrame:
    """Return the finished runs of a section of `SHARED`, its own and those that it shares with others."""
    own, *others = (read_rows(each, profile, searches_of(section, profile)) for each in (section, *SHARED[section]))
    return tables.stacked(own, *(table[~table.superseded] for table in others)).drop_duplicates("run_id")


def shown_bounds(rows: pd.DataFrame, thresholds: Sequence[float] = THRESHOLDS) -> pd.DataFrame:
    """Return `minimal_parameters`, as `shown`."""
    return tables.shown(minimal_parameters(rows, thresholds), "min_params_mean", [*POINT, "recall_threshold"])


def compressibility_bounds(rows: pd.DataFrame) -> pd.DataFrame:
    """Return `shown_bounds` with the entropy_bits of the databases."""
    table = shown_bounds(rows)
    return table.assign(entropy_bits=entropy_bits(table))


def bounds_by_seed(profile: str) -> pd.DataFrame:
    """Return `seeds_of_bounds` of Section 5.1 in a profile."""
    return seeds_of_bounds(bounds_rows(profile))


def seeds_of_bounds(rows: pd.DataFrame) -> pd.DataFrame:
    """Return `minimal_parameters_of_seeds` at each recall_threshold; shown: whether `shown_bounds` has this recipe."""
    of_thresholds = (minimal_parameters_of_seeds(rows, threshold) for threshold in THRESHOLDS)
    seeds, point = pd.concat(of_thresholds, ignore_index=True), [*GROUP, "recall_threshold"]
    points = pd.MultiIndex.from_frame(shown_bounds(rows)[point])
    return seeds.assign(shown=pd.MultiIndex.from_frame(seeds[point]).isin(points))


def behind(rows: pd.DataFrame, threshold: float) -> pd.DataFrame:
    """Return the rows behind the points that `shown_bounds` has at a threshold."""
    return described(rows).merge(shown_bounds(rows, [threshold])[GROUP]) if len(rows) else rows


def minimal_parameters(rows: pd.DataFrame, thresholds: Sequence[float] = THRESHOLDS) -> pd.DataFrame:
    """Return the parameters of the smallest model that reaches each recall threshold, over seeds (Section 5.1).

    rows: of one profile, with at most one run per mode, number of facts, correlation, law, recipe, seed and size.

    A seed counts only where the next smaller size was run and failed (`next_smaller`, or else that of `SIZES`): the
    smallest size that a search has tried so far may not be the smallest that would do. A row per (mode, n_facts, alpha,
    law, recipe, superseded, recall_threshold): mean, standard deviation (of a sample, over n - 1; the published ones
    are over n), minimum and maximum over the `seeds_reaching_it`, of `seeds` that were tried, and when the last run
    ended. The columns shared with the published table have the published names.
    """
    if not len(rows):
        return pd.DataFrame(columns=[*GROUP, "recall_threshold", *_STATISTICS, "finished_at"])
    points = pd.concat(minimal_parameters_of_seeds(rows, each) for each in thresholds)
    points = points.groupby([*GROUP, "recall_threshold"])
    return points.min_params.agg(**_STATISTICS).assign(finished_at=points.finished_at.max()).reset_index()


def minimal_parameters_of_seeds(rows: pd.DataFrame, threshold: float) -> pd.DataFrame:
    """Return what `minimal_parameters` summarizes, seed by seed.

    Adds seed; min_params, NaN if unknown; at_most: the parameters of the smallest model that reached the threshold;
    more_than: of the largest below it that failed. Either is NaN if there is none.
    """
    seed = [*GROUP, "seed"]
    columns = ["d_model", "n_params", "recall", "next_smaller", "config", "finished_at"]
    runs = described(rows).reindex(columns=[*seed, *columns])
    found = runs[runs.recall >= threshold].sort_values("d_model").drop_duplicates(seed)
    at_most = found.set_index(seed).n_params.astype(float)
    of_sizes = found.d_model.map(lambda d_model: max((size for size in SIZES if size < d_model), default=0))
    below = found.assign(d_model=found.next_smaller.fillna(of_sizes))  # of `SIZES` where no plan says
    tried = pd.MultiIndex.from_frame(below[[*seed, "d_model"]]).isin(pd.MultiIndex.from_frame(runs[[*seed, "d_model"]]))
    least = [
        max(SIZES[0], 2 * config_of({"config": config}).model.n_heads)
        for config in found.config.astype(object).fillna("{}")
    ]
    known = found[tried | found.d_model.le(least)].set_index(seed)  # a smaller size was not enough, or there is none
    smaller = runs.n_params.lt(runs[seed].join(at_most.rename("most"), on=seed).most.fillna(np.inf))
    more_than = runs[smaller].groupby(seed).n_params.max()
    columns = {"min_params": known.n_params.astype(float), "more_than": more_than, "at_most": at_most}
    columns["finished_at"] = runs.groupby(seed).finished_at.max()
    return pd.DataFrame(columns).reset_index().assign(recall_threshold=threshold)


_STATISTICS = {
    **{f"min_params_{of}": of for of in ("mean", "std", "min", "max")},
    "seeds_reaching_it": "count",
    "seeds": "size",
}


def capacity(rows: pd.DataFrame) -> pd.DataFrame:
    """Return a lower bound on the bits that each finished in-weight model stores (what Section 4 bounds).

    Columns: what tells the runs apart; entropy_bits, the joint entropy of the database given the names; stored_bits;
    and stored_bits_per_parameter. For each attribute it is the larger of two bounds: the entropy minus nll_bits and,
    where facts are independent (alpha = 0), `bits_at_recall`. The first is loose for facts that the model cannot spell
    yet, and under focal loss, which leaves right answers unsure.
    """
    columns = ["profile", "optimizer", "n_facts", "alpha", "seed", "d_model", "n_params", "steps", "stopped", "recall"]
    columns += ["dialogs_seen", *COMPUTED]
    nll, recall = ([f"{of}_{attribute}" for attribute in ATTRIBUTES] for of in ("nll_bits", "recall"))
    rows = described(rows).reindex(columns=["mode", *columns, *nll, *recall])
    rows = rows[rows["mode"] == "in-weight"].reset_index(drop=True)
    n_people, entropy = rows.n_facts // len(ATTRIBUTES), _entropy_per_person(rows)
    by_likelihood = entropy.sub(rows[nll].to_numpy(float)).clip(lower=0)
    shares = rows[recall].set_axis(ATTRIBUTES, axis=1).where(rows.alpha == 0)
    by_recall = [
        [bits_at_recall(share, [len(VALUES[name])]) if share > 0 else np.nan for share in shares[name]]
        for name in ATTRIBUTES
    ]
    stored = n_people * np.fmax(by_likelihood, np.transpose(by_recall)).sum(axis=1, skipna=False)
    rows = rows[columns].assign(entropy_bits=n_people * entropy.sum(axis=1), stored_bits=stored)
    return rows.assign(stored_bits_per_parameter=stored / rows.n_params)


def entropy_bits(rows: pd.DataFrame) -> pd.Series:
    """Return the joint entropy in bits of each row's database given the names (see `_entropy_per_person`)."""
    return rows.n_facts // len(ATTRIBUTES) * _entropy_per_person(rows).sum(axis=1)


def _entropy_per_person(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the bits per person of each attribute, for the database (n_facts, alpha, law, seed or 0) of each row."""
    seeds = rows.get("seed", pd.Series(0, rows.index))
    bits = [
        entropy_bits_by_attribute(int(n_facts) // len(ATTRIBUTES), int(seed), alpha, LAWS[law])
        for n_facts, seed, alpha, law in zip(rows.n_facts, seeds, rows.alpha, rows.law, strict=True)
    ]
    return pd.DataFrame(bits, rows.index, columns=ATTRIBUTES, dtype=float)


def fit_line(points: pd.DataFrame, of: str = "min_params_mean") -> dict[str, float]:
    """Fit parameters needed as a line in the facts: slope (parameters per fact), its 95% interval, intercept, n_points.

    points: n_facts and the column `of`; those without a value are left out. The interval is a bootstrap over the seeds
    within each number of facts: NaN with fewer than five points or where a number of facts has one (a mean, say), and
    without width if seeds agree. With three seeds each it is too narrow: it covers the truth about four times in five.
    """
    points = points.dropna(subset=of).sort_values("n_facts")
    x, y = points.n_facts.to_numpy(float), points[of].to_numpy(float)
    fit = dict.fromkeys(("slope", "low", "high", "intercept"), math.nan) | {"n_points": len(x)}
    if len({*x}) < 2:
        return fit
    fit["slope"], fit["intercept"] = map(float, np.polyfit(x, y, 1))
    if len(x) > 4 and np.unique(x, return_counts=True)[1].min() > 1:
        rng, from_mean = np.random.default_rng(0), x - x.mean()
        drawn = np.hstack([rng.choice(y[x == n], (2000, (x == n).sum())) for n in np.unique(x)])
        slopes = drawn @ from_mean / (from_mean @ from_mean)
        fit["low"], fit["high"] = map(float, np.quantile(slopes, [0.025, 0.975]))
    return fit


#: The number of facts from which a line is fitted: below, in-weight models pay for the language of the dialogs, and
#: in-tool models memorize instead of copying.
FIT_FROM = {"in-weight": 256, "in-tool": 4096}


def fitted(seeds: pd.DataFrame, mode: str) -> pd.DataFrame:
    """Return the points of `seeds` that a line is fitted to: a mode's from `FIT_FROM` facts on, one per seed.

    seeds: of one threshold, with min_params. Points are of today's plan or of one earlier recipe, whichever has most
    numbers of facts.
    """
    points = described(seeds).query(f"mode == '{mode}' and n_facts >= {FIT_FROM[mode]}").dropna(subset="min_params")
    recipe = points.recipe.where(points.superseded.astype(bool), "")  # "" comes first where two have equally many
    return points[recipe.isin(points.groupby(recipe).n_facts.nunique().nlargest(1).index)]


def fit_of_mode(seeds: pd.DataFrame, mode: str) -> dict:
    """Return `fit_line` over the points `fitted`, their numbers of `facts` and their `recipes`."""
    points = fitted(seeds, mode)
    used = {"facts": tuple(points.n_facts.sort_values().unique()), "recipes": tuple(points.recipe.unique())}
    return fit_line(points, of="min_params") | used


def unseen_shares(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the columns about unseen people (`lib.evaluation.generalization`): a row per run, kind and measure.

    kind: what is new in the names, or `trained`; measure: recall, well_formed, right_attribute or right_name; share.
    """
    if not len(rows):
        return pd.DataFrame(columns=[*_OF_RUN, "share", "kind", "measure"])
    columns = rows.filter(regex="^(trained|new)_").columns
    tidy = described(rows).melt(_OF_RUN, columns, "column", "share").dropna(subset="share", ignore_index=True)
    return tidy.join(tidy.pop("column").str.extract(r"^(?P<kind>trained|new_[a-z]+?)_(?P<measure>.+)$"))


_OF_RUN = ["mode", "n_facts", "n_params", "d_model", "seed", *COMPUTED]


def seeds_that_generalize(shares: pd.DataFrame) -> pd.DataFrame:
    """Return how many seeds recall unseen people of every kind: share, low, high and seeds, a row per size and n_facts.

    shares: as `unseen_shares` gives them. A seed counts if its recall reaches 95% on each kind.
    """
    by = [name for name in (*_OF_RUN, "own") if name in shares and name != "seed"]
    unseen = shares.query("measure == 'recall' and kind != 'trained'")
    found = unseen.groupby([*by, "seed"]).share.min().ge(0.95).groupby(by).agg(["sum", "size"]).reset_index()
    low, high = interval_of_share(found["sum"], found["size"])
    return found[by].assign(share=found["sum"] / found["size"], low=low, high=high, seeds=found["size"])


def interval_of_share(hits: pd.Series, n: pd.Series) -> tuple[pd.Series, pd.Series]:
    """Return both ends of Wilson's 95% interval of a share, `hits` of `n`."""
    z = 1.96
    center, half = hits + z**2 / 2, z * (hits * (n - hits) / n + z**2 / 4) ** 0.5
    return (center - half) / (n + z**2), (center + half) / (n + z**2)
