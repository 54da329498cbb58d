"""Figures of Sections 4 and 5: one function per figure, table in and figure out."""

from collections.abc import Iterator
from itertools import cycle

import matplotlib
import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from lib import paths
from lib.base import InputError
from lib.evaluation.generalization import best_constant_guess
from lib.experiments import summaries, tables
from lib.experiments.published import PUBLISHED_KIND, published_by_paper, published_correlated
from lib.facts.people import VALUES, FactsConfig
from lib.facts.sampling import unseen_people
from lib.figures.style import EARLIER, HOLLOW, RC, STYLES, nothing_yet
from lib.model.bounds import MEASURED_BITS, bits_at_recall, parameters_needed
from lib.model.circuit import Circuit

_BY_HAND = {"color": "#009E73", "linestyle": "-.", "linewidth": 1.4, "label": "constructed by hand (Section 4)"}


def draw(name: str, profile: str = "laptop", **options) -> Figure:
    """One of `FIGURES` from paper_data; profiles that do not publish add their own rows.

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

    Tables as `summaries.minimal_parameters` gives them. Published points lie behind as lines with a band of one
    standard deviation, ours in front with bars from the smallest to the largest seed; `quick` points are hollow.
    `by_hand`: parameters of the model of `lib.model.circuit`, a line, for it recalls any number of facts.
    """
    with matplotlib.rc_context(RC):
        figure, axes = plt.subplots()
        for mode, style in STYLES.items():
            theirs = _at(published, mode, threshold)
            mean, std = theirs.min_params_mean, theirs.min_params_std
            label = published_label(theirs.n_facts, mode)
            axes.plot(theirs.n_facts, mean, color=style["color"], alpha=0.45, linewidth=1.4, label=label)
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


def published_label(n_facts: pd.Series, about: str = "", law: str = "independent") -> str:
    """Return the label of published points: how many facts, about whom, and by which law the database was drawn."""
    counts = sorted(set(n_facts))
    span = f"{counts[0]:,}" + (f" to {counts[-1]:,}" if len(counts) > 1 else "") if counts else "no"
    return ", ".join(filter(None, [about, f"published: {span} facts", law]))


def _by_recipe(table: pd.DataFrame, label: str) -> Iterator[tuple[pd.DataFrame, str, dict]]:
    """Rows, label and style of each kind of point of ours: of another database or an earlier recipe, see `shown`."""
    for (law, superseded), rows in tables.described(table).groupby(["law", "superseded"]):
        label_of_law = label if law == "ours" else f"{label}, {law} law"
        yield (rows, f"{label_of_law}, earlier recipe", EARLIER) if superseded else (rows, label_of_law, {})


def _at(table: pd.DataFrame, mode: str, threshold: float) -> pd.DataFrame:
    if not len(table):
        return table
    chosen = (table["mode"] == mode) & (table.recall_threshold == threshold) & table.min_params_mean.notna()
    return table[chosen].sort_values("n_facts")


def _points(axes, table: pd.DataFrame, style: dict, label: str, hollow: bool = False) -> None:
    face = HOLLOW if hollow else {"zorder": 3}
    for rows, name, earlier in _by_recipe(table, label):
        mean = rows.min_params_mean
        bars = [mean - rows.min_params_min, rows.min_params_max - mean]
        look = {**style, **face, **earlier}
        axes.errorbar(rows.n_facts, mean, yerr=bars, linestyle="none", capsize=2, label=name, **look)


def lower_bound(
    published: pd.DataFrame, laptop: pd.DataFrame, marks: dict[str, float], by_hand: int, threshold: float = 0.95
) -> Figure:
    """Parameters of the smallest in-weight models against what they have to know, and Section 4's bounds.

    Tables as `summaries.minimal_parameters` gives them. A line P = bits / b for each of `marks`: b bits a parameter, by
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
        axes.plot(x, theirs.min_params_mean, color=color, alpha=0.45, label=published_label(theirs.n_facts, label))
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

    laptop, quick: rows of finished runs; those of `quick` are dashed, with hollow points. A point is the mean over the
    seeds that ran this size, with bars from the smallest to the largest: not all seeds, where a search chose sizes.
    published: paper_data/published/recall_vs_parameters_in_weight, drawn behind.
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
                label = published_label(published.n_facts).replace(": ", ":\n").replace(", ", ",\n")
                axes.plot([], [], color="#999999", linewidth=1, label=label)
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
        for points, name, earlier in _by_recipe(runs, label.format(n_facts)):
            recall = points.groupby("n_params").recall.agg(["mean", "min", "max"])
            bars = [recall["mean"] - recall["min"], recall["max"] - recall["mean"]]
            line = {"color": plt.get_cmap("viridis")(shades[n_facts]), "marker": "o", "markersize": 3.5, "capsize": 2}
            axes.errorbar(recall.index, recall["mean"], yerr=bars, label=name, **{**line, **style, **earlier})


def bits_stored(held: pd.DataFrame, bits_per_parameter: tuple[float, ...] = (1, 2)) -> Figure:
    """Bits that in-weight models hold against their parameters (Section 4's bound; not in the paper's Section 5).

    held: as `summaries.capacity` gives it; runs that were given up are left out. Filled points are overloaded models,
    of recall below 95%.
    """
    held = held[(held.stopped != "hopeless") & held.stored_bits.gt(0)]
    with matplotlib.rc_context({**RC, "figure.figsize": (5.6, 3.8)}):
        figure, axes = plt.subplots()
        groups = list(held.groupby("n_facts"))
        for shade, (n_facts, runs) in zip(np.linspace(0, 0.85, len(groups)), groups, strict=True):
            color = plt.get_cmap("viridis")(shade)
            for points, _, earlier in _by_recipe(runs, ""):
                overloaded = points.recall < 0.95
                for which, face in ((overloaded, color), (~overloaded, "white")):
                    look = {**earlier, "color": color, "markerfacecolor": face}
                    axes.plot(points.n_params[which], points.stored_bits[which], "o", **look)
            axes.plot([], [], "o", color=color, label=f"{n_facts:,}")
            axes.axhline(runs.entropy_bits.mean(), color=color, linewidth=0.7, linestyle=":")
        axes.set(xscale="log", yscale="log", xlabel="parameters", ylabel="bits stored")
        low, high = axes.get_xlim()
        for bits in bits_per_parameter:
            axes.plot([low, high], [bits * low, bits * high], color="#777777", linewidth=0.9, zorder=1)
            _name_line(axes, bits, (high, bits * high), xytext=(-2, 3), ha="right", va="bottom")
        axes.set_xlim(low, high)
        if high < 50 * low:  # matplotlib's own ticks run into each other
            axes.set_xticks([tick for tick in 5000 * 2 ** np.arange(8) if low <= tick <= high])
            axes.xaxis.set_major_formatter("{x:,.0f}")
            axes.xaxis.set_minor_formatter("")
        if tables.described(held).superseded.any():
            axes.plot([], [], "o", **{"color": "#777777", **EARLIER}, label="pale: earlier recipe")
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

    shares: as `summaries.unseen_shares` gives them, a line per size, in-tool and, dashed, in-weight; mean over seeds
    with bars from the smallest to the largest. own: the same of the quick profile, hollow. A panel for each kind of
    name. published: the paper's points, grey, in the panel of people of `PUBLISHED_KIND`. guess: of the best constant.
    """
    kinds = list(KINDS)[1:]
    with matplotlib.rc_context({**RC, "figure.figsize": (9.6, 3.1)}):
        figure, panels = plt.subplots(1, len(kinds), sharey=True, sharex=True)
        for axes, kind in zip(panels, kinds, strict=True):
            if published is not None and kind == PUBLISHED_KIND:
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
        entries = {
            label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        if entries:
            place = {"loc": "outside right center", "title": "parameters", "title_fontsize": 7}
            figure.legend(entries.values(), entries, fontsize=7, **place)
    return figure


def _lines_by_size(axes, table: pd.DataFrame, label: str, **face) -> None:
    """share against n_facts: a line per size, each mode in its color, larger models stronger."""
    for mode, style in STYLES.items():
        groups = list(table[table["mode"] == mode].groupby("n_params"))
        for strength, (n_params, rows) in zip(np.linspace(1, 0.35, len(groups))[::-1], groups, strict=True):
            line = "-" if mode == "in-tool" else "--"
            _mean_line(axes, rows, label.format(n_params, mode), alpha=strength, linestyle=line, **style, **face)


def _mean_line(axes, rows: pd.DataFrame, label: str, alpha: float = 1, **style) -> None:
    """share against n_facts: the mean over seeds, with bars from the smallest to the largest."""
    for points, name, earlier in _by_recipe(rows, label):
        share = points.groupby("n_facts").share.agg(["mean", "min", "max"])
        bars = [share["mean"] - share["min"], share["max"] - share["mean"]]
        look = {**style, **earlier, "alpha": alpha * earlier.get("alpha", 1)}
        axes.errorbar(share.index, share["mean"], yerr=bars, capsize=2, label=name, **look)


def _published_generalization(axes, published: pd.DataFrame) -> None:
    for (mode, _), points in published.groupby(["mode", "n_params"]):
        style = {"color": "#888888", "linewidth": 0.8, "linestyle": "-" if mode == "in-tool" else "--", "zorder": 1}
        axes.plot(points.n_facts, points.ood_recall, **style)
    label = published_label(published.n_facts, KINDS[PUBLISHED_KIND])
    axes.plot([], [], color="#888888", linewidth=0.8, label=label.replace(", ", ",\n"))


#: What is right about requests, as a legend says it.
MEASURES = {
    "well_formed": {"label": "well-formed", "color": "#000000", "marker": "^", "linestyle": ":"},
    "right_attribute": {"label": "right attribute", "color": "#009E73", "marker": "D", "linestyle": "--"},
    "right_name": {"label": "name copied rightly", "color": "#0072B2", "marker": "s", "linestyle": "-"},
}


def tool_calls(shares: pd.DataFrame, d_model: int, own: pd.DataFrame | None = None) -> Figure:
    """What the first requests of in-tool models of one size are like, against the number of training facts.

    shares: as `summaries.unseen_shares` gives them; mean over seeds with bars from the smallest to the largest. own:
    the same of the quick profile, of whatever size, hollow.
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

    published: the paper's, a line per number of facts, at the entropy of databases of the released law. bounds, own: as
    `summaries.compressibility_bounds` gives them; `own` (of the quick profile) is hollow. All with a column
    entropy_bits.
    """
    tables = [(bounds, "this repository", False)] + ([(own, "just trained (quick)", True)] if own is not None else [])
    with matplotlib.rc_context({**RC, "figure.figsize": (8.6, 3.4)}):
        figure, (by_alpha, by_entropy) = plt.subplots(1, 2, sharey=True)
        published = published[published.recall_threshold == threshold]
        for (_, points), line in zip(published.groupby("n_facts"), cycle(("-", "--")), strict=False):
            style = {"color": "#888888", "linestyle": line, "marker": "."}
            label = published_label(points.n_facts, law="released law")
            by_alpha.plot(points.alpha, points.min_params, label=label, **style)
            by_entropy.plot(points.entropy_bits, points.min_params, **style)
        for table, name, hollow in tables:
            if not len(table):
                continue
            table = table[table.recall_threshold.eq(threshold) & table.min_params_mean.notna()]
            face = HOLLOW if hollow else {}
            for shade, (n_facts, rows) in enumerate(table.groupby("n_facts")):
                for points, label, earlier in _by_recipe(rows, f"{n_facts:,} facts, {name}"):
                    strength = max(0.4, 1 - 0.3 * shade) * earlier.get("alpha", 1)
                    style = {**STYLES["in-weight"], **face, **earlier, "alpha": strength}
                    mean = points.min_params_mean
                    bars = [mean - points.min_params_min, points.min_params_max - mean]
                    for axes, x in ((by_alpha, points.alpha), (by_entropy, points.entropy_bits)):
                        axes.errorbar(x, mean, yerr=bars, capsize=2, label=label, **style)
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


def _draw_parameter_bounds(
    profile: str, threshold: float = 0.95, tokenizer: str = "bytes", by_hand: bool = False
) -> Figure:
    tables.check_threshold(threshold)
    return parameter_bounds(
        published_by_paper("parameter_bounds"),
        summaries.bounds(tables.publishing_profile(profile)),
        None if profile in paths.PUBLISHING else summaries.bounds(profile, tokenizer),
        threshold,
        Circuit().n_params if by_hand else None,
    )


def _draw_lower_bound(profile: str, threshold: float = 0.95) -> Figure:
    tables.check_threshold(threshold)
    laptop = summaries.bounds(tables.publishing_profile(profile))
    return lower_bound(published_by_paper("parameter_bounds"), laptop, MEASURED_BITS, Circuit().n_params, threshold)


def _draw_recall_against_parameters(profile: str, tokenizer: str = "bytes") -> Figure:
    published = published_by_paper("recall_vs_parameters_in_weight")
    own = None if profile in paths.PUBLISHING else tables.sizes_shown(summaries.bounds_rows(profile, tokenizer))
    rows = tables.sizes_shown(summaries.bounds_rows(tables.publishing_profile(profile)))
    return recall_against_parameters(rows, own, published)


def _draw_bits_stored(profile: str) -> Figure:
    return bits_stored(
        summaries.capacity(tables.sizes_shown(tables.read_rows("05_1", tables.publishing_profile(profile))))
    )


def _shares(profile: str) -> pd.DataFrame:
    return summaries.unseen_shares(summaries.generalization_rows(profile))


def _own_shares(profile: str) -> pd.DataFrame | None:
    return None if profile in paths.PUBLISHING else _shares(profile)


def _draw_generalization(profile: str) -> Figure:
    shares = _shares(tables.publishing_profile(profile))
    guess = best_constant_guess(unseen_people(FactsConfig(n_people=1), 1000)[PUBLISHED_KIND])
    return generalization(shares, _own_shares(profile), published_by_paper("generalization"), guess)


#: Of which size of models the requests are drawn: every seed has one for every number of facts.
TOOL_CALLS_D_MODEL = 24


def _draw_tool_calls(profile: str, d_model: int = TOOL_CALLS_D_MODEL) -> Figure:
    return tool_calls(_shares(tables.publishing_profile(profile)), d_model, _own_shares(profile))


def _draw_compressibility(profile: str, threshold: float = 0.95) -> Figure:
    tables.check_threshold(threshold)
    own = None if profile in paths.PUBLISHING else summaries.compressibility_bounds(profile)
    return compressibility(
        published_correlated(),
        summaries.compressibility_bounds(tables.publishing_profile(profile)),
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
