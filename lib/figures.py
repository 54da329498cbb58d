"""Figures of the paper: one style, one `save`, one function per figure, table in and figure out."""

from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from lib import paths, results
from lib.base import InputError

#: Color-blind safe (Okabe and Ito) and apart in grey; a marker each, so that color is never the only difference.
STYLES = {
    "in-weight": {"color": "#D55E00", "marker": "o"},
    "in-tool": {"color": "#0072B2", "marker": "s"},
}

_RC = {
    "figure.figsize": (5.2, 3.6),
    "figure.constrained_layout.use": True,
    "figure.dpi": 110,
    "font.size": 9,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.markersize": 5,
    "pdf.fonttype": 42,  # text stays text
    "savefig.dpi": 200,
}


def save(figure: Figure, name: str, profile: str) -> list[Path]:
    """Write NAME.pdf and NAME.png where the profile's figures go; the same figure gives the same bytes."""
    folder = paths.figures(profile)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for suffix, metadata in ((".pdf", {"CreationDate": None}), (".png", {"Software": None})):
        path = folder / f"{name}{suffix}"
        # The context once more: resolution and fonts are asked for only now.
        with paths.replacing(path) as temporary, matplotlib.rc_context(_RC):
            figure.savefig(temporary, format=suffix[1:], metadata=metadata)
        written.append(path)
    return written


def draw(name: str, profile: str = "laptop", **options) -> Figure:
    """One of `FIGURES` from paper_data; profiles that do not publish add their own rows. Write it with `save`.

    options: of the figure, `threshold` for parameter_bounds say.
    """
    if name not in FIGURES:
        raise InputError(f"there is no figure {name!r}: there are {', '.join(FIGURES)}")
    figure = FIGURES[name](profile, **options)
    plt.close(figure)  # or a notebook shows it twice: as the cell's value and as an open figure
    return figure


def parameter_bounds(
    published: pd.DataFrame, laptop: pd.DataFrame, quick: pd.DataFrame | None = None, threshold: float = 0.95
) -> Figure:
    """Parameters needed to reach a recall `threshold` against the number of facts (Section 5.1, main figure).

    Tables as `results.minimal_parameters` gives them. Published points lie behind as lines with a band of one standard
    deviation, ours in front with bars from the smallest to the largest seed; `quick` points are hollow.
    """
    with matplotlib.rc_context(_RC):
        figure, axes = plt.subplots()
        for mode, style in STYLES.items():
            theirs = _at(published, mode, threshold)
            mean, std = theirs.min_params_mean, theirs.min_params_std
            axes.plot(theirs.n_facts, mean, color=style["color"], alpha=0.45, linewidth=1.4, label=f"{mode}, published")
            axes.fill_between(theirs.n_facts, mean - std, mean + std, color=style["color"], alpha=0.15, linewidth=0)
            _points(axes, _at(laptop, mode, threshold), style, f"{mode}, this repository")
            if quick is not None:
                _points(axes, _at(quick, mode, threshold), style, f"{mode}, just trained (quick)", hollow=True)
        axes.set(
            xscale="log",
            yscale="log",
            xlabel="facts",
            ylabel=f"parameters needed for {threshold:.0%} recall",
        )
        axes.set_xscale("log", base=2)
        axes.legend(fontsize=7.5)
    return figure


def _at(table: pd.DataFrame, mode: str, threshold: float) -> pd.DataFrame:
    if not len(table):
        return table
    chosen = (table["mode"] == mode) & (table.recall_threshold == threshold) & table.min_params_mean.notna()
    return table[chosen].sort_values("n_facts")


def _points(axes, table: pd.DataFrame, style: dict, label: str, hollow: bool = False) -> None:
    if not len(table):
        return
    mean = table.min_params_mean
    bars = [mean - table.min_params_min, table.min_params_max - mean]
    face = {"markerfacecolor": "white", "zorder": 4, "markersize": 7} if hollow else {"zorder": 3}
    axes.errorbar(table.n_facts, mean, yerr=bars, linestyle="none", capsize=2, label=label, **style, **face)


def recall_against_parameters(
    laptop: pd.DataFrame, quick: pd.DataFrame | None = None, published: pd.DataFrame | None = None
) -> Figure:
    """Recall at the end of training against model size, a line per number of facts (Section 5.1).

    laptop, quick: rows of finished runs; those of `quick` are dashed, with hollow points. published:
    paper_data/published/recall_vs_parameters_in_weight, drawn behind.
    """
    with matplotlib.rc_context({**_RC, "figure.figsize": (8.6, 3.4)}):
        figure, panels = plt.subplots(1, 2, sharey=True, sharex=True)
        for axes, mode in zip(panels, STYLES, strict=True):
            _recall_lines(axes, laptop, mode, "{:,}")
            _recall_lines(axes, quick, mode, "{:,} (quick)", linestyle="--", markerfacecolor="white")
            if mode == "in-weight" and published is not None:
                for n_facts, curve in published.groupby("n_facts"):
                    axes.plot(curve.min_params_mean, curve.recall, color="#999999", linewidth=1, zorder=1)
                    middle = curve.iloc[(curve.recall - 0.6).abs().argmin()]
                    spot = {"color": "#777777", "fontsize": 7, "rotation": 80, "ha": "right", "va": "center"}
                    axes.annotate(f"{n_facts:,}", (middle.min_params_mean, middle.recall), **spot)
            axes.set(xscale="log", xlabel="parameters", title=mode, ylim=(-0.03, 1.06))
            if not axes.get_lines():
                axes.text(0.5, 0.5, f"no {mode} runs yet", transform=axes.transAxes, ha="center", color="#777777")
            if axes.get_legend_handles_labels()[0]:
                axes.legend(title="facts", fontsize=7, title_fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
        panels[0].set_ylabel("recall at the end of training")
    return figure


def _recall_lines(axes, rows: pd.DataFrame | None, mode: str, label: str, **style) -> None:
    if rows is None or not len(rows):
        return
    ended = (rows["mode"] == mode) & (rows.stopped != "hopeless")  # what was given up has no recall at the end
    lines = list(rows[ended].groupby("n_facts"))
    for shade, (n_facts, runs) in zip(np.linspace(0, 0.85, len(lines)), lines, strict=True):
        recall = runs.groupby("n_params").recall.agg(["mean", "min", "max"])
        bars = [recall["mean"] - recall["min"], recall["max"] - recall["mean"]]
        line = {"color": plt.get_cmap("viridis")(shade), "marker": "o", "markersize": 3.5, "capsize": 2}
        axes.errorbar(recall.index, recall["mean"], yerr=bars, label=label.format(n_facts), **line, **style)


def performance(training: pd.DataFrame, curve: pd.DataFrame, growth: pd.DataFrame) -> Figure:
    """What speed was measured: throughput and share of the matrix-product peak against size, time to recall, growth.

    Tables as `lib.benchmarks` gives them: training (those of `training_throughput`, concatenated), curve
    (`learning_curve`), growth (`growth`). Bars go from the slowest to the fastest round.
    """
    with matplotlib.rc_context({**_RC, "figure.figsize": (8.6, 6.2)}):
        figure, ((speed, share), (recall, cost)) = plt.subplots(2, 2)
        for (mode, contender), rows in training[training.dtype == "float32"].groupby(["mode", "contender"]):
            style = {**STYLES[mode], **_CONTENDERS[contender]}
            bars = [rows.per_second - rows.least, rows.most - rows.per_second]
            speed.errorbar(rows.d_model, rows.per_second, yerr=bars, capsize=2, label=f"{mode}, {contender}", **style)
            share.plot(rows.d_model, rows.share_of_peak, **style)
        speed.set(xscale="log", yscale="log", xlabel="d_model", ylabel="dialogs trained a second", title="throughput")
        share.set(
            xscale="log", xlabel="d_model", ylabel="share of the peak", title="arithmetic, of matrix products' peak"
        )
        share.set_ylim(bottom=0)
        for axes in (speed, share):
            axes.set_xticks(sorted(training.d_model.unique()), sorted(training.d_model.unique()))
            axes.minorticks_off()
        speed.legend(fontsize=6.5)
        recall.plot(curve.seconds, curve.recall, color=STYLES["in-weight"]["color"])
        recall.axhline(0.95, color="#999999", linewidth=0.8, linestyle="--")
        recall.set(xlabel="seconds of training", ylabel="recall", ylim=(-0.03, 1.06), title="time to recall, in-weight")
        bars = growth.microseconds - 1e6 / growth.most, 1e6 / growth.least - growth.microseconds
        cost.errorbar(growth.n_facts, growth.microseconds, yerr=bars, capsize=2, **STYLES["in-weight"])
        cost.set(
            xscale="log", xlabel="facts", ylabel="microseconds a dialog", title="a step does not grow with the facts"
        )
        cost.set_ylim(0, 1.3 * (1e6 / growth.least).max())
    return figure


_CONTENDERS = {
    "ours": {"linestyle": "--", "alpha": 0.7},
    "ours, compiled": {"linestyle": "-"},
    "Hugging Face": {"linestyle": ":", "markerfacecolor": "white"},
}


def _own_rows(profile: str) -> pd.DataFrame | None:
    """The rows of a profile that does not count, for points that show what was just trained."""
    return None if profile in paths.PUBLISHING else results.bounds_rows(profile)


def _draw_parameter_bounds(profile: str, threshold: float = 0.95) -> Figure:
    if threshold not in results.THRESHOLDS:
        known = ", ".join(map(str, results.THRESHOLDS))
        raise InputError(f"threshold = {threshold}: the published thresholds are {known}")
    own = _own_rows(profile)
    return parameter_bounds(
        results.published_by_paper("parameter_bounds"),
        results.counting_bounds(profile),
        None if own is None else results.minimal_parameters(own),
        threshold,
    )


def _draw_recall_against_parameters(profile: str) -> Figure:
    published = results.published_by_paper("recall_vs_parameters_in_weight")
    rows = results.bounds_rows(results.counting_profile(profile))
    return recall_against_parameters(rows, _own_rows(profile), published)


#: Every figure of the paper that this repository draws, by the name of its files.
FIGURES = {
    "parameter_bounds": _draw_parameter_bounds,
    "recall_vs_parameters": _draw_recall_against_parameters,
}
