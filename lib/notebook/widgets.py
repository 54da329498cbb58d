"""Things to play with in a notebook, and the picture that stands in for them where no kernel runs."""

import base64
import io
from collections.abc import Callable
from html import escape
from typing import Any

import ipywidgets
import numpy as np
from IPython.display import display
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lib.config import ModelConfig
from lib.experiments import summaries, tables
from lib.experiments.published import published_by_paper, published_correlated
from lib.experiments.search import SIZES
from lib.facts.entropy import bits_per_person, entropy_bits_per_person
from lib.facts.people import RELEASED
from lib.figures import from_scratch
from lib.figures.style import alt_text
from lib.progress import is_watched

_VIEW = "application/vnd.jupyter.widget-view+json"
#: Hides the output above the one that holds a live widget.
_HIDE = "<style>.jp-OutputArea-child:has(+ .jp-OutputArea-child .itl-live) { display: none }</style>"


def show(widget: ipywidgets.Widget, still: Any) -> None:
    """Display `still` and, where somebody is there to use it, `widget` in its place.

    Both are outputs of the cell, so that the first is saved with the notebook: GitHub and HTML show it, and it is left
    when the kernel is gone. Only while the widget lives it hides the first.
    """
    display(still)
    if is_watched():
        live = ipywidgets.VBox([ipywidgets.HTML(_HIDE), widget])
        live.add_class("itl-live")
        view = {"version_major": 2, "version_minor": 0, "model_id": live.model_id}
        display({_VIEW: view, "text/plain": "Run this cell in JupyterLab to use it."}, raw=True)


def explore(draw: Callable[..., Figure], **controls: ipywidgets.Widget) -> None:
    """Display the figure that `draw` makes of the controls' values, with the controls: it follows them (see `show`)."""
    picture = ipywidgets.HTML()

    def follow(_=None) -> Figure:
        figure = draw(**{name: control.value for name, control in controls.items()})
        picture.value = image(figure)
        plt.close(figure)  # or the notebook would show it a second time
        return figure

    for control in controls.values():
        control.observe(follow, "value")
    still = follow()
    show(ipywidgets.VBox([*controls.values(), picture]), still)


def image(figure: Figure) -> str:
    """A figure as HTML with its alternative text."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    source = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="{escape(alt_text(figure))}" src="data:image/png;base64,{source}" style="max-width: 100%">'


# What is explored -----------------------------------------------------------------------------------------------------


def smallest_model(bits: float, bits_per_parameter: float) -> tuple[int, int] | None:
    """d_model and parameters of the smallest of the paper's models that could hold `bits`; None if none of them can."""
    sizes = ((size, ModelConfig(d_model=size).n_params) for size in SIZES)
    return next((found for found in sizes if found[1] * bits_per_parameter >= bits), None)


def _named(model: tuple[int, int] | None) -> str:
    return "the smallest model is d = {} ({:,} parameters)".format(*model) if model else "no model is large enough"


def explore_capacity(profile: str, threshold: float = 0.95) -> None:
    """Section 5.1 to play with: facts and bits a parameter, and the smallest model that could do, beside the points."""
    tables.check_threshold(threshold)
    published, ours = published_by_paper("parameter_bounds"), summaries.bounds(tables.publishing_profile(profile))
    counts = 2 ** np.arange(6, 19)

    def draw(facts: int, bits: float) -> Figure:
        figure = from_scratch.parameter_bounds(published, ours, threshold=threshold)
        (axes,) = figure.axes
        held = facts / 4 * bits_per_person()
        _mark(axes, (counts, counts / 4 * bits_per_person() / bits), (facts, held / bits), bits)
        axes.set_title(f"{facts:,} facts, {held:,.0f} bits: {_named(smallest_model(held, bits))}", fontsize=9)
        return figure

    explore(draw, facts=_choice("facts", counts.tolist(), 4096), bits=_slider("bits a parameter", 2, (0.25, 4, 0.25)))


def explore_correlation(profile: str, threshold: float = 0.95) -> None:
    """Section 5.3 to play with: correlation, and the bits and parameters that follow, for the published databases."""
    tables.check_threshold(threshold)
    published = published_correlated()
    ours = summaries.compressibility_bounds(tables.publishing_profile(profile))

    def draw(facts: int, alpha: float, bits: float) -> Figure:
        alphas = np.union1d(published.alpha, alpha)
        held = np.array([facts // 4 * entropy_bits_per_person(facts // 4, 0, float(a), RELEASED) for a in alphas])
        now = float(held[alphas == alpha][0])
        figure = from_scratch.compressibility(published, ours, None, threshold)
        by_alpha, by_entropy = figure.axes
        _mark(by_alpha, (alphas, held / bits), (alpha, now / bits), bits)
        _mark(by_entropy, (held, held / bits), (now, now / bits), bits)
        by_alpha.legend(fontsize=7)
        figure.suptitle(
            f"{facts:,} facts, alpha = {alpha:g}: {4 * now / facts:.1f} bits a person, {now:,.0f} in all: "
            f"{_named(smallest_model(now, bits))}",
            fontsize=9,
        )
        return figure

    explore(
        draw,
        facts=_choice("facts", sorted(published.n_facts.unique().tolist()), 4000),
        alpha=_slider("correlation", 0.5, (0, 1, 0.05)),
        bits=_slider("bits a parameter", 2, (0.25, 4, 0.25)),
    )


def _mark(axes: Axes, line: tuple, point: tuple[float, float], bits: float) -> None:
    """What the bits take at so many bits a parameter, as a line and, where the controls stand, a star."""
    color = "#009E73"
    axes.plot(*line, color=color, linestyle="--", linewidth=1.2, label=f"the bits, {bits:g} a parameter")
    axes.plot(*point, color=color, marker="*", markersize=13, markeredgecolor="white", zorder=5)
    axes.legend(fontsize=7.5)


def _choice(name: str, options: list[int], value: int) -> ipywidgets.SelectionSlider:
    labelled = [(f"{option:,}", option) for option in options]
    return ipywidgets.SelectionSlider(options=labelled, value=value, description=name, **_LOOK)


def _slider(name: str, value: float, span: tuple[float, float, float]) -> ipywidgets.FloatSlider:
    low, high, step = span
    return ipywidgets.FloatSlider(value=value, min=low, max=high, step=step, description=name, **_LOOK)


#: A figure takes a fifth of a second: it is drawn when the slider is let go.
_LOOK = {"continuous_update": False, "style": {"description_width": "9em"}, "layout": {"width": "30em"}}
