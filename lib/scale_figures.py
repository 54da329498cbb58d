"""Figures of Section 6: what fine-tuned chat models forget, and when hybrids ask. Tables in, figures out.

The tables are those of `scale_results.comparable`. Color, line and filling say the mode, the marker the model.
Published models lie behind, the smaller the lighter; ours have black edges, but those of the quick profile are hollow.
Bars are standard errors, often smaller than the marker. A point without a value is left out.
"""

from itertools import cycle

import matplotlib
import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from lib import paths
from lib.figure_style import HOLLOW, RC, STYLES, nothing_yet
from lib.scale_results import of_facts

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
    "capability_relative": "capability, % of the base model's",
    "tv": "total variation to the base model",
}
_TASKS = {"hellaswag": "HellaSwag accuracy", "skills": "accuracy in the skills trained before"}


def capability(table: pd.DataFrame) -> Figure:
    """What a model could do before, against the facts it was fine-tuned on (Section 6, HellaSwag).

    A panel for each task, absolute, and one of all in percent of the models' own before. Dotted: guessing in HellaSwag,
    and what it was before.
    """
    tasks = list(table.dropna(subset="capability").capability_task.unique()) or ["hellaswag"]
    with _style(3.1 * (len(tasks) + 1) + 1.6):
        figure, panels = plt.subplots(1, len(tasks) + 1, sharex=True)
        for axes, task in zip(panels, tasks, strict=False):
            _against_facts(axes, table[table.capability_task == task], "capability", _looks(table))
            axes.set_ylabel(_TASKS.get(task, task))
            if task == "hellaswag":
                _dotted(axes, 1 / 4)
        _against_facts(panels[-1], table, "capability_relative", _looks(table))
        _dotted(panels[-1], 100)
        _legend(figure, table)
    return figure


def total_variation(table: pd.DataFrame) -> Figure:
    """How far a model's next-token probabilities moved, with and without the tool, against facts (Section 6)."""
    with _style(5.8):
        figure, axes = plt.subplots()
        _against_facts(axes, table, "tv", _looks(table))
        _from_zero(axes)
        _legend(figure, table)
    return figure


def total_variation_against_steps(table: pd.DataFrame, rows: pd.DataFrame | None = None) -> Figure:
    """How far a model's next-token probabilities moved, against the steps of fine-tuning (Section 6).

    A point is a last checkpoint, a line goes from few facts to many. rows: our checkpoints, drawn as a thin line a run.
    """
    with _style(5.8):
        figure, axes = plt.subplots()
        if rows is not None and len(rows):
            for (_, mode), run in of_facts(rows[rows.step > 0]).groupby(["run_id", "mode"]):
                run = run.sort_values("step")
                axes.plot(run.step, run.tv, linewidth=0.6, alpha=0.6, zorder=1, **MODES[mode])
        _lines(axes, table, "steps", "tv", _looks(table))
        axes.set(xscale="log", xlabel="steps of fine-tuning", ylabel=_LABELS["tv"])
        axes.xaxis.set_major_formatter("{x:,.0f}")
        _from_zero(axes)
        _legend(figure, table)
    return figure


def steps_to_recall(table: pd.DataFrame, threshold: float = 0.95) -> Figure:
    """Steps of fine-tuning until the share `threshold` of the facts is recalled, against facts (Section 6).

    threshold: as given to `comparable`. Published are the steps of last checkpoints, without an error.
    """
    with _style(5.8):
        figure, axes = plt.subplots()
        _against_facts(axes, table, "steps_to_recall", _looks(table))
        axes.set(yscale="log", ylabel=f"steps to {threshold:.0%} recall")
        axes.yaxis.set_major_formatter("{x:,.0f}")
        _legend(figure, table)
    return figure


def forgetting(table: pd.DataFrame) -> Figure:
    """Recall, relative capability and total variation side by side, against facts (Section 6, main figure)."""
    with _style(10.6):
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


def _style(width: float):
    return matplotlib.rc_context({**RC, "figure.figsize": (width, 3.4), "figure.constrained_layout.w_pad": 0.1})


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
    axes.set(xscale="log", xlabel="facts", ylabel=_LABELS.get(metric, ""))
    axes.xaxis.set_major_formatter("{x:,.0f}")


def _lines(axes, table: pd.DataFrame, x: str, y: str, looks: dict) -> None:
    for (model, mode), points in table.dropna(subset=y).groupby(["model", "mode"], sort=False):
        bars = {"xerr": points.get(f"{x}_stderr"), "yerr": points[f"{y}_stderr"], "capsize": 2}
        axes.errorbar(points[x], points[y], label=f"{model}, {mode}", **bars, **looks[model, mode])
    if not axes.get_lines():
        nothing_yet(axes, "fine-tuned")


def _from_zero(axes) -> None:
    """Zero, and room for half a marker below it."""
    axes.set_ylim(bottom=-0.03 * axes.get_ylim()[1])


def _dotted(axes, y: float) -> None:
    if axes.get_lines():
        axes.axhline(y, color="#555555", linewidth=0.9, linestyle=":")


def _legend(figure: Figure, table: pd.DataFrame) -> None:
    handles = [Line2D([], [], marker="o", label=mode, **MODES[mode]) for mode in MODES if mode in set(table["mode"])]
    looks = _looks(table)
    handles += [Line2D([], [], label=model, **looks[model, None]) for model in table.model.unique()]
    figure.legend(handles=handles, fontsize=7, handlelength=3, loc="outside right center")
