"""Figures of Section 7.1: they show the means of the rows, and can be drawn before there are any."""

import pandas as pd
import pytest

from lib.experiments.edited_models import LETTERS
from lib.experiments.rows import table_path
from lib.facts.sampling import UNSEEN
from lib.figures import edits as figures

COLUMNS = pd.read_csv(table_path("07_1"), nrows=0).columns
ABOUT = {
    "profile": "laptop",
    "run_id": "a",
    "n_facts": 1024,
    "repeats": True,
    "finished_at": "2026-11-29",
    "commit": "c",
}


def rows(*measured: dict) -> pd.DataFrame:
    return pd.concat([pd.DataFrame(columns=COLUMNS), pd.DataFrame([ABOUT | row for row in measured])])


@pytest.mark.parametrize("draw", [figures.edits, figures.contested, figures.forgiving])
def test_without_rows_an_empty_figure_is_drawn(draw):
    table = pd.DataFrame(columns=COLUMNS)
    draw(table).draw_without_rendering()


def test_changes_are_drawn_as_means_over_seeds():
    change = {"experiment": "change", "mode": "in-weight", "method": "train on them", "recall_edited": 1.0}
    table = rows(
        *({**change, "n_edited": n, "seed": seed, "seconds": 2.0 * n + seed, "recall_others": 1 / n - 0.25 * seed,
           "done": n + seed < 3}
          for n in (1, 2) for seed in (0, 1)),
        {"experiment": "delete", "mode": "in-weight", "method": "nothing", "asked": "at once", "seed": 0, "memory": 0.9,
         "never_memory": 0.1, "guess": 0.05},
    )  # fmt: skip
    cost, harm, success, memory = figures.edits(table).axes
    assert cost.lines[0].get_xydata().tolist() == [[1, 2.5], [2, 4.5]]
    assert harm.lines[0].get_xydata().tolist() == [[1, 0.875], [2, 0.375]]
    assert success.lines[0].get_xydata().tolist() == [[1, 1.0], [2, 1.0]]
    (hollow,) = (line for line in cost.lines if len(line.get_xdata()) and line.get_markerfacecolor() == "white")
    assert hollow.get_xydata().tolist() == [[2, 4.5]]  # one of its seeds was cut off
    assert [line.get_xdata()[0] for line in memory.lines] == [0.9, 0.1]
    assert memory.collections[0].get_segments()[0][:, 0].tolist() == [0.05, 0.05]
    assert [label.get_text() for label in memory.get_yticklabels()] == ["in-weight: before"]


def test_what_a_forgiving_tool_gains_and_costs_is_drawn_by_kind_of_person():
    table = rows(*(
        {"experiment": "forgive", "mode": "in-tool", "method": f"{n} letters", "who": who, "seed": 0,
         "recall": i / 10 + n / 100, "wrong": n / 50}
        for i, who in enumerate(UNSEEN) for n in LETTERS
    ))  # fmt: skip
    for i, axes in enumerate(figures.forgiving(table).axes):
        recall, wrong = (line.get_ydata() for line in axes.lines if line.get_linestyle() in ("-", ":"))
        assert recall == pytest.approx([i / 10 + n / 100 for n in LETTERS])
        assert wrong == pytest.approx([n / 50 for n in LETTERS])


def test_shares_of_believing_answers_are_the_bars():
    contest = {"experiment": "contest", "mode": "in-tool", "who": "trained", "method": "another value"}
    table = rows(
        {**contest, "seed": 0, "follows": 0.5, "remembers": 0.25},
        {**contest, "seed": 1, "follows": 1.0, "remembers": 0.25},
    )
    (axes,) = figures.contested(table).axes
    assert [bar.get_width() for bar in axes.patches] == [0.75, 0.25]
