"""What a figure shows, and from which runs, seeds, days and commits: read off the rows that it is drawn from."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pandas as pd
from IPython.display import Markdown, display

from lib import paths
from lib.experiments import summaries, tables
from lib.figures import from_scratch, style


class Source(NamedTuple):
    """What a figure of `from_scratch.FIGURES` shows, how its rows are read, which of them, and what the paper's points
    are.

    rows(profile, **options): the finished runs behind the points, given the figure's options. only: the values that
    columns must have; an option of the figure replaces them.
    own: `only` for the rows of a non-publishing profile (quick), drawn over the published ones; None for no overlay.
    """

    shows: str
    rows: Callable[..., pd.DataFrame]
    only: dict[str, Any] = {}
    own: dict[str, Any] | None = {}
    published: str = ""


_IN_WEIGHT, _IN_TOOL = {"mode": "in-weight"}, {"mode": "in-tool"}
_TEN_SEEDS = "10 seeds, measured at the end of training"
_ONE_SEED = "one seed, the best of about 100 evaluations"
_SMALLEST = "Parameters of the smallest model that recalls enough facts"


def _bounds(profile: str, tokenizer: str = "bytes", threshold: float = 0.95, **_) -> pd.DataFrame:
    return summaries.behind(summaries.bounds_rows(profile, tokenizer), threshold)


def _sizes(profile: str, tokenizer: str = "bytes", **_) -> pd.DataFrame:
    return tables.sizes_shown(summaries.bounds_rows(profile, tokenizer))


def _stored(profile: str, **_) -> pd.DataFrame:
    return tables.sizes_shown(tables.read_rows("05_1", profile))


def _unseen(profile: str, **_) -> pd.DataFrame:
    return summaries.generalization_rows(profile)


def _correlated(profile: str, threshold: float = 0.95, **_) -> pd.DataFrame:
    return summaries.behind(tables.read_rows("05_3", profile), threshold)


SOURCES = {
    "parameter_bounds": Source(_SMALLEST, _bounds, published=_TEN_SEEDS),
    "recall_vs_parameters": Source("Recall at the end of training", _sizes, published=_TEN_SEEDS),
    "bits_stored": Source(
        "Entropy of the answers minus the model's negative log-likelihood of them",
        _stored,
        _IN_WEIGHT,
        own=None,
    ),
    "lower_bound": Source(_SMALLEST, _bounds, _IN_WEIGHT, own=None, published=_TEN_SEEDS),
    "generalization": Source("Recall of people nobody was trained on", _unseen, published=_ONE_SEED),
    "tool_calls": Source(
        "First requests about people, trained on or not",
        _unseen,
        {**_IN_TOOL, "d_model": from_scratch.TOOL_CALLS_D_MODEL},
        own=_IN_TOOL,
    ),
    "compressibility": Source(_SMALLEST, _correlated, _IN_WEIGHT, published=_ONE_SEED),
}


def show(name: str, profile: str, save: bool = True, **options) -> None:
    """Draw a figure as `from_scratch.draw` does, `save` it for its profile, and show it in a notebook above its
    caption."""
    figure = from_scratch.draw(name, profile, **options)
    if save:
        style.save(figure, name, profile)
    display(figure, Markdown(f"*{caption(name, profile, **options)}*"))


def caption(name: str, profile: str, **options) -> str:
    """What `from_scratch.draw` draws with the same arguments, and from what."""
    source = SOURCES[name]
    counting = {column: options.get(column, value) for column, value in source.only.items()}
    of_counting = {name: value for name, value in options.items() if name != "tokenizer"}
    parts = [_chosen(source.rows(tables.publishing_profile(profile), **of_counting), counting)]
    if source.own is not None and profile not in paths.PUBLISHING:
        parts.append(_chosen(source.rows(profile, **options), source.own))
    rows = pd.concat([part for part in parts if len(part)] or parts, ignore_index=True)
    theirs = f"Published: Houliston et al. (2025), {source.published}. " if source.published else ""
    return f"{source.shows}. {theirs}{provenance(rows)}"


def _chosen(rows: pd.DataFrame, only: dict[str, Any]) -> pd.DataFrame:
    for column in only if len(rows) else ():
        rows = rows[rows[column] == only[column]]
    return rows


def provenance(rows: pd.DataFrame) -> str:
    """How many runs, which seeds, when and by which commits: a sentence for each profile, and for its earlier recipes.

    rows: of finished runs, with the columns profile, run_id, seed, finished_at (ISO 8601) and commit.
    """
    if not len(rows):
        return "This repository: no runs yet."
    earlier = tables.described(rows).superseded.map({True: ", earlier recipe", False: ""})
    return " ".join(_sentence(who, runs) for who, runs in rows.groupby(rows.profile + earlier, sort=False))


def bounds_in_words(profile: str, threshold: float = 0.95) -> list[str]:
    """Sentences about our points of `parameter_bounds`: where both modes have one last, and where ours end."""
    counting = tables.publishing_profile(profile)
    table = summaries.bounds(counting).query("recall_threshold == @threshold")
    found = table.dropna(subset="min_params_mean").set_index(["n_facts", "mode"])
    both = found.min_params_mean.unstack().reindex(columns=["in-weight", "in-tool"]).dropna()
    sentences = []
    if len(both):
        n_facts, last = both.index[-1], both.iloc[-1]
        points = found.loc[n_facts]
        earlier = ", of an earlier recipe" if points.superseded.astype(bool).any() else ""
        seeds = _listed("seed", range(points.seeds_reaching_it.min()), True)
        sentences.append(
            f"At {n_facts:,} facts it takes {last['in-weight']:,.0f} parameters in weights and {last['in-tool']:,.0f} "
            f"with a tool (means over {seeds} or more{earlier})."
        )
    rows = summaries.behind(summaries.bounds_rows(counting), threshold)
    for mode, points in table[table.min_params_mean.isna()].groupby("mode"):
        runs = rows[(rows["mode"] == mode) & (rows.n_facts == points.n_facts.min())]
        tried = runs.n_params.max()
        if (runs.recall >= threshold).any():  # some size is enough, and no smaller one was tried
            continue
        sentences.append(
            f"At {points.n_facts.min():,} facts no smallest {mode} model is known yet "
            f"(largest tried: {tried:,} parameters)."
        )
    return sentences


def say(sentence: str) -> None:
    """Show a sentence, Markdown with computed numbers in it, as prose in a notebook."""
    display(Markdown(sentence))


def _sentence(profile: str, runs: pd.DataFrame) -> str:
    days = " to ".join(dict.fromkeys([runs.finished_at.min()[:10], runs.finished_at.max()[:10]]))
    seeds = _listed("seed", sorted(runs.seed.unique()))
    commits = _listed("commit", [commit[:7] + commit[40:] for commit in runs["commit"].unique()])
    return f"This repository ({profile}): {_listed('run', runs.run_id.unique(), True)}, {seeds}, {days}, {commits}."


def _listed(what: str, values, count: bool = False) -> str:
    """ "seeds 0, 1", or "2 seeds" to `count` them."""
    what += "s" * (len(values) > 1)
    return f"{len(values):,} {what}" if count else f"{what} {', '.join(map(str, values))}"
