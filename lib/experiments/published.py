"""Our results beside the paper's own, point by point."""

from pathlib import Path

import pandas as pd

from lib import paths
from lib.base import InputError
from lib.experiments import summaries, tables

#: What a published point of a section is about.
_POINTS = {
    "05_1": ["mode", "n_facts", "recall_threshold"],
    "05_2": ["mode", "n_facts", "n_params"],
    "05_3": ["n_facts", "alpha", "recall_threshold"],
}
#: Of which kind of `lib.facts.sampling.UNSEEN` the people are whom the paper asks about in 5.2.
PUBLISHED_KIND = "new_first"
_OURS = ["law", "superseded", "ours", "ours_std", "seeds_reaching_it", "seeds"]


def published_by_paper(name: str) -> pd.DataFrame:
    """A table of paper_data/published: the paper's own numbers (CC BY-NC 4.0)."""
    return pd.read_csv(paths.PUBLISHED / f"{name}.csv")


def published_correlated() -> pd.DataFrame:
    """The paper's points of Section 5.3, with the columns alpha, law and entropy_bits of their databases.

    Their 4,000 facts are taken to be of people with the names of the 32,768 (see `lib.facts.people.RELEASED`).
    """
    table = published_by_paper("compressibility").rename(columns={"correlation_alpha": "alpha"})
    table = table.assign(law="released")
    return table.assign(entropy_bits=summaries.entropy_bits(table))


def compare(section: str, profile: str) -> pd.DataFrame:
    """Ours, the published figure and their ratio (ours / published), where both have a point.

    In Sections 5.1 and 5.3 the figure is the parameters of the smallest model that reaches a recall threshold, ours in
    the mean of the `seeds_reaching_it`; in 5.2 it is the recall of people with new first names and last names that were
    trained on, as the released ones have. A row per point: what it is about, how our database was drawn, whether our
    runs are of an earlier recipe, ours, ours_std, seeds_reaching_it, seeds, published, ratio. A section without
    published points is an `InputError`.
    """
    if section not in _POINTS:
        raise InputError(f"nothing is published to compare section {section} with: there are {', '.join(_POINTS)}")
    ours, published = _OF_SECTION[section](profile)
    both = ours.merge(published, on=_POINTS[section])
    both = both.assign(ratio=both.ours / both.published).dropna(subset="ratio")
    return both[[*_POINTS[section], *_OURS, "published", "ratio"]].reset_index(drop=True)


def _bounds(profile: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    published = published_by_paper("parameter_bounds").rename(columns={"min_params_mean": "published"})
    return _minimal(summaries.bounds(profile)), published.drop(columns="min_params_std")


def _compressibility(profile: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    published = published_correlated().rename(columns={"min_params": "published"})
    return _minimal(summaries.compressibility_bounds(profile)), published.drop(columns=["law", "entropy_bits"])


def _minimal(bounds: pd.DataFrame) -> pd.DataFrame:
    return bounds.rename(columns={"min_params_mean": "ours", "min_params_std": "ours_std"})


def _generalization(profile: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    about = [*_POINTS["05_2"], "law", "superseded"]
    rows = tables.described(summaries.generalization_rows(profile)).reindex(
        columns=[*about, f"{PUBLISHED_KIND}_recall"]
    )
    grouped = rows.groupby(about)[f"{PUBLISHED_KIND}_recall"]
    ours = grouped.agg(ours="mean", ours_std="std", seeds_reaching_it="count", seeds="size").reset_index()
    return ours, published_by_paper("generalization").rename(columns={"ood_recall": "published"})


SECTIONS = tuple(_POINTS)
PROFILES = (*paths.PUBLISHING, *tables.TABLE_ONLY)
_OF_SECTION = {"05_1": _bounds, "05_2": _generalization, "05_3": _compressibility}


def path(section: str) -> Path:
    """Where a section's comparison is committed: paper_data/compared/<table>.csv."""
    return paths.PAPER_DATA / "compared" / tables.table_path(section).name


def write(section: str) -> pd.DataFrame:
    """Write `compare` of all profiles in the tables, with a column `profile`, to `path`; returns the table."""
    tables = [compare(section, profile).assign(profile=profile) for profile in PROFILES]
    table = pd.concat(tables).set_index("profile").reset_index()  # the profile first
    if not len(table):
        path(section).unlink(missing_ok=True)
        return table
    path(section).parent.mkdir(exist_ok=True)
    with paths.replacing(path(section)) as temporary:
        table.to_csv(temporary, index=False, lineterminator="\n", float_format="%.6g")
    return table
