"""The figure of Section 5.2: recall of unseen people."""

from collections.abc import Iterator

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from lib.experiments import summaries
from lib.experiments.published import PUBLISHED_KIND
from lib.facts.people import FactsConfig, best_constant_guess
from lib.facts.sampling import unseen_people
from lib.figures.style import STYLES, panels, published_label, shared_legend, side_by_side, told_apart

#: What is new in the names of unseen people, as a legend says it.
KINDS = {
    "trained": "trained people",
    "new_pair": "seen names, new pair",
    "new_first": "new first name",
    "new_last": "new last name",
    "new_both": "both names new",
}


def generalization(shares: pd.DataFrame, published: pd.DataFrame) -> Figure:
    """Draw recall of unseen people against the number of training facts, a panel per kind of name (Section 5.2).

    shares: as `summaries.unseen_shares` gives them; one point per seed, side by side. The last panel has the
    shares of `summaries.seeds_that_generalize`, with 95% intervals. published: the paper's points, grey, in
    the panel of people of `PUBLISHED_KIND`. Dotted: the recall of the best constant answers.
    """
    kinds = list(KINDS)[1:]
    guess = best_constant_guess(unseen_people(FactsConfig(), 1000)[PUBLISHED_KIND])
    with panels((11, 3.1), 1, len(kinds) + 1, sharey=True, sharex=True) as (figure, row):
        for axes, kind in zip(row, kinds, strict=False):
            if kind == PUBLISHED_KIND:
                grey = {"color": "#888888", "linewidth": 0.8}
                for (mode, n_params), points in published.groupby(["mode", "n_params"]):
                    line = "-" if mode == "in-tool" else "--"
                    axes.plot(points.n_facts, points.ood_recall, linestyle=line, zorder=1, **grey)
                    if mode == "in-tool" and points.ood_recall.max() < 0.5:  # the size that never copies
                        end = points.loc[points.n_facts.idxmax(), ["n_facts", "ood_recall"]]
                        axes.annotate(f"{n_params:,}", end, fontsize=6, color="#555555", ha="right", va="top")
                label = published_label(published.n_facts, KINDS[kind]).replace(", ", ",\n")
                axes.plot([], [], label=label, **grey)
            for points, label, look in _by_size(shares.query("kind == @kind and measure == 'recall'")):
                axes.plot(side_by_side(points), points.share, label=label, **look | {"linestyle": "none"})
            axes.axhline(guess, color="#555555", linewidth=0.9, linestyle=":", label="best constant guess")
            axes.set_title(KINDS[kind], fontsize=9)
        found = summaries.seeds_that_generalize(shares.query("mode == 'in-tool'"))
        for points, _, look in _by_size(found):
            bars = [points.share - points.low, points.high - points.share]
            row[-1].errorbar(points.n_facts, points.share, yerr=bars, **look)
        row[-1].set_title("seeds that generalize", fontsize=9)
        row[-1].set_ylim(-0.04, 1.06)
        row[-1].set_xscale("log", base=2)
        row[0].set_ylabel("recall, or share of seeds")
        for axes in row:
            axes.set_xlabel("training facts")
        shared_legend(figure, row, loc="outside right center", title="parameters")
    return figure


def _by_size(table: pd.DataFrame) -> Iterator[tuple[pd.DataFrame, str, dict]]:
    """Yield the points of each size, their label and look: each mode in its color, larger models darker."""
    for mode, style in STYLES.items():
        groups = list(table.query("mode == @mode").groupby("n_params"))
        for strength, (n_params, rows) in zip(np.linspace(1, 0.35, len(groups))[::-1], groups, strict=True):
            look = {**style, "alpha": strength, "linestyle": "-" if mode == "in-tool" else "--"}
            yield from told_apart(rows, f"{n_params:,}, {mode}", look)
