"""The figure of our Section 7.2: recall against the number of hops."""

import re

import pandas as pd
from matplotlib.figure import Figure

from lib.experiments.chains import ASKED
from lib.figures.style import STYLES, draw_means, panels

_LOOKS = {"trained": STYLES["in-tool"], "unseen": {"color": "#009E73", "marker": "D", "linestyle": "--"}}


def recall_by_hops(rows: pd.DataFrame) -> Figure:
    """Draw the share of questions answered correctly against their hops: mean over runs, bars from smallest to largest.

    rows: of runs trained on the same hops, as `lib.experiments.chains.run_chains` gives them. Grey: hops trained on.
    """
    with panels((5.2, 3.2), runs="in-tool") as (figure, axes):
        axes.set(xlabel="hops of the question", ylabel="recall", ylim=(-0.04, 1.06), xticks=ASKED)
        if not len(rows):
            return figure
        for group, look in _LOOKS.items():
            shares = rows[[f"{group}_{hops}" for hops in ASKED]].set_axis(ASKED, axis="columns")
            draw_means(axes, shares.melt(var_name="hops"), "hops", f"{group} people", of="value", **look)
        trained = [*map(int, re.findall(r"\d", str(rows.hops.iloc[0])))]  # a table has the list as text
        axes.axvspan(min(trained) - 0.3, max(trained) + 0.3, color="#EEEEEE", zorder=0, label="trained on")
        axes.legend()
    return figure
