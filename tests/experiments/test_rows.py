"""Rows are typed where they are read: damage harms its own run alone, and a damaged table is one sentence."""

import json
import re

import pandas as pd
import pytest

from lib import paths
from lib.base import DamagedFile, InputError
from lib.config import FINISHED, RunConfig, read_row
from lib.experiments import summaries, sweep, tables
from lib.experiments.plan import searches
from lib.experiments.rows import known_rows, sweep_dir, table_path
from lib.paths import ROWS

ROW = json.loads((paths.CHECKPOINTS / "in-tool" / "row.json").read_text())
OTHERS = ["x", "0.5", [1], {"a": 1}, -1, 0, 0.5, 2, True, None, "", float("nan"), float("inf"), "[]", 10**400]
CONFIGS = ["[", "[]", "5", '{"facts":5}', '{"training":{"files":[1]}}', '{"seed":NaN}', '{"of":"another version"}']
SHARES, COUNTS = ("recall", "recall_occupation"), ("n_facts", "n_questions", "steps", "steps_budget")


@pytest.fixture
def two(paper_data):
    """The files of two finished runs of one plan."""
    run_ids = [run_id for search in searches("05_1", "smoke") for run_id in search.run_ids]
    files = [sweep_dir("05_1", "smoke") / run_id / "row.json" for run_id in run_ids[:2]]
    for file in files:
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(ROW))
    return files


def test_a_value_of_another_type_is_damage_and_whatever_passes_can_be_computed_with(tmp_path):
    passed = {name: [] for name in ROW}
    for name in ROW:
        for value in [*OTHERS, *CONFIGS]:
            (tmp_path / "row.json").write_text(json.dumps(ROW | {name: value}))
            try:
                passed[name].append(read_row(tmp_path / "row.json")[name])
            except DamagedFile as error:
                told = rf"row.json is damaged \(({name} is|it lacks {name}\))"
                assert name == "config" or re.search(told, str(error))
    assert all({*passed[name]} - {None} == {0, 0.5} for name in SHARES)
    assert all({*passed[name]} - {0} == {2} for name in COUNTS)
    assert passed["config"] == []
    rows = [ROW | {name: value, "profile": "smoke"} for name in ROW for value in passed[name]]
    assert len(tables.described(pd.DataFrame(rows))) == len(rows) > 200
    assert sweep._speed(rows, "cpu") > 0


def test_a_damaged_row_harms_its_own_run_alone(two, capsys):
    for changed in ({"recall": "x"}, {"recall": None}, {"steps": "x"}, {"config": "["}, {"n_facts": "a"}):
        two[0].write_text(json.dumps(ROW | changed))
        assert two[1].parent.name in known_rows("05_1", "smoke", searches("05_1", "smoke"))
        assert capsys.readouterr().err.startswith(f"skipped: {two[0]} is damaged (")
        assert sweep.sweep("05_1", "smoke", dry_run=True).done_before == 1
        assert len(tables.read_rows("05_1", "smoke")) == 1


def test_a_row_that_lacks_what_code_reads_of_every_run_is_damaged(tmp_path):
    for name in FINISHED:
        (tmp_path / "row.json").write_text(json.dumps({key: value for key, value in ROW.items() if key != name}))
        with pytest.raises(DamagedFile, match=f"it lacks {name}"):
            read_row(tmp_path / "row.json")


@pytest.mark.parametrize("content", ["[]", "[{}]", '[{"run_id":5}]', '[{"run_id":"a","recall":2}]', "[5]", "{}"])
def test_no_row_and_a_row_of_other_types_are_damage_of_its_file_alone(content, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ITL_RUNS", str(tmp_path))
    monkeypatch.setattr(paths, "PAPER_DATA", tmp_path)
    plan = [RunConfig(seed=seed) for seed in (0, 1)]
    files = [sweep_dir("07_2", "quick") / config.run_id / ROWS for config in plan]
    for file, text in zip(files, (content, '[{"run_id":"b","recall":0.5}]'), strict=True):
        file.parent.mkdir(parents=True)
        file.write_text(text.replace('"b"', f'"{plan[1].run_id}"'))
    rows = tables.rows_of_plan("07_2", "quick", plan)
    assert [*rows.run_id] == [plan[1].run_id] and [*rows.superseded] == [False]
    assert capsys.readouterr().err.startswith(f"skipped: {files[0]} is damaged (")


def test_a_damaged_table_is_one_sentence_with_its_row(two):
    """A cell of text where a number belongs, whichever column it is; or a configuration that is none."""
    whole = pd.DataFrame([ROW | {"profile": "smoke", "run_id": str(i), "next_smaller": 8} for i in range(3)])
    path, plan = table_path("05_1"), searches("05_1", "smoke")
    whole.to_csv(path, index=False)
    assert len(tables.committed_rows("05_1")) == 3
    damage = [*((name, "x") for name in whole.select_dtypes("number").columns), *(("config", each) for each in CONFIGS)]
    for name, value in damage:
        damaged = whole.astype({name: object})
        damaged.loc[1, name] = value
        damaged.to_csv(path, index=False)
        for read in (lambda: tables.committed_rows("05_1"), lambda: known_rows("05_1", "smoke", plan)):
            with pytest.raises(InputError, match=f"table {path}, which `git checkout` restores: cannot read row 2: "):
                read()


@pytest.mark.parametrize("published", [False, True], ids=["in runs", "in paper_data"])
def test_a_run_of_a_shared_section_counts_for_depth_and_heads_and_is_not_repeated(paper_data, published):
    plan = {
        (s.base.mode, s.base.model.n_layers, s.base.model.n_heads): s for s in searches("depth_and_heads", "laptop")
    }
    config = plan["in-tool", 2, 2].config(24)
    row = ROW | {"mode": "in-tool", "config": config.canonical_json(), "run_id": config.run_id, "recall": 0.75}
    if published:
        pd.DataFrame([row | {"profile": "laptop"}]).to_csv(table_path("05_2"), index=False)
    folder = sweep_dir("05_2", "laptop") / config.run_id
    folder.mkdir(parents=True)
    (folder / "row.json").write_text(json.dumps(row))
    report = sweep.sweep("depth_and_heads", "laptop", dry_run=True)
    assert (report.done_before, len(report.missing)) == (1, 17) and config not in report.missing
    (shown,) = summaries.rows_with_shared("depth_and_heads", "laptop").to_dict("records")
    assert (shown["run_id"], shown["recall"]) == (config.run_id, 0.75)
    assert len(tables.read_rows("depth_and_heads", "laptop")) == 0  # its own table does not repeat the row
