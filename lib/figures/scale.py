"""Figures of Section 6: what fine-tuned chat models forget, and when hybrids ask. Tables in, figures out.

The tables are those of `scale_results`: of checkpoints (`published_rows`) or of last ones (`comparable`). Color, line
and filling say the mode, the marker the model or, in curves, the number of facts; labels name facts and learning rates.
Published models lie behind, the smaller the lighter; ours have black edges, but those of the quick profile are hollow.
Bars are standard errors, often smaller than the marker. A point without a value is left out.
"""

from itertools import cycle

import matplotlib
import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axis import Axis
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullFormatter

from lib import paths
from lib.experiments.scale_tables import by_family, of_facts, rate
from lib.figures.style import HOLLOW, RC, STYLES, nothing_yet

#: Half-filled is with a tool: single points have no line that could say so in grey.
MODES = {
    "in-weight": {"color": STYLES["in-weight"]["color"], "linestyle": "-"},
    "in-tool": {"color": STYLES["in-tool"]["color"], "linestyle": "--", "fillstyle": "left"},
    "in-tool-text": {"color": "#56B4E9", "linestyle": ":", "fillstyle": "top"},
    "hybrid": {"color": "#009E73", "linestyle": "-.", "fillstyle": "right"},
}
_MARKERS = "os^Dv*PXd<p>h8"
_OURS = {"markeredgecolor": "black", "markeredgewidth": 0.7, "markersize": 7, "zorder": 3}
_LABELS = {
    "recall": "recall of the facts",
    "capability_relative": "{capability}, % of the base model's",
    "tv": "total variation to the base model",
    "kl": "KL divergence to the base model, nats",
}
_TASKS = {"hellaswag": "HellaSwag accuracy", "trivia": "accuracy in our trivia"}


def against_steps(rows: pd.DataFrame, metric: str) -> Figure:
    """Draw a metric of `_LABELS` against the steps of fine-tuning, a panel a model, a line a run (Section 6).

    rows: of checkpoints, `capability_relative` (see `scale_results.relative`) included if drawn. Both axes are shared.
    Distances are on a logarithmic axis, and so are steps, so the base model (step 0, distance 0) is left out.
    """
    rows = of_facts(rows[rows.step > 0])
    bases = by_family(rows.base)
    looks = _looks_of_runs(rows)
    n_columns = min(3, max(1, len(bases)))
    n_rows = max(1, -(-len(bases) // n_columns))
    with matplotlib.rc_context({**RC, "figure.figsize": (2.6 * n_columns + 2.0, 2.2 * n_rows + 0.4)}):
        figure, panels = plt.subplots(n_rows, n_columns, sharex=True, sharey=True, squeeze=False)
        for axes, base in zip(panels.flat, bases, strict=False):
            runs = rows[rows.base == base]
            for _, run in runs.groupby(["mode", "n_facts", "run_id"], sort=True):
                points = run.dropna(subset=metric).sort_values("step")
                points = points[points[metric] > 0] if metric in _DISTANCES else points
                look = looks[run["mode"].iloc[0], run.n_facts.iloc[0]]
                axes.plot(points.step, points[metric], label=_runs(run), **look)
            if unmeasured := [mode for mode, values in runs.groupby("mode")[metric] if values.isna().all()]:
                axes.text(0.04, 0.04, f"{', '.join(unmeasured)}: no values", transform=axes.transAxes, fontsize=7)
            axes.set_title(f"{base}\n{_rates(runs)}", fontsize=8)
            axes.set(xscale="log", yscale="log" if metric in _DISTANCES else "linear")
            _log_ticks(axes.xaxis, rows.step)
            if metric in _DISTANCES:
                _log_ticks(axes.yaxis, rows[metric])
            axes.xaxis.set_major_formatter("{x:,.0f}")
            axes.yaxis.set_major_formatter("{x:g}")
            if metric == "capability_relative":
                _dotted(axes, 100)
        for axes in panels.flat[len(bases) :]:
            nothing_yet(axes, "fine-tuned")
        figure.supxlabel("steps of fine-tuning", fontsize=9)
        figure.supylabel(_label(metric, rows), fontsize=9)
        handles = [Line2D([], [], label=f"{mode}, {n:,} facts", **look) for (mode, n), look in looks.items()]
        figure.legend(handles=handles, fontsize=7, handlelength=3, loc="outside right center")
    return figure


_DISTANCES = ("tv", "kl")


def _log_ticks(axis: Axis, values: pd.Series) -> None:
    """Label powers of ten, and between them 2 and 5 where they are too few."""
    values = values[values > 0]
    if len(values) and values.max() < 30 * values.min():
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_formatter(NullFormatter())


def _label(metric: str, rows: pd.DataFrame) -> str:
    """What an axis says; capability is named where all rows are of one known task."""
    tasks = {_TASKS.get(task, "capability") for task in rows.get("capability_task", pd.Series()).dropna().unique()}
    return _LABELS[metric].format(capability=tasks.pop() if len(tasks) == 1 else "capability")


def _weight_first(column: pd.Series) -> pd.Series:
    """For sorting: the modes in the order of `MODES`, whatever else as it is."""
    return column.map(list(MODES).index) if column.name == "mode" else column


def _looks_of_runs(rows: pd.DataFrame) -> dict[tuple[str, int], dict]:
    """How a curve looks by mode and number of facts: the more facts, the darker, and a marker for each number."""
    markers, looks = dict(zip(sorted(rows.n_facts.unique()), cycle(_MARKERS), strict=False)), {}
    for mode in (mode for mode in MODES if mode in set(rows["mode"])):
        facts = sorted(rows[rows["mode"] == mode].n_facts.unique())
        for n, strength in zip(facts, np.linspace(1, 0.45, len(facts))[::-1], strict=True):
            color = to_hex(1 - strength * (1 - np.array(to_rgb(MODES[mode]["color"]))))
            own = {"color": color, "marker": markers[n], "markersize": 3, "linewidth": 1, "fillstyle": "full"}
            looks[mode, n] = {**MODES[mode], **own, "zorder": 2 + 0.1 * (mode != "in-weight")}
    return looks


def _rates(runs: pd.DataFrame) -> str:
    """The learning rates of a model's runs: "rate 5e-5", or of each mode "rate 1e-3 in-weight, 1e-4 in-tool"."""
    runs = runs.dropna(subset="lr").sort_values("mode", key=_weight_first)
    of_modes = {mode: ", ".join(map(rate, sorted(set(lr)))) for mode, lr in runs.groupby("mode", sort=False).lr}
    if len(set(of_modes.values())) == 1:
        return f"rate {next(iter(of_modes.values()))}"
    return ("rate " + ", ".join(f"{lr} {mode}" for mode, lr in of_modes.items())) * bool(of_modes)


def steps_to_recall(table: pd.DataFrame, threshold: float = 0.95) -> Figure:
    """Steps of fine-tuning until the share `threshold` of the facts is recalled, against facts (Section 6).

    threshold: as given to `comparable`. A bar is the standard deviation of a place between two evaluations.
    """
    with _style(5.8, table):
        figure, axes = plt.subplots()
        _against_facts(axes, table, "steps_to_recall", _looks(table))
        axes.set(yscale="log", ylabel=f"steps to {threshold:.0%} recall")
        axes.yaxis.set_major_formatter("{x:,.0f}")
        _legend(figure, table)
    return figure


def forgetting(table: pd.DataFrame) -> Figure:
    """Recall, relative capability and total variation side by side, against facts (Section 6, main figure)."""
    with _style(10.6, table):
        figure, panels = plt.subplots(1, 3, sharex=True)
        for axes, metric in zip(panels, ("recall", "capability_relative", "tv"), strict=True):
            _against_facts(axes, table, metric, _looks(table))
        panels[0].set_ylim(-0.04, 1.06)
        _from_zero(panels[2])
        _legend(figure, table)
    return figure


def hybrid(table: pd.DataFrame) -> Figure:
    """How often a hybrid calls the tool, and how often it is right, against how often a fact was seen (Section 6).

    table: as `scale_results.hybrid` gives it. The axis is logarithmic; if some facts were never seen, it is linear from
    zero to the least frequent others.
    """
    with _style(7.8):
        figure, panels = plt.subplots(1, 2, sharex=True, sharey=True)
        label = "times seen in training"
        if table.frequency.eq(0).any():
            least = min((frequency for frequency in table.frequency if frequency > 0), default=1)
            panels[0].set_xscale("symlog", base=2, linthresh=least)
            label += f" (linear below {least:g})"
        else:
            panels[0].set_xscale("log", base=2)
        for axes, shares in zip(panels, (["call_share"], ["accuracy", "accuracy_of_calls"]), strict=True):
            for share in shares:
                points = table.dropna(subset=share)
                bars = {"yerr": points[f"{share}_stderr"], "capsize": 2}
                axes.errorbar(points.frequency, points[share], **bars, **_ASKED[share])
            axes.set(xlabel=label, ylim=(-0.04, 1.06))
            axes.xaxis.set_major_formatter("{x:g}")
            if not len(table):
                nothing_yet(axes, "hybrid")
        panels[0].set_ylabel("share looked up")
        panels[1].set_ylabel("share answered rightly")
        panels[1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def trivia(table: pd.DataFrame) -> Figure:
    """How many questions of general knowledge are answered rightly, by each of `WAYS` (the appendix on TriviaQA).

    table: a row for each `way` and kind of `questions`, with `accuracy` and `standard_error`. A way that is not among
    them is left out, a missing kind leaves a gap.
    """
    ways, hatches = [way for way in WAYS if way in set(table.way)], cycle(("", "///", "...", "xxx", "---"))
    looks = dict(zip(table.questions.unique(), hatches, strict=False))
    width = 0.8 / max(1, len(looks))
    with _style(7.8):
        figure, axes = plt.subplots()
        for i, (kind, hatch) in enumerate(looks.items()):
            bars = table[table.questions == kind].set_index("way").reindex(ways)
            places = np.arange(len(ways)) + width * (i - (len(looks) - 1) / 2)
            look = {"color": [WAYS[way] for way in ways], "hatch": hatch, "edgecolor": "white", "ecolor": "black"}
            axes.bar(places, bars.accuracy, width, yerr=bars.standard_error, capsize=2, **look)
        axes.set_xticks(range(len(ways)), ways)
        axes.set(ylabel="share answered rightly", ylim=(0, 1.06))
        handles = [
            Patch(facecolor="#444444", edgecolor="white", hatch=look, label=kind) for kind, look in looks.items()
        ]
        figure.legend(handles=handles, fontsize=7, loc="outside right center")
    return figure


#: How questions can be answered, and its color.
WAYS = {
    "closed-book": "#999999",
    "in-weight": MODES["in-weight"]["color"],
    "in-tool, text": MODES["in-tool-text"]["color"],
    "in-tool, native": MODES["in-tool"]["color"],
}

_ASKED = {
    "call_share": {"color": STYLES["in-tool"]["color"], "marker": "s"},
    "accuracy": {"color": MODES["hybrid"]["color"], "marker": "o", "label": "all questions"},
    "accuracy_of_calls": {
        "color": STYLES["in-tool"]["color"],
        "marker": "s",
        "linestyle": "--",
        "markerfacecolor": "white",
        "label": "those looked up",
    },
}


def _style(width: float, table: pd.DataFrame | None = None):
    """Figures of this width in inches, high enough for the legend of a table."""
    lines = (
        0 if table is None else table["mode"].nunique() + table.model.nunique() + len(table.groupby(["model", "mode"]))
    )
    size = (width, max(3.4, 0.13 * lines))
    return matplotlib.rc_context({**RC, "figure.figsize": size, "figure.constrained_layout.w_pad": 0.1})


def _looks(table: pd.DataFrame) -> dict[tuple[str, str | None], dict]:
    """How the points of each model and mode look; of mode None as a legend shows the model, whatever its mode."""
    sources = dict(zip(table.model, table.source, strict=True))
    names = {model: model.removesuffix(f" ({source})") for model, source in sources.items()}
    markers = dict(zip(dict.fromkeys(names.values()), cycle(_MARKERS), strict=False))
    published = [model for model, source in sources.items() if source == "published"]
    strengths = dict(zip(published, np.linspace(0.45, 0.85, len(published)), strict=True))
    looks = {}
    for model, source in sources.items():
        for mode, look in {**MODES, None: {"color": "#444444", "linestyle": "none"}}.items():
            if source == "published":
                tint = 1 - strengths[model] * (1 - np.array(to_rgb(look["color"])))
                own = {"color": to_hex(tint), "linewidth": 1, "zorder": 2}
            else:
                own = _OURS if source in paths.PUBLISHING else HOLLOW
            looks[model, mode] = {**look, "marker": markers[names[model]], **own}
    return looks


def _against_facts(axes, table: pd.DataFrame, metric: str, looks: dict) -> None:
    _lines(axes, table, "n_facts", metric, looks)
    axes.set(xscale="log", xlabel="facts", ylabel=_label(metric, table) if metric in _LABELS else "")
    axes.xaxis.set_major_formatter("{x:,.0f}")


def _lines(axes, table: pd.DataFrame, x: str, y: str, looks: dict) -> None:
    for (model, mode), points in table.dropna(subset=y).groupby(["model", "mode"], sort=False):
        bars = {"yerr": points[f"{y}_stderr"], "capsize": 2}
        axes.errorbar(points[x], points[y], label=f"{model}, {_runs(points)}", **bars, **looks[model, mode])
    if not axes.get_lines():
        nothing_yet(axes, "fine-tuned")


def _from_zero(axes) -> None:
    """Zero, and room for half a marker below it."""
    axes.set_ylim(bottom=-0.03 * axes.get_ylim()[1])


def _dotted(axes, y: float) -> None:
    if axes.get_lines():
        axes.axhline(y, color="#555555", linewidth=0.9, linestyle=":")


def _runs(points: pd.DataFrame) -> str:
    """The runs of one mode in words: "in-weight, 500 to 50,000 facts, rate 1e-3"."""
    facts = " to ".join(f"{n:,}" for n in dict.fromkeys([points.n_facts.min(), points.n_facts.max()]))
    rates = ", ".join(map(rate, sorted(points.lr.dropna().unique())))
    return f"{points['mode'].iloc[0]}, {facts} facts" + f", rate {rates}" * bool(rates)


def _legend(figure: Figure, table: pd.DataFrame) -> None:
    """What modes look like, then each model and below it the facts and rates of its runs."""
    handles = [Line2D([], [], marker="o", label=mode, **MODES[mode]) for mode in MODES if mode in set(table["mode"])]
    looks = _looks(table)
    for model, points in table.groupby("model", sort=False):
        of_modes = points.sort_values("mode", key=_weight_first).groupby("mode", sort=False)
        label = "\n".join([model, *(f"  {_runs(of_mode)}" for _, of_mode in of_modes)])
        handles.append(Line2D([], [], label=label, **looks[model, None]))
    figure.legend(handles=handles, fontsize=6.5, handlelength=3, labelspacing=0.4, loc="outside right center")
