"""Figures of Section 7.1 (our own): what it takes to change, delete and contest facts."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from lib.facts.sampling import UNSEEN
from lib.figures.generalization import KINDS
from lib.figures.style import HOLLOW, STYLES, draw_means, panels, shades, shared_legend

_AMONG = STYLES["in-weight"] | {"marker": "^", "linestyle": "--"}
#: How facts are changed, as a legend says it.
METHODS = {
    "write to the database": ("in tool: write to the database", STYLES["in-tool"]),
    "train on them": ("in weights: train on them", STYLES["in-weight"]),
    "train among the others": ("in weights: train among the others", _AMONG),
}

#: How facts are deleted, in a few words.
DELETED = {
    "nothing": "before",
    "gradient ascent": "gradient ascent",
    "gradient ascent among the others": "gradient ascent\namong the others",
    "train without them": "trained again\nwithout them",
    "delete from the database": "deleted",
}
#: Whom contested answers are about, with their titles; then what the database says. Both in the order of drawing.
WHO = {
    "trained": "trained people",
    "unseen": "unseen people",
    "by heart, hybrid": "hybrid model:\npeople learned by heart",
    "looked up, hybrid": "hybrid model:\nall other people",
}
RESULTS = ["the fact", "another value", "an unknown word", "two values", "nothing", "an order"]


def edits(rows: pd.DataFrame) -> Figure:
    """Draw what changing facts takes and breaks, and what is still known of deleted ones.

    rows: as `lib.experiments.edits.rows` gives them, one number of facts per mode. Drawn are means over seeds, with
    bars from the smallest to the largest; hollow: training was cut off in some seed. Models that were not trained to
    repeat a value cannot answer: they appear in the panel of deleted facts alone.
    """
    with panels((12.4, 4), 1, 4, width_ratios=(1, 1, 1, 1.2)) as (figure, (cost, harm, success, memory)):
        changed, hollow = rows.query("experiment == 'change' and repeats"), {"linestyle": "none", **HOLLOW}
        for method, (label, look) in METHODS.items():
            points = changed[changed.method == method]
            for axes, column in ((cost, "seconds"), (harm, "recall_others"), (success, "recall_edited")):
                draw_means(axes, points, "n_edited", label, of=column, **look)
                cut = points[points.n_edited.isin(points.n_edited[points.done.eq(False)])]
                if len(cut):
                    axes.plot(cut.groupby("n_edited")[column].mean(), **{**look, **hollow})
        cost.set(xlabel="facts changed", ylabel="seconds for the edit", xscale="log", yscale="log")
        for axes, which in ((harm, "all other"), (success, "the changed")):
            axes.set(xlabel="facts changed", ylabel=f"recall of {which} facts", xscale="log", ylim=(-0.04, 1.06))
        shared_legend(figure, [cost], loc="outside lower left")
        _memories(memory, rows[rows.experiment == "delete"])
    return figure


def _memories(axes, deleted: pd.DataFrame) -> None:
    """Draw, for each way to delete, the share of facts still known without the tool, beside those never seen."""
    if not len(deleted):
        return
    deleted = deleted.sort_values("method", key=lambda methods: methods.map([*DELETED].index), kind="stable")
    ways = deleted.groupby(["mode", "repeats", "method", "asked"], sort=False)
    deleted, guess = deleted.assign(y=ways.ngroup()), ways.guess.mean()
    for mode, points in deleted.groupby("mode", sort=False):
        known = {**STYLES[mode], "linestyle": "none", "label": None if axes.lines else "deleted"}
        never = {**known, "markerfacecolor": "white", "color": "#777777", "label": None if axes.lines else "never seen"}
        axes.plot(points.memory, points.y, **known)
        axes.plot(points.never_memory, points.y + 0.25, **never)
    y = np.arange(len(guess))
    axes.vlines(guess, y - 0.3, y + 0.45, color="#555555", linestyle=":", label="a guess")
    names = []
    for mode, repeats, method, asked in guess.index:
        about = f",\nasked {asked}" if mode == "in-tool" else ""
        untrained = "" if repeats else ", value not trained"
        names.append(f"{mode}{untrained}: {DELETED[method]}{about}")
    axes.set(yticks=y, yticklabels=names, xlabel="share of facts still known", xlim=(-0.04, 1.04))
    axes.invert_yaxis()
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3)


def contested(rows: pd.DataFrame) -> Figure:
    """Draw whom an in-tool model believes: shares of answers that follow the database, or state the fact anyway."""
    rows = rows.query("experiment == 'contest' and repeats").reindex(columns=["who", "method", "follows", "remembers"])
    groups = [(who, rows[rows.who == who]) for who in WHO if (rows.who == who).any()] or [("trained", rows)]
    with panels((10, 2.8), 1, len(groups), sharey=True, squeeze=False) as (figure, row):
        for axes, (who, told) in zip(row[0], groups, strict=True):
            kinds = [kind for kind in RESULTS if (told.method == kind).any()]
            for shift, (column, label, mode) in enumerate(
                (("follows", "states the result", "in-tool"), ("remembers", "states the fact", "in-weight"))
            ):
                places = pd.Series(0.3 * shift + np.arange(len(kinds)), kinds)
                means = told.groupby("method")[column].mean().reindex(kinds)
                axes.barh(places, means, height=0.28, color=STYLES[mode]["color"], label=label)
                for kind, seeds in told.groupby("method")[column]:
                    axes.plot(seeds, [places[kind]] * len(seeds), ".", color="black", markersize=3, label="one seed")
            axes.set(xlim=(0, 1.02), xlabel="share of answers", yticks=range(len(kinds)), yticklabels=kinds)
            axes.set_title(WHO[who], fontsize=9)
        axes.invert_yaxis()
        figure.axes[0].set_ylabel("what the database says")
        shared_legend(figure, [axes], loc="outside lower center")
    return figure


def forgiving(rows: pd.DataFrame) -> Figure:
    """Draw recall and wrong answers against the letters that the tool forgives: a panel per kind, a line per seed."""
    rows = rows.query("experiment == 'forgive' and repeats")
    rows = rows.assign(letters=rows.method.str.extract(r"(\d)", expand=False).astype(float))
    counts = sorted(rows.n_facts.unique())
    with panels((9.6, 2.9), 1, len(UNSEEN), sharey=True) as (figure, row):
        for axes, kind in zip(row, UNSEEN, strict=True):
            for n_facts, color in zip(counts, shades(len(counts)), strict=True):
                about = f"answers,\n{n_facts:,} training facts"
                for _, points in rows.query("who == @kind and n_facts == @n_facts").groupby("seed"):
                    look = {"color": color, "markersize": 4}
                    axes.plot(points.letters, points.recall, "o-", label=f"right {about}", **look)
                    axes.plot(points.letters, points.wrong, "x:", label=f"wrong {about}", **look)
            axes.set(title=KINDS[kind], xlabel="letters forgiven", ylim=(-0.04, 1.06), xticks=range(4))
        row[0].set_ylabel("share of questions")
        shared_legend(figure, row, loc="outside right center")
    return figure
