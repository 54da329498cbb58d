"""Captions say what the rows say: counted here by hand, and by reading the committed tables with csv."""

import csv
import json
import re

import pandas as pd
import pytest
from finished import FINISHED
from matplotlib import pyplot as plt

from lib import paths
from lib.experiments.plan import searches
from lib.experiments.rows import sweep_dir
from lib.figures import record, style

ROWS = pd.DataFrame(
    [
        ("laptop", "a", 2, "2026-01-31T23:59:59+00:00", "0123456789" * 4),
        ("laptop", "b", 0, "2025-12-01T00:00:00+00:00", "abcdef0123" * 4 + "-dirty"),
        ("laptop", "c", 0, "2026-01-02T00:00:00+00:00", "0123456789" * 4),
        ("quick", "d", 1, "2026-02-01T00:00:00+00:00", "unknown"),
    ],
    columns=["profile", "run_id", "seed", "finished_at", "commit"],
)


def test_provenance_counts_runs_and_names_seeds_days_and_commits():
    assert record.provenance(ROWS) == (
        "This repository (laptop): 3 runs, seeds 0, 2, 2025-12-01 to 2026-01-31, commits 0123456, abcdef0-dirty. "
        "This repository (quick): 1 run, seed 1, 2026-02-01, commit unknown."
    )
    assert record.provenance(pd.DataFrame()) == "This repository: no runs yet."


def test_every_figure_has_a_caption_and_only_published_points_are_called_published():
    for name in record.FIGURES:
        drawn = style.alt_text(record.draw(name, "laptop"))
        has_published = "ublished" in drawn or name == "recall_vs_parameters"  # there in grey, without a name
        assert has_published == ("Published: Houliston" in record.caption(name, "laptop")), name


def test_a_caption_is_of_the_committed_rows():
    with (paths.PAPER_DATA / "parameter_bounds.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["profile"] == "laptop" and row["mode"] == "in-weight"]
    focal = [row for row in rows if '"focal"' in row["config"]]
    today = [row for row in focal if int(row["n_facts"]) < 2048 or '"muon_lr":0.01' in row["config"]]
    shown, sizes = [], set()
    for recipe in (today, focal, rows):  # of each size, the newest recipe that has it
        shown += [row for row in recipe if (row["n_facts"], row["d_model"]) not in sizes]
        sizes = {(row["n_facts"], row["d_model"]) for row in shown}
    text = record.caption("bits_stored", "quick")
    counts = re.findall(r"\(laptop(?:, earlier recipe)?\): ([\d,]+) runs?", text)
    assert sum(int(count.replace(",", "")) for count in counts) == len(shown)
    assert all(row["commit"][:7] in text for row in shown)
    assert all(end(row["finished_at"][:10] for row in shown) in text for end in (min, max))


@pytest.mark.parametrize(
    ("name", "section", "counts"),
    [
        ("parameter_bounds", "05_1", 1),
        ("bits_stored", "05_1", 0),
    ],
)
def test_what_a_profile_adds_is_told_where_it_is_drawn(name, section, counts, tmp_path, monkeypatch):
    monkeypatch.setenv("ITL_RUNS", str(tmp_path))
    search = searches(section, "quick")[0]
    config = search.config(search.sizes[0])
    folder = sweep_dir(section, "quick") / config.run_id
    folder.mkdir(parents=True)
    row = FINISHED | {"run_id": config.run_id, "mode": config.mode, "n_facts": 16, "alpha": 0.0, "seed": 0}
    row |= {"d_model": config.model.d_model, "n_params": config.model.n_params, "recall": 1.0, "trained_right_name": 1}
    row |= {"finished_at": "2026-03-04T00:00:00+00:00", "commit": "unknown"}
    (folder / "row.json").write_text(json.dumps(row))
    assert ("(quick)" in style.alt_text(record.draw(name, "quick"))) == bool(counts)
    assert record.caption(name, "quick").count("This repository (quick): 1 run, seed 0, 2026-03-04") == counts


def test_a_figure_is_shown_above_its_caption_and_saved_if_asked(tmp_path, monkeypatch):
    monkeypatch.setenv("ITL_RUNS", str(tmp_path))
    shown = []
    monkeypatch.setattr(record, "display", lambda *values: shown.extend(values))
    record.show("parameter_bounds", "quick", save=False, threshold=0.9)
    assert not (tmp_path / "quick").exists()
    record.show("parameter_bounds", "quick")
    assert (tmp_path / "quick" / "figures" / "parameter_bounds.pdf").is_file()
    assert [type(value).__name__ for value in shown] == ["Figure", "Markdown"] * 2
    assert shown[1].data == f"*{record.caption('parameter_bounds', 'quick', threshold=0.9)}*"


def test_a_figure_that_was_shown_is_not_left_open_for_the_notebook_to_show_again():
    record.show("parameter_bounds", "laptop", save=False)
    assert plt.get_fignums() == []
