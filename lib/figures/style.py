"""How every figure looks, what it says to who cannot see it, and where it is written."""

import sys
from pathlib import Path

import matplotlib
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from lib import paths

#: Color-blind safe (Okabe and Ito) and apart in grey; a marker each, so that color is never the only difference.
STYLES = {
    "in-weight": {"color": "#D55E00", "marker": "o"},
    "in-tool": {"color": "#0072B2", "marker": "s"},
}

#: How points of a profile that does not publish are told from those that count.
HOLLOW = {"markerfacecolor": "white", "markersize": 7, "zorder": 4}

#: How points of runs that today's plan no longer asks for are told from those that it does.
EARLIER = {"markerfacecolor": "white", "alpha": 0.55}

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


def nothing_yet(axes, mode: str) -> None:
    axes.text(0.5, 0.5, f"no {mode} runs yet", transform=axes.transAxes, ha="center", color="#777777")
