"""Ours beside the published figures: the right points meet, and the committed tables follow from the committed rows."""

import pandas as pd
import pytest

from lib.base import InputError
from lib.config import ModelConfig
from lib.experiments import published, summaries
from lib.experiments.published import compare, published_by_paper


def _row(**fields) -> dict:
    row = {"mode": "in-weight", "n_facts": 32, "alpha": 0.0, "seed": 0, "recall": 0.5, **fields}
    return {**row, "n_params": ModelConfig(d_model=row["d_model"]).n_params}


def test_bounds_stand_beside_the_published_ones_where_both_have_a_point(monkeypatch):
    rows = [
        _row(n_facts=32, d_model=4, recall=0.2),
        _row(n_facts=32, d_model=8, recall=1.0),
        _row(n_facts=64, d_model=8, recall=0.3),  # no size that does
        _row(n_facts=33, d_model=4, recall=1.0),  # not published
    ]
    monkeypatch.setattr(summaries, "bounds_rows", lambda profile: pd.DataFrame(rows))
    found = compare("05_1", "laptop").query("recall_threshold == 0.95")
    theirs = published_by_paper("parameter_bounds").query("recall_threshold == 0.95 and n_facts == 32")
    theirs = float(theirs[theirs["mode"] == "in-weight"].min_params_mean.iloc[0])
    (row,) = found.to_dict("records")
    assert (row["mode"], row["n_facts"], row["ours"], row["seeds"]) == ("in-weight", 32, 6248, 1)
    assert row["published"] == theirs and row["ratio"] == pytest.approx(6248 / theirs)


def test_compressibility_stands_beside_the_published_sizes(monkeypatch):
    rows = pd.DataFrame(
        _row(n_facts=4000, alpha=alpha, d_model=d, recall=float(d >= enough))
        for alpha, enough in ((0.0, 32), (1.0, 24))
        for d in (20, 24, 28, 32)
    )
    monkeypatch.setattr(published.tables, "read_rows", lambda section, profile: rows if section == "05_3" else None)
    found = compare("05_3", "laptop").query("recall_threshold == 0.95").set_index("alpha")
    assert found.ratio[0.0] == 1.0 and found.ratio[1.0] == pytest.approx(31_032 / 23_300)


def test_unseen_people_stand_beside_the_published_ones_in_the_mean_over_seeds(monkeypatch):
    rows = pd.DataFrame([
        _row(mode="in-tool", n_facts=1024, d_model=24, seed=0, new_first_recall=0.25),
        _row(mode="in-tool", n_facts=1024, d_model=24, seed=1, new_first_recall=0.75),
        _row(mode="in-tool", n_facts=1024, d_model=20, seed=0, new_first_recall=0.5),  # not a published size
    ])  # fmt: skip
    monkeypatch.setattr(summaries, "generalization_rows", lambda profile: rows)
    (row,) = compare("05_2", "laptop").to_dict("records")
    assert (row["n_params"], row["ours"], row["seeds"], row["published"]) == (31_032, 0.5, 2, 0.025)
    assert row["ratio"] == pytest.approx(20) and row["ours_std"] == pytest.approx(0.3536, abs=1e-4)


@pytest.mark.parametrize("section", published.SECTIONS)
def test_without_rows_nothing_is_compared_and_nothing_written(section, paper_data):
    assert len(published.write(section)) == 0 and not list(paper_data.iterdir())


def test_what_has_no_published_points_is_one_sentence():
    with pytest.raises(InputError, match="'05_9' among those with published points: there are 05_1, 05_2"):
        compare("05_9", "laptop")


def test_the_committed_comparisons_are_those_of_the_committed_rows():
    for section in published.SECTIONS:
        tables = [compare(section, profile).assign(profile=profile) for profile in published.PROFILES]
        now = pd.concat(tables, ignore_index=True)
        if len(now):
            committed = pd.read_csv(published.path(section))[now.columns]
            pd.testing.assert_frame_equal(committed, now, check_dtype=False, rtol=1e-5)
        else:
            assert not published.path(section).exists()
