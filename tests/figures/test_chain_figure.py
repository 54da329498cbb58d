"""The figure of chains shows the rows."""

import pandas as pd
import pytest

from lib.figures.chains import recall_by_hops
from lib.figures.style import alt_text


def test_means_over_seeds_have_bars_from_the_least_to_the_most():
    shares = {f"{group}_{hops}": [1.0 / hops, 0.5 / hops] for group in ("trained", "unseen") for hops in (1, 2, 3)}
    figure = recall_by_hops(pd.DataFrame({**shares, "hops": [[1, 2]] * 2}))
    for container in figure.axes[0].containers:
        line, _, (bars,) = container
        assert line.get_ydata() == pytest.approx([0.75, 0.375, 0.25])
        assert [tuple(bar[:, 1]) for bar in bars.get_segments()] == [
            pytest.approx((0.5 / hops, 1 / hops)) for hops in (1, 2, 3)
        ]
    assert "trained people; unseen people" in alt_text(figure)


def test_without_runs_the_figure_says_so():
    (axes,) = recall_by_hops(pd.DataFrame()).axes
    assert [text.get_text() for text in axes.texts] == ["no in-tool runs yet"]
