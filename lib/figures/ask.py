"""The figure of `itl ask`: a chat model's recall."""

import pandas as pd
from matplotlib.figure import Figure

from lib.figures.style import BESIDE, STYLES, panels


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
