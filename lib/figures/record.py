"""The registry of the figures of Section 5: drawn from paper_data, with a caption read off the same rows."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import pandas as pd
from IPython.display import Markdown, display
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from lib import paths
from lib.base import check_known
from lib.experiments import summaries, tables
from lib.experiments.published import published_by_paper, published_correlated
from lib.figures import generalization, parameter_bounds, style


class Record(NamedTuple):
    """All about one figure. To add one, write a function in the file of its section and an entry of `FIGURES`."""

    shows: str  # the first sentence of its caption
    draw: Callable[..., Figure]  # takes `points`, `published` if there are any, and options
    rows: Callable[..., pd.DataFrame]  # of a profile: the finished runs behind it
    points: Callable[[pd.DataFrame], pd.DataFrame] = lambda rows: rows  # of these: the table that is drawn
    published: Callable[[], pd.DataFrame] | None = None  # the paper's points
    about_published: str = ""  # over which seeds, and when, the paper's points were measured
    options: tuple[str, ...] = ()  # among threshold, tokenizer (for own rows)
    mode: str | None = None  # if only runs of one mode are drawn
    has_own: bool = True  # whether a profile that does not publish (quick) adds its own rows


_SMALLEST = "Parameters of the smallest model that recalls enough facts"
_TEN_SEEDS = "10 seeds, measured at the end of training"
_ONE_SEED = "one seed, the best of about 100 evaluations"

#: Every figure that is drawn from the tables of Section 5, by the name of its files.
FIGURES = {
    "parameter_bounds": Record(
        shows=_SMALLEST,
        draw=parameter_bounds.parameter_bounds,
        rows=summaries.bounds_rows,
        points=summaries.seeds_of_bounds,
        published=partial(published_by_paper, "parameter_bounds"),
        about_published=_TEN_SEEDS,
        options=("threshold", "tokenizer"),
    ),
    "recall_vs_parameters": Record(
        shows="Recall at the end of training",
        draw=parameter_bounds.recall_against_parameters,
        rows=lambda *of: tables.sizes_shown(summaries.bounds_rows(*of)),
        published=partial(published_by_paper, "recall_vs_parameters_in_weight"),
        about_published=_TEN_SEEDS,
        options=("tokenizer",),
    ),
    "bits_stored": Record(
        shows="Entropy of the answers minus the model's negative log-likelihood of them",
        draw=parameter_bounds.bits_stored,
        rows=lambda profile: tables.sizes_shown(tables.read_rows("05_1", profile)),
        points=summaries.capacity,
        mode="in-weight",
        has_own=False,
    ),
    "patience": Record(
        shows="Recall and stored bits after more and more passes over the facts",
        draw=parameter_bounds.patience,
        rows=partial(summaries.rows_with_shared, "05_1_patience"),
        points=summaries.capacity,
        mode="in-weight",
    ),
    "generalization": Record(
        shows="Recall of unseen people",
        draw=generalization.generalization,
        rows=summaries.generalization_rows,
        points=summaries.unseen_shares,
        published=partial(published_by_paper, "generalization"),
        about_published=_ONE_SEED,
    ),
    "compressibility": Record(
        shows=_SMALLEST,
        draw=parameter_bounds.compressibility,
        rows=partial(tables.read_rows, "05_3"),
        points=summaries.compressibility_bounds,
        published=published_correlated,
        about_published=_ONE_SEED,
        options=("threshold",),
        mode="in-weight",
    ),
}


def draw(name: str, profile: str = "laptop", **options) -> Figure:
    """Draw a figure of `FIGURES` from paper_data; profiles that do not publish add their own rows.

    options: those of its record, `threshold` for parameter_bounds say. Raises InputError for an unknown figure, one
    that does not have these options, or a threshold that the paper does not use.
    """
    record = _record(name, options)
    points = tables.stacked(*(record.points(rows).assign(own=own) for own, rows in _rows(record, profile, options)))
    published = {"published": record.published()} if record.published else {}
    return record.draw(points, **published, **{key: value for key, value in options.items() if key != "tokenizer"})


def _record(name: str, options: dict) -> Record:
    check_known("figure", name, FIGURES)
    for option in options:
        check_known("option", option, FIGURES[name].options, f" of the figure {name}")
    if "threshold" in options:
        tables.check_threshold(options["threshold"])
    return FIGURES[name]


def _rows(record: Record, profile: str, options: dict) -> Iterator[tuple[bool, pd.DataFrame]]:
    """Yield whether rows are a non-publishing profile's own, and the rows: those of the publishing profile first."""
    yield False, record.rows(tables.publishing_profile(profile))
    if record.has_own and profile not in paths.PUBLISHING:
        yield True, record.rows(profile, *(options[key] for key in options if key == "tokenizer"))


def show(name: str, profile: str, save: bool = True, **options) -> None:
    """Draw a figure as `draw` does, `save` it for its profile, and show it in a notebook above its caption."""
    figure = draw(name, profile, **options)
    if save:
        style.save(figure, name, profile)
    display(figure, Markdown(f"*{caption(name, profile, **options)}*"))
    plt.close(figure)  # or the notebook shows it a second time, as an open figure


def caption(name: str, profile: str, **options) -> str:
    """Return the caption for `draw` with the same arguments: what is shown, published points, and our runs."""
    record = _record(name, options)
    parts = [rows.assign(own=own) for own, rows in _rows(record, profile, options)]
    if "threshold" in record.options:
        parts = [summaries.behind(part, options.get("threshold", 0.95)) for part in parts]
    rows = tables.stacked(*parts)
    if len(rows) and record.mode:
        rows = rows.query("mode == @record.mode")
    theirs = f"Published: Houliston et al. (2025), {record.about_published}. " if record.published else ""
    return f"{record.shows}. {theirs}{provenance(rows)}"


def provenance(rows: pd.DataFrame) -> str:
    """Return how many runs, which seeds, when and by which commits: a sentence per profile, and per earlier recipe.

    rows: of finished runs, with the columns profile, run_id, seed, finished_at (ISO 8601) and commit.
    """
    if not len(rows):
        return "This repository: no runs yet."
    earlier = tables.described(rows).superseded.map({True: ", earlier recipe", False: ""})
    sentences = []
    for who, runs in rows.groupby(rows.profile + earlier, sort=False):
        n_runs = runs.run_id.nunique()
        days = " to ".join(dict.fromkeys([runs.finished_at.min()[:10], runs.finished_at.max()[:10]]))
        commits = [commit[:7] + commit[40:] for commit in runs["commit"].unique()]  # 40 digits, then perhaps -dirty
        seeds = sorted(runs.seed.unique())
        sentences.append(
            f"This repository ({who}): {n_runs:,} run{'s' * (n_runs > 1)}, seed{'s' * (len(seeds) > 1)} "
            f"{', '.join(map(str, seeds))}, {days}, commit{'s' * (len(commits) > 1)} {', '.join(commits)}."
        )
    return " ".join(sentences)


def say(sentence: str) -> None:
    """Show a sentence, Markdown with computed numbers in it, as prose in a notebook."""
    display(Markdown(sentence))


def spread(values: pd.Series) -> str:
    """Return the mean of values and, in brackets, their range: "0.25 (0.21 to 0.28)"."""
    return f"{values.mean():.2f} ({values.min():.2f} to {values.max():.2f})"
