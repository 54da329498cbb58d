"""What all figures share: style, helpers for drawing, alternative text, and saving."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from lib import paths
from lib.experiments.tables import described

#: Color-blind safe (Okabe and Ito) and distinct in grey; a marker each, so that color is never the only difference.
STYLES = {
    "in-weight": {"color": "#D55E00", "marker": "o"},
    "in-tool": {"color": "#0072B2", "marker": "s"},
}
#: Points of a profile that does not publish (quick), drawn over the published ones.
HOLLOW = {"markerfacecolor": "white", "markersize": 7, "zorder": 4}
#: Points of runs that today's plan no longer asks for.
EARLIER = {"markerfacecolor": "white", "alpha": 0.55}
#: matplotlib's settings.
SHEET = Path(__file__).with_name("paper.mplstyle")
#: Where a legend stands beside its panel.
BESIDE = {"loc": "upper left", "bbox_to_anchor": (1, 1)}


@contextmanager
def panels(
    size: tuple[float, float] = (5.2, 3.6),
    n_rows: int = 1,
    n_columns: int = 1,
    rc: dict | None = None,
    runs: str = "finished",
    **options,
) -> Iterator[tuple[Figure, plt.Axes]]:
    """Yield a figure of `size` inches and its axes, as `plt.subplots` does, in this style with `rc` on top.

    A panel that is left empty says that there are no `runs` yet.
    """
    with plt.style.context([SHEET, {"figure.figsize": size, **(rc or {})}]):
        figure, grid = plt.subplots(n_rows, n_columns, **options)
        yield figure, grid
        for axes in figure.axes:
            lines = [line for line in axes.lines if len(line.get_xdata())]
            if not (lines or axes.images or axes.patches or axes.texts):
                axes.text(0.5, 0.5, f"no {runs} runs yet", transform=axes.transAxes, ha="center", color="#777777")


def alt_text(figure: Figure) -> str:
    """Return a figure's alternative text: its label (`figure.set_label`) or else its titles, axes and legends."""
    if figure.get_label():
        return figure.get_label()

    def joined(separator: str, *parts: str) -> str:
        return separator.join(filter(None, parts))

    drawn, shown, y = [], {}, ""
    for axes in figure.axes:
        y = axes.get_ylabel() or y  # panels that share an axis name it once
        drawn.append(joined(": ", axes.get_title(), joined(" against ", y, axes.get_xlabel())))
    for legend in filter(None, [*figure.legends, *(axes.get_legend() for axes in figure.axes)]):
        labels = "; ".join(text.get_text() for text in legend.get_texts())
        shown[f"Shown: {joined(': ', legend.get_title().get_text(), labels)}"] = None  # each once
    return " ".join(f"Figure: {joined('. ', figure.get_suptitle(), joined('; ', *drawn), *shown)}.".split())


def _describe_in_notebooks() -> None:
    """Make IPython store the alternative text of every figure that it displays, as metadata of the picture."""
    if (ipython := sys.modules.get("IPython")) and (shell := ipython.get_ipython()):
        describe = lambda figure, **_: ({}, {"image/png": {"alt": alt_text(figure)}})  # noqa: E731
        shell.display_formatter.mimebundle_formatter.for_type(Figure, describe)


_describe_in_notebooks()


def save(figure: Figure, name: str, profile: str) -> list[Path]:
    """Write NAME.pdf and NAME.png where the profile's figures go, as `save_in` does."""
    return save_in(figure, name, paths.figures(profile))


def save_in(figure: Figure, name: str, folder: Path) -> list[Path]:
    """Write NAME.pdf and NAME.png into a folder, which may be new; the same figure gives the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for kind, metadata in (("pdf", {"CreationDate": None}), ("png", {"Software": None})):
        path = folder / f"{name}.{kind}"
        # Resolution and fonts are looked up when a figure is written, so the context is needed again.
        with paths.replacing(path) as temporary, plt.style.context(SHEET):
            figure.savefig(drawn := BytesIO(), format=kind, metadata=metadata)
            temporary.write_bytes(drawn.getvalue())  # on a full disk, `savefig` hides why it failed
        written.append(path)
    plt.close(figure)  # or a notebook shows it twice: as the cell's value and as an open figure
    return written


# Drawn alike in several figures ---------------------------------------------------------------------------------------


def draw_means(axes, table: pd.DataFrame, x: str, label: str, of: str | None = None, **look) -> None:
    """Draw means over seeds against the column `x`, with bars from the smallest to the largest (see `told_apart`).

    of: the column of `table`, a row per run, to average; None if `table` has the columns mean, min and max already.
    """
    for points, name, style in told_apart(table, label, look):
        if of:
            points = points.groupby(x)[of].agg(["mean", "min", "max"]).reset_index()
        bars = [points["mean"] - points["min"], points["max"] - points["mean"]]
        axes.errorbar(points[x], points["mean"], yerr=bars, label=name, **style)


def told_apart(table: pd.DataFrame, label: str, look: dict) -> Iterator[tuple[pd.DataFrame, str, dict]]:
    """Yield groups of points, each with its label and look.

    Other laws, earlier recipes (`tables.described`) and rows of the quick profile, whose column `own` is true, are
    groups of their own.
    """
    table = described(table).assign(own=table.get("own", False))
    for (own, law, superseded), points in table.groupby(["own", "law", "superseded"]):
        name, style = label, {"alpha": 1, **look}
        if law != "ours":
            name += f", {law} law"
        if own:
            name, style = f"{name} (quick)", {**style, **HOLLOW}
        if superseded:
            name, style = f"{name}, earlier recipe", {**style, **EARLIER, "alpha": style["alpha"] * EARLIER["alpha"]}
        yield points, name, style


def side_by_side(points: pd.DataFrame) -> pd.Series:
    """Return x positions on a logarithmic axis that spread the seeds at each `n_facts` over 0.4 octaves around it."""
    seeds = points.groupby("n_facts").seed
    places = (seeds.rank(method="first") - 1) / (seeds.transform("size") - 1) - 0.5
    return points.n_facts * 2 ** (0.4 * places.fillna(0))  # 0 / 0: a single seed


def smallest(table: pd.DataFrame, mode: str, threshold: float) -> pd.DataFrame:
    """Return the points of `summaries.minimal_parameters` that are known for a mode and threshold, as `draw_means`
    takes them."""
    known = table.query("mode == @mode and recall_threshold == @threshold").dropna(subset="min_params_mean")
    return known.sort_values("n_facts", kind="stable").rename(columns=lambda name: name.removeprefix("min_params_"))


def shared_legend(figure: Figure, panels, **look) -> None:
    """Draw one legend of all that panels have labels for, each label once; none if there is nothing."""
    entries = {}
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        entries |= zip(labels, handles, strict=True)
    if entries:
        n_columns = len(entries) if "lower" in look["loc"] else 1
        figure.legend(entries.values(), entries, ncols=n_columns, **look)


def published_label(n_facts: pd.Series, about: str = "", kind: str = "independent facts") -> str:
    """Return the label of published points: `about`, how many facts, and by which law the database was drawn."""
    span = " to ".join(f"{n:,}" for n in dict.fromkeys([n_facts.min(), n_facts.max()]))
    return ", ".join(filter(None, [about, f"published: {span} {kind}"]))


def draw_bits_lines(axes, power: int, color: str, offset: int) -> tuple[float, float]:
    """Draw y = x * bits**power from end to end of the x axis for 1 and 2 bits per parameter; return both ends.

    Each line is named at its right end, `offset` points beside it.
    """
    x = axes.get_xlim()
    note = {"color": "#555555", "fontsize": 7, "textcoords": "offset points", "xytext": (offset, 0), "va": "center"}
    for bits, name in ((1, "1 bit"), (2, "2 bits")):
        y = [end * bits**power for end in x]
        axes.plot(x, y, color=color, linewidth=0.9, zorder=1)
        axes.annotate(f"{name} per parameter", (x[1], y[1]), annotation_clip=False, **note)
    axes.set_xlim(x)
    return x


def log_ticks(axis: Axis, values: pd.Series) -> None:
    """Label powers of ten and, where these are too few, 2 and 5 times as much."""
    values = values[values > 0]
    if len(values) and values.max() < 30 * values.min():
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_formatter(NullFormatter())


def shades(n: int) -> list[tuple[float, ...]]:
    """Return `n` colors, from dark to light."""
    return [plt.get_cmap("viridis")(shade) for shade in np.linspace(0, 0.85, n)]
