"""A plan that loses half of its searches loses no row, and no figure a point: on the committed tables and plans."""

import shutil
from collections import defaultdict

import numpy as np
import pandas as pd
import pytest
from matplotlib.container import ErrorbarContainer

from lib import paths
from lib.experiments import publishing, summaries, tables
from lib.experiments.plan import searches
from lib.figures import record


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A copy of paper_data that may be published to."""
    shutil.copytree(paths.PAPER_DATA, tmp_path / "paper_data", ignore=shutil.ignore_patterns("checkpoints"))
    monkeypatch.setattr(paths, "PAPER_DATA", tmp_path / "paper_data")
    return tmp_path / "paper_data"


def _points(name: str) -> dict[tuple[int, str], set[tuple[float, float]]]:
    """What a figure draws of this repository: points by panel and label, whether of today's plan or of an earlier."""
    drawn = defaultdict(set)
    for panel, axes in enumerate(record.draw(name, "laptop").axes):
        handles, labels = axes.get_legend_handles_labels()
        for handle, label in zip(handles, labels, strict=True):
            if isinstance(handle, ErrorbarContainer):
                drawn[panel, label.removesuffix(", earlier recipe")] |= set(map(tuple, handle.lines[0].get_xydata()))
            elif handle.get_linestyle() == "None":  # a point a seed, beside the others of its number of facts
                at = {(2 ** round(np.log2(x)), y) for x, y in handle.get_xydata()}
                drawn[panel, label.removesuffix(", earlier recipe")] |= at
        if name == "bits_stored":
            drawn[panel, "runs"] = {tuple(xy) for line in axes.lines if line.get_marker() == "o"
                                    for xy in line.get_xydata()}  # fmt: skip
    return dict(drawn)


def _of_half_the_points(plan: list) -> list:
    points = sorted({(s.base.mode, s.base.facts.n_people, s.base.facts.alpha) for s in plan})
    return [s for s in plan if (s.base.mode, s.base.facts.n_people, s.base.facts.alpha) in points[::2]]


@pytest.mark.parametrize("left", [_of_half_the_points, lambda plan: []], ids=["half", "none"])
@pytest.mark.slow
def test_a_plan_that_loses_searches_loses_no_row_and_no_figure_a_point(published, monkeypatch, left):
    drawn = {name: _points(name) for name in record.FIGURES}
    rows = {section: tables.committed_rows(section) for section in tables.TABLES}
    assert sum(len(points) for of_figure in drawn.values() for points in of_figure.values()) > 200

    monkeypatch.setattr(tables, "searches", lambda *arguments: left(searches(*arguments)))
    for section, before in rows.items():
        assert publishing.table_of(section).add("laptop") == 0
        pd.testing.assert_frame_equal(tables.committed_rows(section), before)
    for name, points in drawn.items():
        assert _points(name) == points, name
        assert not points or "laptop, earlier recipe" in record.caption(name, "laptop")
    assert tables.read_rows("05_1", "laptop").superseded.any()


@pytest.mark.slow
def test_a_plan_without_half_of_the_seeds_still_draws_every_point_but_never_averages_recipes(published, monkeypatch):
    drawn = {name: _points(name) for name in record.FIGURES}
    monkeypatch.setattr(tables, "searches", lambda *a: [s for s in searches(*a) if s.base.seed == 0])
    of_seeds = summaries.minimal_parameters(summaries.bounds_rows("laptop"), [0.95])
    assert of_seeds[~of_seeds.superseded].seeds.max() == 1  # the other seeds of the recipe are not averaged with it
    for name, points in drawn.items():
        now = _points(name)
        assert {key: {x for x, _ in xy} for key, xy in now.items()} == {
            key: {x for x, _ in xy} for key, xy in points.items()
        }, name
