"""Section 7.1 on a model that cannot know a fact, the circuit of Section 4, and through a whole smoke run."""

import pytest
import torch

from lib import paths
from lib.base import InputError, WorkError
from lib.config import RunConfig
from lib.dialogs.tokenizers import ByteTokenizer
from lib.experiments import edited_models, edits
from lib.experiments.plan import searches
from lib.experiments.publishing import table_of
from lib.experiments.rows import sweep_dir
from lib.facts.sampling import sample_people
from lib.figures import edits as figures
from lib.model.circuit import Circuit
from lib.paths import ROWS, read_json, write_json
from lib.training.run import run
from lib.training.saved import Conversation, open_conversation


@pytest.fixture(scope="module")
def circuit(tmp_path_factory) -> edited_models.Scratch:
    config = RunConfig.parse({"mode": "in-tool", "facts": {"n_people": 12}})
    talk = Conversation(tmp_path_factory.mktemp("circuit"), Circuit().model(), config, ByteTokenizer(), None)
    return edited_models.Scratch(talk, "smoke")


def test_what_is_written_to_the_database_is_answered_and_nothing_else_changes(circuit):
    rows = list(edited_models.change(circuit))
    assert [row["n_edited"] for row in rows] == [1, 3]
    for row in rows:
        assert (row["recall_edited"], row["recall_others"], row["dialogs"]) == (1, 1, 0)


def test_nobody_answers_for_the_deleted_and_a_circuit_knows_nothing_by_heart(circuit):
    at_once, after_error = edited_models.delete(circuit)
    for row in (at_once, after_error):
        assert (row["recall_edited"], row["recall_others"]) == (0, 1)
        assert row["says_the_value"] == row["says_a_value"] == 0
    assert after_error["memory"] < 1


@pytest.mark.slow
def test_a_forgiving_tool_changes_nothing_for_who_copies_rightly(circuit):
    rows = list(edited_models.forgive(circuit))
    assert len(rows) == 5 * len(edited_models.LETTERS)
    assert all((row["recall"], row["wrong"]) == (1, 0) for row in rows)


def test_the_figure_knows_every_kind_of_result():
    assert sorted(figures.RESULTS) == sorted(edited_models.CONTESTED)


def test_other_values_are_other_and_of_the_same_attribute(circuit):
    for (_, attribute, value), other in zip(circuit.facts, circuit.other_values(circuit.facts), strict=True):
        assert other != value and other in circuit.people.columns[attribute]


def test_a_split_takes_every_fact_once(circuit):
    deleted, left = circuit.split_people(2)
    assert sorted(deleted + left) == sorted(circuit.facts)
    assert len({name for name, *_ in deleted}) == 2 and not ({n for n, *_ in deleted} & {n for n, *_ in left})


def test_a_model_trained_without_the_deleted_is_the_model_of_a_file_that_lacks_them(tmp_path):
    fields = {"facts": {"n_people": 4}, "model": {"d_model": 8}, "training": {"steps": 2}}
    fields["evaluation"] = {"every": None}
    config, people = RunConfig.parse(fields), sample_people(4)
    base = edited_models.Scratch(Conversation(tmp_path, None, config, ByteTokenizer(), None), "smoke")
    model, cost = base.retrained({people.names[1]})
    lines = [",".join(("name", *people.attributes)), *(",".join(row) for row in people.rows())]
    (tmp_path / "left.csv").write_text("\n".join(lines[:2] + lines[3:]), encoding="utf-8")
    run(RunConfig.parse(fields | {"facts": {"csv": str(tmp_path / "left.csv")}}), tmp_path / "run", device="cpu")
    with open_conversation(tmp_path / "run", device="cpu") as talk:
        torch.testing.assert_close(model.state_dict(), talk.model.state_dict(), rtol=0, atol=0)
    assert cost["steps"] == 2 and cost["dialogs"] == 2 * 3 * len(people.attributes)


@pytest.mark.slow
def test_a_smoke_run_measures_every_model_once(monkeypatch):
    rows = edits.run("smoke")
    planned = {run_id for search in searches(edits.SECTION, "smoke") for run_id in search.run_ids}
    assert {*rows.run_id} == planned and (rows.profile == "smoke").all()
    by_mode = rows.groupby("mode").experiment.unique().map(set)
    assert by_mode["in-tool"] == {"change", "delete", "contest", "forgive"}
    assert by_mode["in-weight"] == {"change", "delete"}
    shares = rows[
        ["recall_edited", "recall_others", "memory", "never_memory", "follows", "remembers", "recall", "wrong"]
    ]
    assert shares.melt().value.dropna().between(0, 1).all()
    assert (rows.wrong.dropna() + rows.recall.dropna() <= 1).all()
    times = {path: path.stat().st_mtime_ns for path in sweep_dir(edits.SECTION, "smoke").glob(f"*/{ROWS}")}
    edits.run("smoke")
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_rows_are_published_once_and_only_with_a_commit(paper_data):
    row = {"mode": "in-tool", "n_facts": 8, "seed": 0, "experiment": "change", "method": "m",
           "n_edited": 1, "asked": None, "who": None, "recall_others": 0.5, "finished_at": "2026-01-01",
           "commit": "a" * 40}  # fmt: skip
    (row["run_id"], *_), *_ = (search.run_ids for search in searches(edits.SECTION, "laptop"))
    path = sweep_dir(edits.SECTION, "laptop") / row["run_id"] / ROWS
    path.parent.mkdir(parents=True)
    write_json(path, [row, row | {"method": "n"}])
    assert table_of(edits.SECTION).add("laptop") == 2 and table_of(edits.SECTION).add("laptop") == 0
    assert read_json(path, list)[0]["recall_others"] == edits.rows("laptop").recall_others[0]
    paths.PAPER_DATA.joinpath("edits.csv").unlink()
    write_json(path, [row | {"commit": "unknown"}])
    with pytest.raises(InputError, match="not made by a clean commit"):
        table_of(edits.SECTION).add("laptop")


@pytest.fixture
def stored(paper_data):
    """A function that stores the rows of a run of the quick profile, as this text, and returns its id ("RUN" there)."""

    def store(content: str, run: str = "in-tool") -> str:
        run_id = read_json(paths.CHECKPOINTS / run / "row.json")["run_id"]
        path = sweep_dir(edits.SECTION, "quick") / run_id / ROWS
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content.replace("RUN", run_id))
        return run_id

    return store


@pytest.mark.parametrize("content", ["[1]", "[null]", "[[]]", "[{}]", '["run_id"]', '[{"run_id": "a"}, {}]'])
def test_damaged_rows_are_passed_over(content, stored, capsys):
    stored(content)
    run_id = stored('[{"run_id": "RUN"}]', "in-weight")
    assert [*edits.rows("quick").run_id] == [run_id]
    assert f"{ROWS} is damaged (it lacks run_id): delete it" in capsys.readouterr().err


def test_a_dry_run_says_which_models_are_not_measured_yet(stored):
    """The quick profile trains none: what is ahead is to measure the committed checkpoints."""
    report = edits.sweep("quick", dry_run=True)
    assert report.runs_ahead == len(report.missing) == 2 and report.done_before == report.done_now == 0
    assert "about 2 runs ahead" in str(report) and "in-tool, 4096 facts, d = 24, seed 2" in str(report)
    stored('[{"run_id": "RUN"}]')
    report = edits.sweep("quick", dry_run=True)
    assert (report.done_before, report.runs_ahead) == (1, 1)


def test_damaged_rows_are_measured_again(stored, monkeypatch):
    measured = []

    def measure(folder, profile):
        measured.append(folder.name)
        return [{"run_id": read_json(folder / "row.json")["run_id"]}]

    monkeypatch.setattr(edited_models, "measure", measure)
    stored("[{]")
    for done in (2, 0):
        assert edits.sweep("quick", dry_run=True).done_now == 0 and edits.sweep("quick").done_now == done
        assert len(edits.rows("quick")) == 2
    assert measured == ["in-weight", "in-tool"]


def test_measuring_ends_with_the_time_and_one_failure_leaves_the_others(stored, monkeypatch):
    def measure(folder, profile):
        if folder.name == "in-weight":
            raise MemoryError("too large")
        return [{"run_id": read_json(folder / "row.json")["run_id"]}]

    monkeypatch.setattr(edited_models, "measure", measure)
    report = edits.sweep("quick", max_hours=0)
    assert report.done_now == 0 and "about 2 runs ahead" in str(report)
    report = edits.sweep("quick")
    assert report.done_now == 1 and "about 1 runs ahead" in str(report) and "MemoryError" in str(report)
    with pytest.raises(WorkError, match="MemoryError: too large"):
        report.check()


def test_a_sweep_without_processes_is_refused_before_it_measures(stored, monkeypatch, itl):
    monkeypatch.setattr(edited_models, "measure", lambda *_: pytest.fail("it measures"))
    answer = itl("sweep", "07_1", "--jobs=0")
    assert answer.code == 2 and answer.err.startswith("itl: jobs = 0: ")
