"""Widgets of the notebooks, and the picture that stands in for them where no kernel runs."""

from collections.abc import Callable, Sequence
from functools import partial
from html import escape
from typing import Any

import ipywidgets
import numpy as np
from IPython.core.pylabtools import print_figure
from IPython.display import display
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from lib.config import ModelConfig
from lib.experiments import tables
from lib.experiments.plan import SIZES
from lib.experiments.published import published_correlated
from lib.facts.entropy import bits_per_person, entropy_bits_per_person
from lib.facts.people import ATTRIBUTES, RELEASED
from lib.figures.record import FIGURES
from lib.figures.style import alt_text
from lib.progress import is_watched

#: Hides the output above the one that holds a live widget.
_HIDE = "<style>.jp-OutputArea-child:has(+ .jp-OutputArea-child .itl-live) { display: none }</style>"


def show(widget: ipywidgets.Widget, still: Any) -> None:
    """Display `still` and, where somebody is there to use it, `widget` in its place.

    Both are outputs of the cell: `still` is saved with the notebook and shown by GitHub, in HTML, and when the kernel
    is gone; it is hidden only while the widget is live.
    """
    display(still)
    if is_watched():
        live = ipywidgets.VBox([ipywidgets.HTML(_HIDE), widget])
        live.add_class("itl-live")
        display(live)


def explore(draw: Callable[..., Figure], **controls: ipywidgets.Widget) -> None:
    """Display the figure that `draw` makes of the controls' values, with the controls, and draw it again when they
    change (see `show`)."""
    picture = ipywidgets.HTML()

    def follow(_=None) -> Figure:
        figure = draw(**{name: control.value for name, control in controls.items()})
        source = print_figure(figure, bbox_inches=None, base64=True)
        alt = escape(alt_text(figure))
        picture.value = f'<img alt="{alt}" src="data:image/png;base64,{source}" style="max-width: 100%">'
        plt.close(figure)  # or the notebook would show it a second time
        return figure

    for control in controls.values():
        control.observe(follow, "value")
    still = follow()
    show(ipywidgets.VBox([*controls.values(), picture]), still)


# The explorers of Sections 5.1 and 5.3 --------------------------------------------------------------------------------


def smallest_model(bits: float, bits_per_parameter: float) -> tuple[int, int] | None:
    """Return d_model and parameters of the smallest of the paper's models that could hold `bits`; None if none can."""
    sizes = ((size, ModelConfig(d_model=size).n_params) for size in SIZES)
    return next((found for found in sizes if found[1] * bits_per_parameter >= bits), None)


def explore_capacity(profile: str, threshold: float = 0.95) -> None:
    """Show Section 5.1's figure, the bits of a number of facts, and the smallest model that could hold them."""
    counts = 2 ** np.arange(6, 19)
    held = counts / len(ATTRIBUTES) * bits_per_person()
    figure_of = _with_tables("parameter_bounds", profile, threshold)

    def draw(facts: int, bits: float) -> Figure:
        figure = figure_of()
        told = _mark(figure, [counts], held, counts == facts, bits)
        figure.axes[0].set_title(f"{facts:,} facts, {told}", fontsize=9)
        return figure

    explore(draw, facts=_choice("facts", counts.tolist(), 4096), bits=_bits())


def explore_correlation(profile: str, threshold: float = 0.95) -> None:
    """Show Section 5.3's figure, and the bits and the smallest model that follow from a correlation."""
    figure_of = _with_tables("compressibility", profile, threshold)

    def draw(facts: int, alpha: float, bits: float) -> Figure:
        alphas = np.union1d(published_correlated().alpha, alpha)
        n_people = facts // len(ATTRIBUTES)
        each = np.array([entropy_bits_per_person(n_people, 0, float(a), RELEASED) for a in alphas])
        figure = figure_of()
        told = _mark(figure, [alphas, n_people * each], n_people * each, alphas == alpha, bits)
        person = f"{each[alphas == alpha][0]:.1f} bits a person"
        figure.suptitle(f"{facts:,} facts, alpha = {alpha:g}: {person}, {told}", fontsize=9)
        return figure

    alpha = ipywidgets.FloatSlider(0.5, min=0, max=1, step=0.05, description="correlation", **_LOOK)
    explore(draw, facts=_choice("facts", [4000, 32_768], 4000), alpha=alpha, bits=_bits())


def _with_tables(name: str, profile: str, threshold: float) -> Callable[[], Figure]:
    """Return a function that draws a figure, from tables that are read only once."""
    tables.check_threshold(threshold)
    figure = FIGURES[name]
    return partial(
        figure.draw,
        figure.points(figure.rows(tables.publishing_profile(profile))),
        figure.published(),
        threshold=threshold,
    )


def _mark(figure: Figure, xs: Sequence[np.ndarray], held: np.ndarray, now: np.ndarray, bits: float) -> str:
    """Draw the parameters that `held` bits need at `bits` per parameter, and a star at the values of the controls.

    xs: x-coordinates, by panel. now: mask of the controls' point. Return its bits and model in words.
    """
    needed, color = held / bits, "#009E73"
    for axes, x in zip(figure.axes, xs, strict=True):
        axes.plot(x, needed, color=color, linestyle="--", linewidth=1.2, label=f"all bits, {bits:g} per parameter")
        axes.plot(x[now], needed[now], color=color, marker="*", markersize=13, markeredgecolor="white", zorder=5)
    for legend in filter(None, [*figure.legends, *(axes.get_legend() for axes in figure.axes)]):
        legend.remove()  # it lacks the new line
    look = {"loc": "outside lower center", "ncols": 2, "fontsize": 6.5, "frameon": False, "columnspacing": 1}
    figure.legend(*figure.axes[0].get_legend_handles_labels(), **look)
    model = smallest_model(held[now][0], bits)
    size = "d = {} ({:,} parameters)".format(*model) if model else "no model of the paper"
    return f"{held[now][0]:,.0f} bits: the bound allows {size}"


#: A figure takes a fifth of a second: it is drawn when the slider is let go.
_LOOK = {"continuous_update": False, "style": {"description_width": "9em"}, "layout": {"width": "30em"}}


def _choice(name: str, options: list[int], value: int) -> ipywidgets.SelectionSlider:
    labelled = [(f"{option:,}", option) for option in options]
    return ipywidgets.SelectionSlider(options=labelled, value=value, description=name, **_LOOK)


def _bits() -> ipywidgets.FloatSlider:
    return ipywidgets.FloatSlider(2, min=0.25, max=4, step=0.25, description="bits per parameter", **_LOOK)
