"""Figures of moments while a model trains, and of a chat model's recall."""

from itertools import cycle

import pandas as pd
from matplotlib.figure import Figure

from lib.figures.style import BESIDE, STYLES, panels, shades, shared_legend

#: The moments that probes record, and their scales: near zero "symlog" is linear, kurtosis spans orders of magnitude.
_SCALES = {"mean": "linear", "std": "log", "skew": "linear", "kurtosis": "symlog"}


def probes(rows: list[dict]) -> Figure:
    """Draw moments of activations (above) and of the loss's gradient there (below) over steps, a line per tensor.

    rows: what a run wrote to probes.jsonl. Drawn are the residual stream and what is read from it: the embedding, the
    sum after each block, the last norm and the logits.
    """
    table = pd.DataFrame(rows, columns=["step", "tensor", "of", *_SCALES])
    names = [name for name in table.tensor.unique() if name.count(".") <= 1]
    size, rc = (9.6, 4.2), {"lines.markersize": 3, "lines.linewidth": 1}
    with panels(size, 2, len(_SCALES), rc, sharex=True) as (figure, grid):
        for of, line in zip(("output", "gradient"), grid, strict=True):
            for (moment, scale), axes in zip(_SCALES.items(), line, strict=True):
                for color, marker, name in zip(shades(len(names)), cycle("osD^v"), names, strict=False):
                    chosen = table.query("tensor == @name and of == @of")
                    axes.plot(chosen.step, chosen[moment].astype(float), color=color, marker=marker, label=name)
                axes.set(yscale=scale)
                axes.set_title(f"{moment} of the {of}", fontsize=9)
        for axes in grid[-1]:
            axes.set_xlabel("steps")
        shared_legend(figure, grid[0], loc="outside right center")
    return figure


def recall_by_phrasing(table: pd.DataFrame, model: str) -> Figure:
    """Draw a chat model's recall in each phrasing, with 95% intervals; table: `lib.finetune.ask.recall_by_phrasing`."""
    looks = {"closed-book": STYLES["in-weight"], "tools": STYLES["in-tool"]}
    with panels((5.2, 1.2 + 0.24 * table.phrasing.nunique())) as (figure, axes):
        for protocol, rows in table.groupby("protocol", sort=False):
            bars, look = [rows.recall - rows.low, rows.high - rows.recall], looks.get(protocol, {"marker": "^"})
            axes.errorbar(rows.recall, rows.phrasing, xerr=bars, label=protocol, linestyle="none", **look)
        axes.invert_yaxis()  # the first phrasing above
        axes.set(title=model.replace("$", r"\$"), xlabel="recall", ylabel="phrasing", xlim=(-0.03, 1.03))
        axes.legend(**BESIDE)
    return figure
