"""Our results beside the paper's own, point by point."""

from pathlib import Path

import pandas as pd

from lib import paths
from lib.base import check_known
from lib.experiments import summaries, tables
from lib.experiments.rows import TABLES, table_path

#: Columns that identify a published point of a section.
_POINTS = {
    "05_1": ["mode", "n_facts", "recall_threshold"],
    "05_2": ["mode", "n_facts", "n_params"],
    "05_3": ["n_facts", "alpha", "recall_threshold"],
}
SECTIONS = tuple(_POINTS)
PROFILES = (*paths.PUBLISHING, *tables.TABLE_ONLY)
#: The kind of `lib.facts.sampling.UNSEEN` that the paper asks about in Section 5.2.
PUBLISHED_KIND = "new_first"


def published_by_paper(name: str) -> pd.DataFrame:
    """Return a table of paper_data/published: the paper's own numbers (CC BY-NC 4.0)."""
    return pd.read_csv(paths.PUBLISHED / f"{name}.csv")


def published_correlated() -> pd.DataFrame:
    """Return the paper's points of Section 5.3, with the columns alpha, law and entropy_bits of their databases.

    The names behind its 4,000 facts are assumed to be those behind its 32,768 (`lib.facts.people.RELEASED`).
    """
    table = published_by_paper("compressibility").rename(columns={"correlation_alpha": "alpha"}).assign(law="released")
    return table.assign(entropy_bits=summaries.entropy_bits(table))


def compare(section: str, profile: str) -> pd.DataFrame:
    """Return our value, the published one and their ratio (ours / published) for each point that both have.

    In Sections 5.1 and 5.3 the value is the parameters of the smallest model that reaches a recall threshold (ours: the
    mean over the `seeds_reaching_it`); in 5.2 it is the recall of people with new first and known last
    names, like the released ones. A row per point: the columns that identify it, law and superseded (of our runs),
    ours, ours_std, seeds_reaching_it, seeds, published, ratio. A section without published points is an `InputError`.
    """
    check_known("section", section, _POINTS, " among those with published points")
    if section == "05_2":
        about, recall = [*_POINTS[section], "law", "superseded"], f"{PUBLISHED_KIND}_recall"
        rows = tables.described(summaries.generalization_rows(profile)).reindex(columns=[*about, recall])
        statistics = {"ours": "mean", "ours_std": "std", "seeds_reaching_it": "count", "seeds": "size"}
        ours = rows.groupby(about)[recall].agg(**statistics).reset_index()
    else:
        rows = summaries.bounds_rows(profile) if section == "05_1" else tables.read_rows(section, profile)
        ours = summaries.shown_bounds(rows).rename(columns={"min_params_mean": "ours", "min_params_std": "ours_std"})
    names = dict.fromkeys(("min_params_mean", "min_params", "ood_recall"), "published") | {"correlation_alpha": "alpha"}
    published = published_by_paper(TABLES[section]).rename(columns=names)
    both = ours.merge(published[[*_POINTS[section], "published"]], on=_POINTS[section])
    both = both.assign(ratio=both.ours / both.published).dropna(subset="ratio")
    columns = ["law", "superseded", "ours", "ours_std", "seeds_reaching_it", "seeds", "published", "ratio"]
    return both[[*_POINTS[section], *columns]].reset_index(drop=True)


def path(section: str) -> Path:
    """Return where a section's comparison is committed: paper_data/compared/<table>.csv."""
    return paths.PAPER_DATA / "compared" / table_path(section).name


def write(section: str) -> pd.DataFrame:
    """Write `compare` of all profiles in the tables, with a column `profile`, to `path`; return the table."""
    compared = {profile: compare(section, profile) for profile in PROFILES}
    table = pd.concat(compared, names=["profile"]).reset_index("profile")
    if not len(table):
        path(section).unlink(missing_ok=True)
        return table
    path(section).parent.mkdir(exist_ok=True)
    with paths.replacing(path(section)) as temporary:
        table.to_csv(temporary, index=False, lineterminator="\n", float_format="%.6g")
    return table
