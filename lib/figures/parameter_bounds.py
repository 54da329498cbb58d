"""Figures of Sections 5.1 and 5.3: parameters against facts, recall, correlation and bits."""

import json
from itertools import cycle

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from lib.experiments import summaries, tables
from lib.experiments.published import published_by_paper, published_correlated
from lib.facts.people import VALUES
from lib.figures.style import (
    BESIDE,
    EARLIER,
    STYLES,
    draw_bits_lines,
    draw_means,
    log_ticks,
    panels,
    published_label,
    shades,
    side_by_side,
    smallest,
    told_apart,
)
from lib.model.bounds import BY_HAND_PARAMETERS, MEASURED_BITS, bits_at_recall

#: The main figure's bound: a key of `MEASURED_BITS`, the bits per parameter that models were measured to hold.
BOUND = "Allen-Zhu & Li 2024"


def parameter_bounds(seeds: pd.DataFrame, published: pd.DataFrame, threshold: float = 0.95) -> Figure:
    """Draw parameters needed for a recall `threshold` against the number of facts (Section 5.1, main figure).

    seeds: as `summaries.bounds_by_seed` gives them, those `shown` side by side: a point each, or a triangle that points
    up where a seed needs more parameters, down where fewer may do. published: like
    `summaries.minimal_parameters`, drawn as lines with a band of one standard deviation. Thin lines are the fits of
    `summaries.fit_of_mode`, with slopes and any 95% intervals in the legend. Section 4 gives the lower bound in
    weights, for models that hold 2 bits per parameter, and the construction that recalls any number of facts with a
    tool.
    """
    with panels((6.2, 4.6)) as (figure, axes):
        for mode, style in STYLES.items():
            theirs = smallest(published, mode, threshold)
            mean, std = theirs["mean"], theirs["std"]
            label = published_label(theirs.n_facts, mode)
            axes.plot(theirs.n_facts, mean, color=style["color"], alpha=0.45, linewidth=1.4, label=label)
            axes.fill_between(theirs.n_facts, mean - std, mean + std, color=style["color"], alpha=0.15, linewidth=0)
            ours = seeds.query("mode == @mode and recall_threshold == @threshold")
            for points, name, look in told_apart(ours[ours.shown], f"{mode}, this repository", style):
                x, known = side_by_side(points), points.min_params.notna()
                axes.plot(x[known], points.min_params[known], label=name, linestyle="none", **look)
                for of, marker in (("more_than", "^"), ("at_most", "v")):
                    side = {"marker": marker, "markerfacecolor": "none", "linestyle": "none"}
                    axes.plot(x[~known], points[of][~known], **look | side)
            fit = summaries.fit_of_mode(ours, mode)
            if np.isfinite(fit["slope"]):
                behind = summaries.fitted(ours, mode).query("not shown")
                axes.plot(side_by_side(behind), behind.min_params, ".", markersize=3, color=style["color"])
                x = np.geomspace(fit["facts"][0], fit["facts"][-1], 50)
                interval = f" ({fit['low']:.2g} to {fit['high']:.2g})" if np.isfinite(fit["low"]) else ""
                slope = round(fit["slope"], 3) + 0.0  # zero, not -7e-17
                name = f"{mode}: {slope:.2g}{interval} parameters per fact"
                axes.plot(x, fit["intercept"] + fit["slope"] * x, color=style["color"], linewidth=0.8, label=name)
        axes.set_ylim(bottom=0.8 * axes.dataLim.y0)  # the bound goes further down
        facts, per_parameter = axes.dataLim.intervalx, MEASURED_BITS[BOUND]
        bound = [n * bits_at_recall(threshold) / len(VALUES) / per_parameter for n in facts]
        label = f"lower bound in weights, {threshold:.0%} recall, {per_parameter:g} bits per parameter"
        axes.plot(facts, bound, color="#555555", linestyle="--", label=label)
        by_hand = {"color": "#009E73", "linestyle": "-.", "linewidth": 1.4}
        axes.axhline(BY_HAND_PARAMETERS, **by_hand, label="set by hand, for any number of facts")
        axes.set(yscale="log", xlabel="facts", ylabel=f"parameters needed for {threshold:.0%} recall")
        axes.set_xscale("log", base=2)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)
    return figure


def compressibility(points: pd.DataFrame, published: pd.DataFrame, threshold: float = 0.95) -> Figure:
    """Draw parameters needed against the correlation of facts, and against the entropy of the database (Section 5.3).

    points: as `summaries.compressibility_bounds` gives them. published: the paper's, a line per number of facts, at the
    entropy of databases of the released law. Both have a column entropy_bits; our points have a marker per recipe.
    """
    with panels((8.6, 3.8), 1, 2, sharey=True) as (figure, (by_alpha, by_entropy)):
        published = published[published.recall_threshold == threshold]
        for (_, theirs), line in zip(published.groupby("n_facts"), cycle(("-", "--")), strict=False):
            style = {"color": "#888888", "linestyle": line, "marker": "."}
            label = published_label(theirs.n_facts, kind="facts, released law")
            by_alpha.plot(theirs.alpha, theirs.min_params, label=label, **style)
            by_entropy.plot(theirs.entropy_bits, theirs.min_params, **style)
        known = smallest(tables.described(points), "in-weight", threshold)
        for marker, ((n_facts, _, recipe), ours) in zip(cycle("oD^vsP"), known.groupby(["n_facts", "law", "recipe"])):
            label = f"ours: {n_facts:,} facts, {tables.recipe_in_words(recipe)}"
            for axes, x in ((by_alpha, "alpha"), (by_entropy, "entropy_bits")):
                draw_means(axes, ours, x, label, **STYLES["in-weight"] | {"marker": marker})
        by_alpha.set(xlabel="correlation alpha", ylabel=f"parameters needed for {threshold:.0%} recall", yscale="log")
        by_entropy.set(xlabel="entropy of the database, bits", xscale="log")
        ends = draw_bits_lines(by_entropy, -1, "#BBBBBB", 3)
        by_entropy.xaxis.set_major_formatter("{x:,.0f}")
        log_ticks(by_entropy.xaxis, pd.Series(ends))
        labels = by_alpha.get_legend_handles_labels()
        figure.legend(*labels, loc="outside lower center", ncols=2, handlelength=3.5)
    return figure


def recall_against_parameters(rows: pd.DataFrame, published: pd.DataFrame) -> Figure:
    """Draw recall at the end of training against model size, a line per number of facts (Section 5.1).

    rows: of finished runs. A point is the mean over the seeds that ran this size, with bars from the smallest to the
    largest. Where a search chose sizes, not all seeds ran each. published: the paper's in-weight curves, drawn behind.
    """
    counts = sorted(set(rows.get("n_facts", ())))
    colors = dict(zip(counts, shades(len(counts)), strict=True))
    with panels((8.6, 3.4), 1, 2, sharey=True, sharex=True) as (figure, row):
        for axes, mode in zip(row, STYLES, strict=True):
            for n_facts, color in colors.items():
                # A run that was given up has no recall at the end of training.
                runs = rows.query("mode == @mode and n_facts == @n_facts and stopped != 'hopeless'")
                draw_means(axes, runs, "n_params", f"{n_facts:,}", of="recall", color=color, marker="o", markersize=3.5)
            if mode == "in-weight":
                _published_recall(axes, published)
            axes.set(xscale="log", xlabel="parameters", title=mode, ylim=(-0.03, 1.06))
            handles, labels = axes.get_legend_handles_labels()
            if handles:
                entries = {}
                for label, handle in zip(labels, handles, strict=True):  # of one number of facts, today's comes first
                    entries.setdefault(label.removesuffix(", earlier recipe"), handle)
                axes.legend(entries.values(), entries, title="facts\n(pale: earlier recipe)", **BESIDE)
        row[0].set_ylabel("recall at the end of training")
    return figure


def _published_recall(axes, published: pd.DataFrame) -> None:
    for n_facts, curve in published[published.recall > 0].groupby("n_facts"):  # any model recalls 0
        axes.plot(curve.min_params_mean, curve.recall, color="#999999", linewidth=1, zorder=1)
        middle = curve.iloc[(curve.recall - 0.6).abs().argmin()]
        spot = {"color": "#777777", "fontsize": 7, "rotation": 80, "ha": "right", "va": "center"}
        axes.annotate(f"{n_facts:,}", (middle.min_params_mean, middle.recall), **spot)
    label = published_label(published.n_facts).replace(": ", ":\n").replace(" independent", "\nindependent")
    axes.plot([], [], color="#999999", linewidth=1, label=label)


def bits_stored(held: pd.DataFrame) -> Figure:
    """Draw bits that in-weight models hold against their parameters (Section 4's bound; not in the paper's Section 5).

    held: as `summaries.capacity` gives it; runs that were given up are left out. Filled points are overloaded models,
    of recall below 95%.
    """
    held = tables.described(held.query("stopped != 'hopeless' and stored_bits > 0"))
    with panels((5.6, 3.8)) as (figure, axes):
        groups = list(held.groupby("n_facts"))
        axes.set(xscale="log", yscale="log", xlabel="parameters", ylabel="bits stored")
        if not groups:
            return figure
        for color, (n_facts, runs) in zip(shades(len(groups)), groups, strict=True):
            for (superseded, known), points in runs.groupby(["superseded", runs.recall >= 0.95]):
                look = {**(EARLIER if superseded else {}), "markerfacecolor": "white" if known else color}
                axes.plot(points.n_params, points.stored_bits, "o", color=color, **look)
            axes.plot([], [], "o", color=color, label=f"{n_facts:,}")
            axes.axhline(runs.entropy_bits.mean(), color=color, linewidth=0.7, linestyle=":")
        low, high = draw_bits_lines(axes, 1, "#777777", 4)
        if high < 50 * low:  # matplotlib's own ticks run into each other
            axes.set_xticks([tick for tick in 5000 * 2 ** np.arange(8) if low <= tick <= high])
            axes.xaxis.set_major_formatter("{x:,.0f}")
            axes.xaxis.set_minor_formatter("")
        grey = {"color": "#666666"}
        axes.plot([], [], "o", **grey, markerfacecolor="white", label="hollow: recall ≥ 95%")
        if held.superseded.any():
            axes.plot([], [], "o", **grey, alpha=EARLIER["alpha"], label="pale: earlier recipe")
        axes.plot([], [], **grey, linewidth=0.7, linestyle=":", label="entropy of the database")
        axes.legend(title="facts", loc="upper left", bbox_to_anchor=(1, 0.85))
    return figure


def patience(held: pd.DataFrame) -> Figure:
    """Draw recall, and the bits that a parameter stores, against passes over the facts (ours, of Section 5.1).

    held: as `summaries.capacity` gives it; one line per size, with bars from the smallest to the largest seed.
    """
    held = held.assign(passes=held.dialogs_seen / held.n_facts, bits=held.stored_bits / held.n_params)
    shown = {"recall": "recall at the end of training", "bits": "bits stored per parameter"}
    with panels((8.6, 3.4), 1, 2, sharex=True) as (figure, row):
        for axes, (of, label) in zip(row, shown.items(), strict=True):
            groups = list(held.groupby(["n_facts", "n_params"]))
            for color, ((n_facts, n_params), runs) in zip(shades(len(groups)), groups, strict=True):
                name = f"{n_params:,} parameters, {n_facts:,} facts"
                draw_means(axes, runs, "passes", name, of=of, color=color, marker="o")
            axes.set(xlabel="passes over the facts", ylabel=label, ylim=(0, None), xscale="log")
            axes.set_xticks(sorted({*held.passes.round()}))
            axes.xaxis.set_major_formatter("{x:,.0f}")
            axes.minorticks_off()
        if groups:
            row[1].legend(**BESIDE)
    return figure


def bounds_in_words(profile: str, threshold: float = 0.95) -> list[str]:
    """Return sentences about our points of `parameter_bounds`: the last number of facts that both modes have, by what
    factor they differ there, the weight decay of today's recipes, and the in-weight models' rates and batches."""
    rows = summaries.bounds_rows(tables.publishing_profile(profile))
    table, theirs = (
        each[each.recall_threshold == threshold]
        for each in (summaries.shown_bounds(rows), published_by_paper("parameter_bounds"))
    )
    seeds = summaries.seeds_of_bounds(rows).query("shown and recall_threshold == @threshold")
    both, published = (
        each.pivot(index="n_facts", columns="mode", values="min_params_mean").reindex(columns=[*STYLES]).dropna()
        for each in (table, theirs)
    )
    sentences = []
    for n_facts, weights, tool in both.tail(1).itertuples():
        over = {
            point.mode: "; ".join(
                [
                    f"(known for {point.seeds_reaching_it} of {point.seeds} seeds"
                    f"{', earlier recipe' * bool(point.superseded)}",
                    *not_known_in_words(seeds[seeds.n_facts.eq(n_facts) & seeds["mode"].eq(point.mode)]),
                ]
            )
            + ")"
            for point in table[table.n_facts == n_facts].itertuples()
        }
        there = published.reindex([n_facts]).dropna()
        factor = [f"{weights / tool:.1f}", *(f"published: {a / b:.1f}" for a, b in there.itertuples(index=False))]
        sentences.append(
            f"At {n_facts:,} facts our models need {weights:,.0f} parameters in weights {over['in-weight']} and "
            f"{tool:,.0f} with a tool {over['in-tool']}, a factor of {' ('.join(factor)}{')' * len(there)}."
        )
    shown = summaries.behind(rows, threshold)
    weights = shown[(shown["mode"] == "in-weight") & ~shown.superseded]
    recipes = []
    for rate, runs in weights.groupby("lr")[["n_facts", "batch_size"]]:
        facts, batch = (" to ".join(f"{n:,.0f}" for n in dict.fromkeys([of.min(), of.max()])) for _, of in runs.items())
        recipes.append((runs.n_facts.min(), f"learning rate {rate:g}, batches of {batch} ({facts} facts)"))
    decays = {
        mode: " or ".join(dict.fromkeys(f"{json.loads(recipe).get('weight_decay', 0):g}" for recipe in runs.recipe))
        for mode, runs in tables.described(rows).query("not superseded").groupby("mode")
    }
    if len(decays) == 2:
        sentences.append(f"Weight decay: {decays['in-weight']} in weights, {decays['in-tool']} with a tool.")
    return sentences + [f"In weights: {'; '.join(said for _, said in sorted(recipes))}."] * bool(recipes)


def not_known_in_words(seeds: pd.DataFrame) -> list[str]:
    """Return what is known about each seed without a smallest model; seeds: of one point of `seeds_of_bounds`."""
    return [
        f"seed {seed.seed} needs "
        + " and ".join(
            f"{words} {n:,.0f}" for words, n in (("more than", seed.more_than), ("at most", seed.at_most)) if n > 0
        )
        for seed in seeds[seeds.min_params.isna()].itertuples()
    ]


def bounds_not_known(profile: str, threshold: float = 0.95) -> list[str]:
    """Return a sentence for each mode about the first number of facts where no smallest model of ours is known."""
    own, sentences = tables.publishing_profile(profile), []
    rows = summaries.bounds_rows(own)
    table = summaries.shown_bounds(rows, [threshold])
    rows = summaries.behind(rows, threshold)
    for mode, n_facts in table[table.min_params_mean.isna()].groupby("mode").n_facts.min().items():
        runs = rows.query("mode == @mode and n_facts == @n_facts")
        known = f"no smallest {mode} model is known yet (largest tried: {runs.n_params.max():,} parameters)"
        for run in runs[runs.recall >= threshold].sort_values("n_params").head(1).itertuples():
            tried = tables.stacked(*(tables.read_rows(section, own) for section in ("05_1", "05_2")))
            like = tried[tried.recipe.eq(run.recipe) & tried.n_params.eq(run.n_params) & tried.n_facts.ne(n_facts)]
            known = f"one {mode} model of {run.n_params:,} parameters reaches {threshold:.0%} (seed {run.seed}). The "
            known += "next smaller size was not tried, so this is a triangle in the figure"
            if len(like):
                known += f"; at other numbers of facts {(like.recall >= threshold).sum()} of {len(like)} runs of "
                known += f"this size and recipe reach {threshold:.0%}"
        sentences.append(f"At {n_facts:,} facts {known}.")
    return sentences


def falls_in_words(profile: str, threshold: float = 0.95) -> str:
    """Return a sentence on how far parameters and bits fall from alpha = 0 to 1 at 4,000 facts, published and ours."""
    ours = summaries.compressibility_bounds(tables.read_rows("05_3", tables.publishing_profile(profile)))
    ours = ours[ours.law == "ours"].rename(columns={"min_params_mean": "min_params", "min_params": "least"})
    told = []
    for who, points in {"published": published_correlated(), "ours": ours.dropna(subset="min_params")}.items():
        points = points.query("n_facts == 4000 and recall_threshold == @threshold").set_index("alpha")
        if {0.0, 1.0} <= {*points.index}:
            needs, bits = (1 - points[of][1.0] / points[of][0.0] for of in ("min_params", "entropy_bits"))
            earlier = ", by an earlier recipe" if who == "ours" and points.superseded.all() else ""
            told.append(f"{who}{earlier}, parameters {needs:.0%} and bits {bits:.0%}")
    return (
        f"From alpha = 0 to 1 at 4,000 facts, these fall: {'; '.join(told)}. Neighboring sizes differ "
        "by a fifth to a half, so where ours fall by less, they do not show the effect."
    )
