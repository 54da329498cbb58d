"""Figures of Section 6: what fine-tuned chat models forget, and when hybrids use the tool.

They are drawn from the tables of `lib.experiments.scale_tables`: checkpoints (`published_rows`) or last checkpoints
(`comparable`). Color, line and filling show the mode; markers show the model or, in curves, the number of facts.
Published models lie behind, smaller ones lighter; ours have black edges, those of the quick profile are hollow. Bars
are standard errors, often smaller than the marker. A point without a value is left out.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle

import numpy as np
import pandas as pd
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from lib import paths
from lib.experiments.scale_tables import LEARNED, by_family, of_facts, rate
from lib.experiments.summaries import interval_of_share
from lib.figures.style import BESIDE, HOLLOW, STYLES, log_ticks, panels

#: Half-filled markers mean a tool: single points have no line style to tell modes apart in grey.
MODES = {
    "in-weight": {"color": STYLES["in-weight"]["color"], "linestyle": "-"},
    "in-tool": {"color": STYLES["in-tool"]["color"], "linestyle": "--", "fillstyle": "left"},
    "in-tool-text": {"color": "#56B4E9", "linestyle": ":", "fillstyle": "top"},
    "hybrid": {"color": "#009E73", "linestyle": "-.", "fillstyle": "right"},
}
_MARKERS = "os^Dv*PXd<p>h8"
_OURS = {"markeredgecolor": "black", "markeredgewidth": 0.7, "markersize": 7, "zorder": 3}
_LABELS = {
    "steps_to_recall": f"steps to {LEARNED:.0%} recall",
    "recall": "recall of the facts",
    "capability_relative": "{capability}, % of the base model's",
    "tv": "total variation to the base model",
    "kl": "KL divergence to the base model, nats",
}
_TESTS = {"hellaswag": "HellaSwag accuracy", "trivia": "accuracy in our trivia"}


def against_steps(rows: pd.DataFrame, metric: str) -> Figure:
    """Draw a metric of `_LABELS` against the steps of fine-tuning, one panel per model, one line per run (Section 6).

    rows: of checkpoints, `capability_relative` (see `scale_tables.relative`) included if drawn. Both axes are shared.
    Distances are on a logarithmic axis, and so are steps, so the base model (step 0, distance 0) is left out.
    """
    rows, is_distance = of_facts(rows[rows.step > 0]), metric in ("tv", "kl")
    bases, looks = by_family(rows.base), _looks_of_runs(rows)
    n_columns = min(3, max(1, len(bases)))
    n_rows = max(1, -(-len(bases) // n_columns))
    size, shared = (2.6 * n_columns + 2.0, 2.2 * n_rows + 0.4), {"sharex": True, "sharey": True, "squeeze": False}
    with panels(size, n_rows, n_columns, runs="fine-tuned", **shared) as (figure, grid):
        for axes, base in zip(grid.flat, bases, strict=False):
            runs = rows[rows.base == base]
            for (mode, n_facts, _), run in runs.groupby(["mode", "n_facts", "run_id"]):
                points = run.dropna(subset=metric).sort_values("step")
                points = points[points[metric] > 0] if is_distance else points
                axes.plot(points.step, points[metric], label=_runs(run), **looks[mode, n_facts])
            if unmeasured := [mode for mode, values in runs.groupby("mode")[metric] if values.isna().all()]:
                axes.text(0.04, 0.04, f"{', '.join(unmeasured)}: no values", transform=axes.transAxes, fontsize=7)
            axes.set_title(f"{base}\n{_rates(runs)}", fontsize=8)
            axes.set(xscale="log", yscale="log" if is_distance else "linear")
            log_ticks(axes.xaxis, rows.step)
            if is_distance:
                log_ticks(axes.yaxis, rows[metric])
            axes.xaxis.set_major_formatter("{x:,.0f}")
            axes.yaxis.set_major_formatter("{x:g}")
            if metric == "capability_relative":
                axes.axhline(100, color="#555555", linewidth=0.9, linestyle=":")
        figure.supxlabel("steps of fine-tuning", fontsize=9)
        figure.supylabel(_label(metric, rows), fontsize=9)
        handles = [Line2D([], [], label=f"{mode}, {n:,} facts", **look) for (mode, n), look in looks.items()]
        figure.legend(handles=handles, handlelength=3, loc="outside right center")
    return figure


def _label(metric: str, rows: pd.DataFrame) -> str:
    """Return an axis label; capability is named where all rows are of one known test."""
    tests = rows.capability_task.dropna().unique()
    return _LABELS[metric].format(capability=_TESTS.get(tests[0], "capability") if len(tests) == 1 else "capability")


def _by_mode(rows: pd.DataFrame):
    """Group by mode, in the order of `MODES`."""
    return rows.groupby(pd.Categorical(rows["mode"], list(MODES)), observed=True)


def _tinted(color: str, strength: float) -> str:
    """Return a color mixed with white: strength 1 is the color itself."""
    return to_hex(1 - strength * (1 - np.array(to_rgb(color))))


def _looks_of_runs(rows: pd.DataFrame) -> dict[tuple[str, int], dict]:
    """Return how a curve looks by mode and number of facts: more facts are darker, each number has its marker."""
    markers, looks = dict(zip(sorted(rows.n_facts.unique()), cycle(_MARKERS), strict=False)), {}
    for mode, runs in _by_mode(rows):
        facts = sorted(runs.n_facts.unique())
        same = MODES[mode] | {"markersize": 3, "linewidth": 1, "fillstyle": "full"}
        same["zorder"] = 2 + 0.1 * (mode != "in-weight")
        for n, strength in zip(facts, np.linspace(1, 0.45, len(facts))[::-1], strict=True):
            looks[mode, n] = same | {"marker": markers[n], "color": _tinted(MODES[mode]["color"], strength)}
    return looks


def _rates(runs: pd.DataFrame) -> str:
    """Return the learning rates of a model's runs: "rate 5e-5", or of each mode "rate 1e-3 in-weight, 1e-4 in-tool"."""
    of_modes = {mode: ", ".join(map(rate, sorted(set(lr)))) for mode, lr in _by_mode(runs.dropna(subset="lr")).lr}
    if len({*of_modes.values()}) > 1:
        of_modes = {mode: f"{lr} {mode}" for mode, lr in of_modes.items()}
    return f"rate {', '.join(dict.fromkeys(of_modes.values()))}" * bool(of_modes)


def steps_to_recall(table: pd.DataFrame) -> Figure:
    """Draw the steps of fine-tuning until `LEARNED` of the facts are recalled, against facts (Section 6).

    Bars are at least the std of a uniform draw between evaluations.
    """
    with _against_facts(5.8, table, "steps_to_recall") as (figure, (axes,)):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:,.0f}")
    return figure


def forgetting(table: pd.DataFrame) -> Figure:
    """Draw recall, relative capability and total variation side by side, against facts (Section 6, main figure)."""
    with _against_facts(10.6, table, "recall", "capability_relative", "tv") as (figure, (recall, _, variation)):
        recall.set_ylim(-0.04, 1.06)
        variation.set_ylim(bottom=-0.03 * variation.get_ylim()[1])  # room for half a marker below zero
    return figure


def like_with_like(pairs: pd.DataFrame) -> Figure:
    """Draw capability and total variation of models fine-tuned in tool and in weights, a row per model (Section 6).

    pairs: those of `scale_tables.pairs` with the same recipe.
    """
    pairs, y = pairs.set_index("base").loc[by_family(pairs.base)[::-1]], range(len(pairs))
    size = 8.6, 1.3 + 0.35 * len(pairs)
    with panels(size, 1, 2, runs="comparable", sharey=True) as (figure, row):
        for axes, metric in zip(row, ("capability_relative", "tv"), strict=True):
            axes.hlines(y, pairs[f"{metric}_tool"], pairs[f"{metric}_weight"], color="#BBBBBB", zorder=0)
            for mode, end in (("in-tool", "tool"), ("in-weight", "weight")):
                look = {name: STYLES[mode][name] for name in ("color", "marker")} | {"linestyle": "none", "label": mode}
                axes.errorbar(pairs[f"{metric}_{end}"], y, xerr=pairs[f"{metric}_stderr_{end}"], **look)
            axes.set(
                xlabel=_LABELS[metric].format(capability=_TESTS["hellaswag"]), ylim=(-0.5, max(1, len(pairs)) - 0.5)
            )
        row[0].set_yticks(y, [f"{base}, {n:,} facts" for base, n in pairs.n_facts.items()])
        if len(pairs):
            row[1].legend(**BESIDE)
    return figure


def hybrid(table: pd.DataFrame) -> Figure:
    """Draw how often a hybrid calls the tool and is right, against how often a fact was seen (Section 6).

    table: as `scale_tables.hybrid` gives it. The axis is logarithmic; if some facts were never seen, it is linear from
    zero to the lowest other frequency.
    """
    with panels((7.8, 3.4), 1, 2, _PADDED, "hybrid", sharex=True, sharey=True) as (figure, row):
        label = "times seen in training"
        row[0].set_xscale("log", base=2)
        if table.frequency.eq(0).any():
            least = min((frequency for frequency in table.frequency if frequency > 0), default=1)
            row[0].set_xscale("symlog", base=2, linthresh=least)
            label += f" (linear below {least:g})"
        for axes, shares in zip(row, (["call_share"], ["accuracy", "accuracy_of_calls"]), strict=True):
            for share in shares:
                points = table.dropna(subset=share)
                axes.errorbar(points.frequency, points[share], yerr=points[f"{share}_stderr"], **_ASKED[share])
            axes.set(xlabel=label, ylim=(-0.04, 1.06))
            axes.xaxis.set_major_formatter("{x:g}")
        row[0].set_ylabel("share looked up")
        row[1].set_ylabel("share answered correctly")
        row[1].legend(**BESIDE)
    return figure


def trivia(table: pd.DataFrame, model: str) -> Figure:
    """Draw how many questions of general knowledge a model answers correctly in each of `WAYS` (appendix on TriviaQA).

    table: a row for each `way` and kind of `questions`, with `accuracy` and `n_questions`. Error bars are Wilson's 95%
    intervals. A missing way is left out, a missing kind leaves a gap.
    """
    ways, hatches = [way for way in WAYS if way in set(table.way)], cycle(("", "///", "...", "xxx", "---"))
    looks = dict(zip(table.questions.unique(), hatches, strict=False))
    width = 0.8 / max(1, len(looks))
    with panels((7.8, 3.4), rc=_PADDED) as (figure, axes):
        for i, (kind, hatch) in enumerate(looks.items()):
            bars = table[table.questions == kind].set_index("way").reindex(ways)
            places = np.arange(len(ways)) + width * (i - (len(looks) - 1) / 2)
            look = {"color": [WAYS[way] for way in ways], "hatch": hatch, "edgecolor": "white", "ecolor": "black"}
            low, high = interval_of_share(bars.accuracy * bars.n_questions, bars.n_questions)
            lengths = np.maximum([bars.accuracy - low, high - bars.accuracy], 0)  # not below 0 by rounding
            axes.bar(places, bars.accuracy, width, yerr=lengths, **look)
        axes.set_xticks(range(len(ways)), ways)
        axes.set(title=model, ylabel="share answered correctly", ylim=(0, 1.06))
        look = {"facecolor": "#444444", "edgecolor": "white"}
        handles = [Patch(**look, hatch=hatch, label=kind) for kind, hatch in looks.items()]
        figure.legend(handles=handles, loc="outside right center")
    return figure


#: Ways to answer questions, and their colors.
WAYS = {
    "closed-book": "#999999",
    "in-weight": MODES["in-weight"]["color"],
    "in-tool, text": MODES["in-tool-text"]["color"],
    "in-tool, native": MODES["in-tool"]["color"],
}

_HOLLOW = {"linestyle": "--", "markerfacecolor": "white"}
_ASKED = {
    "call_share": STYLES["in-tool"],
    "accuracy": {"color": MODES["hybrid"]["color"], "marker": "o", "label": "all questions"},
    "accuracy_of_calls": STYLES["in-tool"] | _HOLLOW | {"label": "those looked up"},
}

_PADDED = {"figure.constrained_layout.w_pad": 0.1}


def _looks(table: pd.DataFrame) -> dict[tuple[str, str | None], dict]:
    """Return how the points of each model and mode look; mode None is how a legend shows the model."""
    sources = dict(zip(table.model, table.source, strict=True))
    names = {model: model.removesuffix(f" ({source})") for model, source in sources.items()}
    markers = dict(zip(dict.fromkeys(names.values()), cycle(_MARKERS), strict=False))
    published = [model for model, source in sources.items() if source == "published"]
    strengths = dict(zip(published, np.linspace(0.45, 0.85, len(published)), strict=True))
    looks = {}
    for model, source in sources.items():
        for mode, look in {**MODES, None: {"color": "#444444", "linestyle": "none"}}.items():
            own = _OURS if source in paths.PUBLISHING else HOLLOW
            if source == "published":
                own = {"color": _tinted(look["color"], strengths[model]), "linewidth": 1, "zorder": 2}
            looks[model, mode] = {**look, "marker": markers[names[model]], **own}
    return looks


@contextmanager
def _against_facts(width: float, table: pd.DataFrame, *metrics: str) -> Iterator[tuple[Figure, np.ndarray]]:
    """Yield a figure, `width` inches wide and high enough for its legend, and its panels: a metric each, against facts.

    The legend shows what modes look like, then each model and below it the facts and rates of its runs.
    """
    lines = table["mode"].nunique() + table.model.nunique() + len(table.groupby(["model", "mode"]))
    size, shared = (width, max(3.4, 0.14 * lines)), {"sharex": True, "squeeze": False}
    looks = _looks(table)
    with panels(size, 1, len(metrics), _PADDED, "fine-tuned", **shared) as (figure, (row,)):
        for axes, metric in zip(row, metrics, strict=True):
            for (model, mode), points in table.dropna(subset=metric).groupby(["model", "mode"], sort=False):
                look = {"label": f"{model}, {_runs(points)}", **looks[model, mode]}
                axes.errorbar(points.n_facts, points[metric], yerr=points[f"{metric}_stderr"], **look)
            axes.set(xscale="log", xlabel="facts", ylabel=_label(metric, table))
            axes.xaxis.set_major_formatter("{x:,.0f}")
        yield figure, row
        handles = [Line2D([], [], marker="o", label=mode, **MODES[mode]) for mode, _ in _by_mode(table)]
        for model, points in table.groupby("model", sort=False):
            label = "\n".join([model, *(f"  {_runs(of_mode)}" for _, of_mode in _by_mode(points))])
            handles.append(Line2D([], [], label=label, **looks[model, None]))
        figure.legend(handles=handles, handlelength=3, labelspacing=0.4, loc="outside right center")


def _runs(points: pd.DataFrame) -> str:
    """Return the runs of one mode in words: "in-weight, 500 to 50,000 facts, rate 1e-3"."""
    facts = " to ".join(f"{n:,}" for n in dict.fromkeys([points.n_facts.min(), points.n_facts.max()]))
    rates = ", ".join(map(rate, sorted(points.lr.dropna().unique())))
    return f"{points['mode'].iloc[0]}, {facts} facts" + f", rate {rates}" * bool(rates)
