"""Figures of the paper: one style, one `save`, one function per figure, table in and figure out."""

import sys
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from lib import paths, results
from lib.base import InputError
from lib.comparison import published_by_paper
from lib.facts import VALUES, FactsConfig, unseen_people
from lib.generalization import best_constant_guess
from lib.probes import MOMENTS
from lib.theory.bounds import MEASURED_BITS, bits_at_recall, parameters_needed
from lib.theory.circuit import Circuit

#: Color-blind safe (Okabe and Ito) and apart in grey; a marker each, so that color is never the only difference.
STYLES = {
    "in-weight": {"color": "#D55E00", "marker": "o"},
    "in-tool": {"color": "#0072B2", "marker": "s"},
}

#: How points of a profile that does not publish are told from those that count.
HOLLOW = {"markerfacecolor": "white", "markersize": 7, "zorder": 4}

_BY_HAND = {"color": "#009E73", "linestyle": "-.", "linewidth": 1.4, "label": "constructed by hand (Section 4)"}

RC = {
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


def alt_text(figure: Figure) -> str:
    """What a figure shows, for who cannot see it: its label (`figure.set_label`) or else what its axes say.

    For each panel its title and what is drawn against what, then the legends.
    """
    if figure.get_label():
        return figure.get_label()
    panels, shown, y = [], [], ""
    for axes in figure.axes:
        y = axes.get_ylabel() or y  # panels that share an axis name it once
        drawn = " against ".join(filter(None, (y, axes.get_xlabel())))
        panels.append(": ".join(filter(None, (axes.get_title(), drawn))))
    for legend in filter(None, [*figure.legends, *(axes.get_legend() for axes in figure.axes)]):
        labels = "; ".join(text.get_text() for text in legend.get_texts())
        shown.append(": ".join(filter(None, (legend.get_title().get_text(), labels))))
    told = [figure.get_suptitle(), "; ".join(filter(None, panels)), *dict.fromkeys(f"Shown: {one}" for one in shown)]
    return " ".join(f"Figure: {'. '.join(filter(None, told))}.".split())


def _describe_in_notebooks() -> None:
    """From now on a notebook's outputs hold the alternative text of every figure, as metadata of the picture."""
    if ipython := sys.modules.get("IPython"):
        if shell := ipython.get_ipython():
            describe = lambda figure, **_: ({}, {"image/png": {"alt": alt_text(figure)}})  # noqa: E731
            shell.display_formatter.mimebundle_formatter.for_type(Figure, describe)


_describe_in_notebooks()


def save(figure: Figure, name: str, profile: str) -> list[Path]:
    """Write NAME.pdf and NAME.png where the profile's figures go; the same figure gives the same bytes."""
    folder = paths.figures(profile)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for suffix, metadata in ((".pdf", {"CreationDate": None}), (".png", {"Software": None})):
        path = folder / f"{name}{suffix}"
        # The context once more: resolution and fonts are asked for only now.
        with paths.replacing(path) as temporary, matplotlib.rc_context(RC):
            figure.savefig(temporary, format=suffix[1:], metadata=metadata)
        written.append(path)
    plt.close(figure)  # or a notebook shows it twice: as the cell's value and as an open figure
    return written


def draw(name: str, profile: str = "laptop", **options) -> Figure:
    """One of `FIGURES` from paper_data; profiles that do not publish add their own rows. Write it with `save`.

    options: of the figure, `threshold` for parameter_bounds say, and `tokenizer` for whose own rows to add.
    """
    if name not in FIGURES:
        raise InputError(f"there is no figure {name!r}: there are {', '.join(FIGURES)}")
    return FIGURES[name](profile, **options)


def parameter_bounds(
    published: pd.DataFrame,
    laptop: pd.DataFrame,
    quick: pd.DataFrame | None = None,
    threshold: float = 0.95,
    by_hand: int | None = None,
) -> Figure:
    """Parameters needed to reach a recall `threshold` against the number of facts (Section 5.1, main figure).

    Tables as `results.minimal_parameters` gives them. Published points lie behind as lines with a band of one standard
    deviation, ours in front with bars from the smallest to the largest seed; `quick` points are hollow. `by_hand`:
    parameters of the model of `lib.theory.circuit`, a line, for it recalls any number of facts.
    """
    with matplotlib.rc_context(RC):
        figure, axes = plt.subplots()
        for mode, style in STYLES.items():
            theirs = _at(published, mode, threshold)
            mean, std = theirs.min_params_mean, theirs.min_params_std
            axes.plot(theirs.n_facts, mean, color=style["color"], alpha=0.45, linewidth=1.4, label=f"{mode}, published")
            axes.fill_between(theirs.n_facts, mean - std, mean + std, color=style["color"], alpha=0.15, linewidth=0)
            _points(axes, _at(laptop, mode, threshold), style, f"{mode}, this repository")
            if quick is not None:
                _points(axes, _at(quick, mode, threshold), style, f"{mode}, just trained (quick)", hollow=True)
        if by_hand:
            axes.axhline(by_hand, **_BY_HAND)
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
    face = HOLLOW if hollow else {"zorder": 3}
    axes.errorbar(table.n_facts, mean, yerr=bars, linestyle="none", capsize=2, label=label, **style, **face)


def lower_bound(
    published: pd.DataFrame, laptop: pd.DataFrame, marks: dict[str, float], by_hand: int, threshold: float = 0.95
) -> Figure:
    """Parameters of the smallest in-weight models against what they have to know, and Section 4's bounds.

    Tables as `results.minimal_parameters` gives them. A line P = bits / b for each of `marks`: b bits a parameter, by
    who measured that. Below one, models that recall a share `threshold` of the facts would hold more. `by_hand`:
    parameters that are enough with a tool.
    """
    bits_per_fact = bits_at_recall(threshold) / len(VALUES)
    with matplotlib.rc_context(RC):
        figure, axes = plt.subplots()
        color = STYLES["in-weight"]["color"]
        theirs, ours = (_at(table, "in-weight", threshold) for table in (published, laptop))
        label = "smallest in-weight models"
        x = theirs.n_facts * bits_per_fact
        axes.plot(x, theirs.min_params_mean, color=color, alpha=0.45, label=f"{label}, published")
        if len(ours):
            shown = ours.assign(n_facts=ours.n_facts * bits_per_fact)
            _points(axes, shown, STYLES["in-weight"], f"{label}, this repository")
        bits = x.min(), x.max()
        for (who, per_parameter), line in zip(marks.items(), cycle(("--", ":")), strict=False):
            bound = [parameters_needed(each, per_parameter) for each in bits]
            axes.plot(bits, bound, color="#555555", linestyle=line, label=f"{per_parameter:g} bits a parameter ({who})")
        axes.axhline(by_hand, **_BY_HAND)
        axes.set(xscale="log", yscale="log", ylabel="parameters")
        axes.set_xlabel(f"bits that recalling {threshold:.0%} of the facts takes")
        axes.legend(fontsize=7)
    return figure


def recall_against_parameters(
    laptop: pd.DataFrame, quick: pd.DataFrame | None = None, published: pd.DataFrame | None = None
) -> Figure:
    """Recall at the end of training against model size, a line per number of facts (Section 5.1).

    laptop, quick: rows of finished runs; those of `quick` are dashed, with hollow points. published:
    paper_data/published/recall_vs_parameters_in_weight, drawn behind.
    """
    with matplotlib.rc_context({**RC, "figure.figsize": (8.6, 3.4)}):
        figure, panels = plt.subplots(1, 2, sharey=True, sharex=True)
        for axes, mode in zip(panels, STYLES, strict=True):
            counts = {n for rows in (laptop, quick) if rows is not None and len(rows) for n in rows.n_facts}
            shades = dict(zip(sorted(counts), np.linspace(0, 0.85, len(counts)), strict=True))
            _recall_lines(axes, laptop, mode, shades, "{:,}")
            _recall_lines(axes, quick, mode, shades, "{:,} (quick)", linestyle="--", markerfacecolor="white")
            if mode == "in-weight" and published is not None:
                for n_facts, curve in published.groupby("n_facts"):
                    axes.plot(curve.min_params_mean, curve.recall, color="#999999", linewidth=1, zorder=1)
                    middle = curve.iloc[(curve.recall - 0.6).abs().argmin()]
                    spot = {"color": "#777777", "fontsize": 7, "rotation": 80, "ha": "right", "va": "center"}
                    axes.annotate(f"{n_facts:,}", (middle.min_params_mean, middle.recall), **spot)
            axes.set(xscale="log", xlabel="parameters", title=mode, ylim=(-0.03, 1.06))
            if not axes.get_lines():
                nothing_yet(axes, mode)
            if axes.get_legend_handles_labels()[0]:
                axes.legend(title="facts", fontsize=7, title_fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
        panels[0].set_ylabel("recall at the end of training")
    return figure


def _recall_lines(axes, rows: pd.DataFrame | None, mode: str, shades: dict[int, float], label: str, **style) -> None:
    if rows is None or not len(rows):
        return
    ended = (rows["mode"] == mode) & (rows.stopped != "hopeless")  # what was given up has no recall at the end
    for n_facts, runs in rows[ended].groupby("n_facts"):
        recall = runs.groupby("n_params").recall.agg(["mean", "min", "max"])
        bars = [recall["mean"] - recall["min"], recall["max"] - recall["mean"]]
        line = {"color": plt.get_cmap("viridis")(shades[n_facts]), "marker": "o", "markersize": 3.5, "capsize": 2}
        axes.errorbar(recall.index, recall["mean"], yerr=bars, label=label.format(n_facts), **line, **style)


def bits_stored(held: pd.DataFrame, bits_per_parameter: tuple[float, ...] = (1, 2)) -> Figure:
    """Bits that in-weight models hold against their parameters (Section 4's bound; not in the paper's Section 5).

    held: as `results.capacity` gives it; runs that were given up are left out. Filled points are overloaded models, of
    recall below 95%.
    """
    held = held[(held.stopped != "hopeless") & held.stored_bits.gt(0)]
    with matplotlib.rc_context({**RC, "figure.figsize": (5.6, 3.8)}):
        figure, axes = plt.subplots()
        groups = list(held.groupby("n_facts"))
        for shade, (n_facts, runs) in zip(np.linspace(0, 0.85, len(groups)), groups, strict=True):
            color = plt.get_cmap("viridis")(shade)
            overloaded = runs.recall < 0.95
            for which, face in ((overloaded, color), (~overloaded, "white")):
                some = runs[which]
                axes.plot(some.n_params, some.stored_bits, "o", color=color, markerfacecolor=face)
            axes.plot([], [], "o", color=color, label=f"{n_facts:,}")
            axes.axhline(runs.entropy_bits.mean(), color=color, linewidth=0.7, linestyle=":")
        axes.set(xscale="log", yscale="log", xlabel="parameters", ylabel="bits stored")
        low, high = axes.get_xlim()
        for bits in bits_per_parameter:
            axes.plot([low, high], [bits * low, bits * high], color="#777777", linewidth=0.9, zorder=1)
            _name_line(axes, bits, (high, bits * high), xytext=(-2, 3), ha="right", va="bottom")
        axes.set_xlim(low, high)
        if groups:
            axes.legend(title="facts", fontsize=7, title_fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
        else:
            nothing_yet(axes, "in-weight")
    return figure


#: What is new in the names of people that nobody was trained on, as a legend says it.
KINDS = {
    "trained": "trained people",
    "new_pair": "seen names, new pair",
    "new_first": "new first name",
    "new_last": "new last name",
    "new_both": "both names new",
}


def generalization(
    shares: pd.DataFrame,
    own: pd.DataFrame | None = None,
    published: pd.DataFrame | None = None,
    guess: float | None = None,
) -> Figure:
    """Recall of people that nobody was trained on against the number of training facts (Section 5.2).

    shares: as `results.unseen_shares` gives them, a line per size, in-tool and, dashed, in-weight; mean over seeds with
    bars from the smallest to the largest. own: the same of the quick profile, hollow. A panel for each kind of name.
    published: the paper's points, of which we do not know the kind: grey, in every panel. guess: of the best constant.
    """
    kinds = list(KINDS)[1:]
    with matplotlib.rc_context({**RC, "figure.figsize": (9.6, 3.1)}):
        figure, panels = plt.subplots(1, len(kinds), sharey=True, sharex=True)
        for axes, kind in zip(panels, kinds, strict=True):
            if published is not None:
                _published_generalization(axes, published)
            _lines_by_size(axes, shares[(shares.kind == kind) & (shares.measure == "recall")], "{:,}, {}")
            if own is not None:
                of_kind = own[(own.kind == kind) & (own.measure == "recall")]
                _lines_by_size(axes, of_kind, "{:,}, {} (quick)", **HOLLOW)
            if guess is not None:
                axes.axhline(guess, color="#555555", linewidth=0.9, linestyle=":", label="best constant guess")
            axes.set(title=KINDS[kind], xlabel="training facts", ylim=(-0.04, 1.06))
            axes.set_xscale("log", base=2)
        panels[0].set_ylabel("recall")
        handles, labels = panels[-1].get_legend_handles_labels()
        if handles:
            figure.legend(handles, labels, fontsize=7, loc="outside right center", title="parameters", title_fontsize=7)
    return figure


def _lines_by_size(axes, table: pd.DataFrame, label: str, **face) -> None:
    """share against n_facts: a line per size, each mode in its color, larger models stronger."""
    for mode, style in STYLES.items():
        groups = list(table[table["mode"] == mode].groupby("n_params"))
        for strength, (n_params, rows) in zip(np.linspace(0.35, 1, len(groups)), groups, strict=True):
            line = "-" if mode == "in-tool" else "--"
            _mean_line(axes, rows, alpha=strength, label=label.format(n_params, mode), linestyle=line, **style, **face)


def _mean_line(axes, rows: pd.DataFrame, **style) -> None:
    """share against n_facts: the mean over seeds, with bars from the smallest to the largest."""
    share = rows.groupby("n_facts").share.agg(["mean", "min", "max"])
    if len(share):
        bars = [share["mean"] - share["min"], share["max"] - share["mean"]]
        axes.errorbar(share.index, share["mean"], yerr=bars, capsize=2, **style)


def _published_generalization(axes, published: pd.DataFrame) -> None:
    for (mode, _), points in published.groupby(["mode", "n_params"]):
        style = {"color": "#888888", "linewidth": 0.8, "linestyle": "-" if mode == "in-tool" else "--", "zorder": 1}
        axes.plot(points.n_facts, points.ood_recall, **style)
    axes.plot([], [], color="#888888", linewidth=0.8, label="published")


#: What is right about requests, as a legend says it.
MEASURES = {
    "well_formed": {"label": "well-formed", "color": "#000000", "marker": "^", "linestyle": ":"},
    "right_attribute": {"label": "right attribute", "color": "#009E73", "marker": "D", "linestyle": "--"},
    "right_name": {"label": "name copied rightly", "color": "#0072B2", "marker": "s", "linestyle": "-"},
}


def tool_calls(shares: pd.DataFrame, d_model: int, own: pd.DataFrame | None = None) -> Figure:
    """What the first requests of in-tool models of one size are like, against the number of training facts.

    shares: as `results.unseen_shares` gives them; mean over seeds with bars from the smallest to the largest. own: the
    same of the quick profile, of whatever size, hollow.
    """
    shares = shares[(shares.d_model == d_model) & (shares["mode"] == "in-tool")]
    with matplotlib.rc_context({**RC, "figure.figsize": (9.6, 3.1)}):
        figure, panels = plt.subplots(1, len(KINDS), sharey=True, sharex=True)
        for axes, (kind, title) in zip(panels, KINDS.items(), strict=True):
            for measure, style in MEASURES.items():
                _mean_line(axes, shares[(shares.kind == kind) & (shares.measure == measure)], **style)
                if own is not None:
                    chosen = (own["mode"] == "in-tool") & (own.kind == kind) & (own.measure == measure)
                    _mean_line(axes, own[chosen], **{**style, **HOLLOW, "label": f"{style['label']} (quick)"})
            axes.set(xlabel="training facts", ylim=(-0.04, 1.06))
            axes.set_title(title, fontsize=8)
            axes.set_xscale("log", base=2)
            if not axes.get_lines():
                nothing_yet(axes, "in-tool")
        panels[0].set_ylabel("share of first requests")
        handles, labels = panels[0].get_legend_handles_labels()
        if handles:
            figure.legend(handles, labels, fontsize=7, loc="outside lower center", ncols=len(handles))
    return figure


def compressibility(
    published: pd.DataFrame, bounds: pd.DataFrame, own: pd.DataFrame | None = None, threshold: float = 0.95
) -> Figure:
    """Parameters needed against the correlation of facts, and against the entropy of the database (Section 5.3).

    published: the paper's, a line per number of facts. bounds, own: as `results.compressibility_bounds` gives them;
    `own` (of the quick profile) is hollow. All with a column entropy_bits.
    """
    tables = [(bounds, "this repository", False)] + ([(own, "just trained (quick)", True)] if own is not None else [])
    with matplotlib.rc_context({**RC, "figure.figsize": (8.6, 3.4)}):
        figure, (by_alpha, by_entropy) = plt.subplots(1, 2, sharey=True)
        published = published[published.recall_threshold == threshold]
        for (n_facts, points), line in zip(published.groupby("n_facts"), cycle(("-", "--")), strict=False):
            style = {"color": "#888888", "linestyle": line, "marker": "."}
            by_alpha.plot(points.alpha, points.min_params, label=f"{n_facts:,} facts, published", **style)
            by_entropy.plot(points.entropy_bits, points.min_params, **style)
        for table, name, hollow in tables:
            if not len(table):
                continue
            table = table[table.recall_threshold.eq(threshold) & table.min_params_mean.notna()]
            face = HOLLOW if hollow else {}
            for shade, (n_facts, rows) in enumerate(table.groupby("n_facts")):
                style = {**STYLES["in-weight"], **face, "alpha": max(0.4, 1 - 0.3 * shade)}
                bars = [rows.min_params_mean - rows.min_params_min, rows.min_params_max - rows.min_params_mean]
                label = f"{n_facts:,} facts, {name}"
                for axes, x in ((by_alpha, rows.alpha), (by_entropy, rows.entropy_bits)):
                    axes.errorbar(x, rows.min_params_mean, yerr=bars, capsize=2, label=label, **style)
        by_alpha.set(xlabel="correlation alpha", ylabel=f"parameters needed for {threshold:.0%} recall", yscale="log")
        by_entropy.set(xlabel="entropy of the database, bits", xscale="log")
        low, high = by_entropy.get_xlim()
        for bits in (1, 2):
            by_entropy.plot([low, high], [low / bits, high / bits], color="#BBBBBB", linewidth=0.9, zorder=1)
            _name_line(by_entropy, bits, (high, high / bits), xytext=(3, 0), ha="left", va="center")
        by_entropy.set_xlim(low, high)
        by_entropy.xaxis.set_major_formatter("{x:,.0f}")
        by_entropy.xaxis.set_minor_formatter(lambda x, _: f"{x:,.0f}" if f"{x:e}"[0] in "25" else "")
        by_alpha.legend(fontsize=7)
    return figure


def _name_line(axes, bits: float, end: tuple[float, float], **place) -> None:
    """Write at the right end of a line how many bits a parameter it stands for."""
    text = f"{bits:g} bit{'s' * (bits != 1)} a parameter"
    axes.annotate(text, end, color="#555555", fontsize=7, textcoords="offset points", annotation_clip=False, **place)


def nothing_yet(axes, mode: str) -> None:
    axes.text(0.5, 0.5, f"no {mode} runs yet", transform=axes.transAxes, ha="center", color="#777777")


def performance(training: pd.DataFrame, curve: pd.DataFrame, growth: pd.DataFrame) -> Figure:
    """What speed was measured: throughput and share of the matrix-product peak against size, time to recall, growth.

    Tables as `lib.benchmarks` gives them: training (those of `training_throughput`, concatenated), curve
    (`learning_curve`), growth (`growth`). Bars go from the slowest to the fastest round.
    """
    with matplotlib.rc_context({**RC, "figure.figsize": (8.6, 6.2)}):
        figure, ((speed, share), (recall, cost)) = plt.subplots(2, 2)
        for (mode, contender), rows in training[training.dtype == "float32"].groupby(["mode", "contender"]):
            style = {**STYLES[mode], **_CONTENDERS[contender]}
            bars = [rows.per_second - rows.least, rows.most - rows.per_second]
            speed.errorbar(rows.d_model, rows.per_second, yerr=bars, capsize=2, label=f"{mode}, {contender}", **style)
            share.plot(rows.d_model, rows.share_of_peak, **style)
        speed.set(xscale="log", yscale="log", xlabel="d_model", ylabel="dialogs trained a second", title="throughput")
        share.set(
            xscale="log",
            xlabel="d_model",
            ylabel="share of the peak",
            title="the model's arithmetic, of the matrix-product peak",
        )
        share.set_ylim(bottom=0)
        for axes in (speed, share):
            axes.set_xticks(sorted(training.d_model.unique()), sorted(training.d_model.unique()))
            axes.minorticks_off()
        speed.set_ylim(top=2.5 * training.most.max())  # room for the legend
        speed.legend(fontsize=6.5, ncols=2, loc="upper center")
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


def probes(rows: list[dict], tensors: list[str] | None = None) -> Figure:
    """Moments of activations (above) and of the loss's gradient there (below) over steps, a line per tensor.

    rows: what a run wrote to probes.jsonl. tensors: which; by default the residual stream and what is read from it:
    the embedding, the sum after each block, the last norm and the logits. One that is not there is an `InputError`.
    """
    table = pd.DataFrame(rows, columns=["step", "tensor", "of", *MOMENTS])
    known = table.tensor.unique()
    names = tensors or [name for name in known if name.count(".") <= 1]
    if missing := [name for name in names if name not in known]:
        raise InputError(f"there are no probes of {missing[0]!r}: there are {', '.join(known)}")
    with matplotlib.rc_context({**RC, "figure.figsize": (9.6, 4.2), "lines.markersize": 3}):
        figure, panels = plt.subplots(2, len(MOMENTS), sharex=True)
        for of, line in zip(("output", "gradient"), panels, strict=True):
            for moment, axes in zip(MOMENTS, line, strict=True):
                for shade, marker, name in zip(np.linspace(0, 0.85, len(names)), cycle("osD^v"), names, strict=False):
                    chosen = table[(table.tensor == name) & (table.of == of)]
                    style = {"color": plt.get_cmap("viridis")(shade), "marker": marker, "linewidth": 1}
                    axes.plot(chosen.step, chosen[moment].astype(float), label=name, **style)
                axes.set(yscale=_SCALES[moment])
                axes.set_title(f"{moment} of the {of}", fontsize=9)
        for axes in panels[-1]:
            axes.set_xlabel("steps")
        if len(names):
            figure.legend(*panels[0, 0].get_legend_handles_labels(), fontsize=7, loc="outside right center")
    return figure


def trained_characters(tokens: Sequence[int], trained: Sequence[bool], width: int = 46) -> Figure:
    """A dialog of bytes, a character a cell, special tokens as U, A, D and E; what is trained is colored.

    tokens, trained: as `dialogs.encode_dialog` gives them for the byte tokenizer; of ASCII text.
    """
    shown = [_SPECIAL_TOKENS.get(token) or chr(token).replace("\n", "\u21b5") for token in tokens]
    with matplotlib.rc_context({**RC, "figure.figsize": (9, 0.26 * (len(tokens) // width + 1))}):
        figure, axes = plt.subplots()
        for i, (character, is_trained) in enumerate(zip(shown, trained, strict=True)):
            box = {"facecolor": "#F0B48A" if is_trained else "#EEEEEE", "edgecolor": "none", "pad": 2}
            axes.text(i % width, -(i // width), character, family="monospace", fontsize=9, bbox=box, ha="center")
        axes.set(xlim=(-1, width), ylim=(-(len(tokens) // width) - 0.5, 0.8))
        axes.axis("off")
    marked = zip(trained, [False, *trained], shown, strict=False)
    text = "".join(("" if now == before else "[" if now else "]") + character for now, before, character in marked)
    text += "]" * trained[-1]
    figure.set_label(f"A dialog, a character a cell; colored, here in brackets, is what is trained: {text}")
    return figure


_SPECIAL_TOKENS = {256: "U", 257: "A", 258: "D", 259: "E"}

#: The tails of gradients span orders of magnitude; near zero "symlog" is linear.
_SCALES = {"mean": "linear", "std": "log", "skew": "linear", "kurtosis": "symlog"}


def _draw_parameter_bounds(
    profile: str, threshold: float = 0.95, tokenizer: str = "bytes", by_hand: bool = False
) -> Figure:
    results.check_threshold(threshold)
    return parameter_bounds(
        published_by_paper("parameter_bounds"),
        results.bounds(results.counting_profile(profile)),
        None if profile in paths.PUBLISHING else results.bounds(profile, tokenizer),
        threshold,
        Circuit().n_params if by_hand else None,
    )


def _draw_lower_bound(profile: str, threshold: float = 0.95) -> Figure:
    results.check_threshold(threshold)
    laptop = results.bounds(results.counting_profile(profile))
    return lower_bound(published_by_paper("parameter_bounds"), laptop, MEASURED_BITS, Circuit().n_params, threshold)


def _draw_recall_against_parameters(profile: str, tokenizer: str = "bytes") -> Figure:
    published = published_by_paper("recall_vs_parameters_in_weight")
    own = None if profile in paths.PUBLISHING else results.bounds_rows(profile, tokenizer)
    return recall_against_parameters(results.bounds_rows(results.counting_profile(profile)), own, published)


def _draw_bits_stored(profile: str) -> Figure:
    return bits_stored(results.capacity(results.counting_rows("05_1", profile)))


def _own_shares(profile: str) -> pd.DataFrame | None:
    return None if profile in paths.PUBLISHING else results.unseen_shares(results.read_rows("05_2", profile))


def _draw_generalization(profile: str) -> Figure:
    shares = results.unseen_shares(results.counting_rows("05_2", profile))
    guess = best_constant_guess(unseen_people(FactsConfig(n_people=1), 1000)["new_both"])
    return generalization(shares, _own_shares(profile), published_by_paper("generalization"), guess)


def _draw_tool_calls(profile: str, d_model: int = 36) -> Figure:
    return tool_calls(results.unseen_shares(results.counting_rows("05_2", profile)), d_model, _own_shares(profile))


def _draw_compressibility(profile: str, threshold: float = 0.95) -> Figure:
    results.check_threshold(threshold)
    published = published_by_paper("compressibility").rename(columns={"correlation_alpha": "alpha"})
    own = None if profile in paths.PUBLISHING else results.compressibility_bounds(profile)
    return compressibility(
        published.assign(entropy_bits=results.entropy_bits(published)),
        results.compressibility_bounds(results.counting_profile(profile)),
        own,
        threshold,
    )


#: Every figure of the paper that this repository draws, by the name of its files.
FIGURES = {
    "parameter_bounds": _draw_parameter_bounds,
    "recall_vs_parameters": _draw_recall_against_parameters,
    "bits_stored": _draw_bits_stored,
    "lower_bound": _draw_lower_bound,
    "generalization": _draw_generalization,
    "tool_calls": _draw_tool_calls,
    "compressibility": _draw_compressibility,
}
