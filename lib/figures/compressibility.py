"""The figure of Section 5.3: parameters needed where facts are correlated."""

from itertools import cycle

import pandas as pd
from matplotlib.figure import Figure

from lib.figures.style import STYLES, draw_bits_lines, draw_means, log_ticks, panels, published_label, smallest


def compressibility(points: pd.DataFrame, published: pd.DataFrame, threshold: float = 0.95) -> Figure:
    """Draw parameters needed against the correlation of facts, and against the entropy of the database (Section 5.3).

    points: as `summaries.compressibility_bounds` gives them. published: the paper's, a line per number of facts, at the
    entropy of databases of the released law. Both have a column entropy_bits.
    """
    with panels((8.6, 3.4), 1, 2, sharey=True) as (figure, (by_alpha, by_entropy)):
        published = published[published.recall_threshold == threshold]
        for (_, theirs), line in zip(published.groupby("n_facts"), cycle(("-", "--")), strict=False):
            style = {"color": "#888888", "linestyle": line, "marker": "."}
            label = published_label(theirs.n_facts, kind="facts, released law")
            by_alpha.plot(theirs.alpha, theirs.min_params, label=label, **style)
            by_entropy.plot(theirs.entropy_bits, theirs.min_params, **style)
        for shade, (n_facts, ours) in enumerate(smallest(points, "in-weight", threshold).groupby("n_facts")):
            for axes, x in ((by_alpha, "alpha"), (by_entropy, "entropy_bits")):
                look = {**STYLES["in-weight"], "alpha": max(0.4, 1 - 0.3 * shade)}
                draw_means(axes, ours, x, f"{n_facts:,} facts, this repository", **look)
        by_alpha.set(xlabel="correlation alpha", ylabel=f"parameters needed for {threshold:.0%} recall", yscale="log")
        by_entropy.set(xlabel="entropy of the database, bits", xscale="log")
        low, high = by_entropy.get_xlim()
        ends = {bits: (low / bits, high / bits) for bits in (1, 2)}
        draw_bits_lines(by_entropy, ends, "#BBBBBB", xytext=(3, 0), ha="left", va="center")
        by_entropy.xaxis.set_major_formatter("{x:,.0f}")
        log_ticks(by_entropy.xaxis, pd.Series([low, high]))
        by_alpha.legend(handlelength=3.5)
    return figure
