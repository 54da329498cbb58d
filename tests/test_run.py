"""One cell: what a run leaves behind, that it is never repeated, and what it refuses before it writes anything."""

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lib import checkpoint, paths
from lib.base import InputError
from lib.config import RunConfig, override
from lib.dialogs import ByteTokenizer
from lib.facts import load_people
from lib.model import Transformer
from lib.monitor import read_metrics
from lib.recall import measure_recall
from lib.run import _Cell, _git, commit, load_model, resolve_device, run, save_model, write_json
from lib.tools import SqlTool


def _config(mode: str = "in-weight", **assignments) -> RunConfig:
    values = {
        "mode": mode,
        "facts": {"n_people": 4},
        "model": {"d_model": 8},
        "training": {"steps": 12, "checkpoint_every": 5},
        "evaluation": {"every": None},
    }
    return override(RunConfig.parse(values), {name.replace("__", "."): value for name, value in assignments.items()})


def _snapshot(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[RunConfig, Path, dict]:
    config, directory = _config(), tmp_path_factory.mktemp("finished") / "run"
    return config, directory, run(config, directory)


def test_a_run_leaves_its_configuration_people_metrics_model_and_row(finished):
    config, directory, row = finished
    names = {path.name for path in directory.iterdir() if not path.name.startswith(".")}
    assert names == {"config.json", "people.sqlite", "metrics.jsonl", "model", "row.json"}
    assert json.loads((directory / "row.json").read_text()) == row
    assert RunConfig.parse(json.loads((directory / "config.json").read_text())["config"]) == config
    assert [line["step"] for line in read_metrics(directory)] == [12]


def test_nothing_of_a_run_is_a_pickle(finished):
    files = [path for path in finished[1].rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".json", ".jsonl", ".safetensors", ".sqlite", ""}
    for path in files:
        assert not path.read_bytes().startswith((b"\x80", b"PK"))  # pickle, and torch.save's archive of pickles


def test_the_row_says_what_was_run_and_measured(finished):
    config, directory, row = finished
    model, saved = load_model(directory)
    people = load_people(config.facts)
    assert saved == config and RunConfig.parse(json.loads(row["config"])) == config
    assert row["run_id"] == config.run_id
    assert (row["mode"], row["n_people"], row["n_facts"], row["n_questions"]) == ("in-weight", 4, 16, 16)
    assert row["n_params"] == sum(parameter.numel() for parameter in model.parameters())
    assert (row["steps"], row["steps_budget"], row["stopped"], row["dialogs_seen"]) == (12, 12, "budget", 12 * 16)
    assert row["people_digest"] == people.digest()
    assert row["loss"] == read_metrics(directory)[-1]["loss"]
    assert (row["torch"], row["commit"]) == (torch.__version__, commit())
    by_attribute = [row[f"recall_{attribute}"] for attribute in people.attributes]
    assert row["recall"] == pytest.approx(sum(by_attribute) / 4)


@pytest.mark.parametrize("mode", ["in-weight", "in-tool"])
def test_the_recall_of_a_row_is_that_of_the_saved_model_asked_word_by_word(tmp_path, mode):
    # Two people and enough steps to know something, so that the number is neither 0 nor 1 by default.
    config = _config(mode, facts__n_people=2, model__d_model=24, training__steps=60)
    row = run(config, tmp_path / "run")
    model, _ = load_model(tmp_path / "run")
    facts = list(load_people(config.facts).facts())
    with SqlTool(tmp_path / "run" / "people.sqlite") as database:
        tool = database if mode == "in-tool" else None
        assert measure_recall(model, facts, ByteTokenizer(), tool, method="decode").overall == row["recall"]


def test_the_database_of_a_run_holds_its_people(finished):
    config, directory, _ = finished
    with sqlite3.connect(directory / "people.sqlite") as connection:
        stored = connection.execute("SELECT name, birth_date, occupation FROM people").fetchall()
    people = load_people(config.facts)
    assert sorted(stored) == sorted(
        zip(people.names, people.columns["birth_date"], people.columns["occupation"], strict=True)
    )


def test_a_finished_run_is_not_repeated(finished, monkeypatch):
    config, directory, row = finished
    before = _snapshot(directory)
    monkeypatch.setattr("lib.run.Trainer", None)
    assert run(config, directory) == row
    assert _snapshot(directory) == before


def test_a_run_that_was_killed_goes_on_in_its_folder(tmp_path, finished, monkeypatch):
    config, reference, row = finished

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("lib.run.save_model", die)  # after training, before the row
        with pytest.raises(KeyboardInterrupt):
            run(config, tmp_path / "run")
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {"step_00000005", "step_00000010"}
    again = run(config, tmp_path / "run")
    measured = ("loss", "recall", "steps", "dialogs_seen", "run_id", "people_digest")
    assert {name: again[name] for name in measured} == {name: row[name] for name in measured}
    model = Path("model") / checkpoint.TENSORS
    assert (tmp_path / "run" / model).read_bytes() == (reference / model).read_bytes()


def test_the_seed_of_a_run_sets_its_initialization(tmp_path):
    # One step at a vanishing rate leaves the weights where they began.
    still = {"training__steps": 1, "optim__lr": 1e-30, "optim__muon_lr": 1e-30}
    tables = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(_config(seed=seed, **still), tmp_path / name)
        tables.append(load_model(tmp_path / name)[0].embedding.weight)
    assert torch.equal(tables[0], tables[1])
    assert (tables[0] - tables[2]).abs().max() > 1


def test_a_later_field_does_not_make_a_run_another_one(tmp_path, finished):
    config, directory, _ = finished
    claim = json.loads((directory / "config.json").read_text())
    del claim["config"]["training"]["keep_checkpoints"]  # as written before there was this field
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(claim))
    assert run(config, tmp_path / "run")["run_id"] == config.run_id


# ---- What is refused, and leaves everything as it was


def _refused(config: RunConfig, directory: Path, words: str, **options) -> None:
    root = directory.parent
    before = _snapshot(root)
    with pytest.raises(InputError, match=words) as caught:
        run(config, directory, **options)
    assert "\n" not in str(caught.value)
    assert _snapshot(root) == before


def test_the_folder_of_another_configuration_is_refused(tmp_path):
    run(_config(), tmp_path / "run")
    _refused(_config(training__steps=13), tmp_path / "run", "another configuration or other people")


def test_a_csv_that_has_changed_since_is_refused(tmp_path):
    csv = tmp_path / "people.csv"
    csv.write_text("name,pet\nAnn,cat\nBob,dog\n")
    config = _config(facts={"csv": str(csv)})
    run(config, tmp_path / "run")
    csv.write_text("name,pet\nAnn,cat\nBob,eel\n")
    _refused(config, tmp_path / "run", "other people")


def test_a_folder_that_holds_something_else_is_refused(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    _refused(_config(), tmp_path / "run", "is not empty and holds no run")


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "run").write_text("")
    _refused(_config(), tmp_path / "run", "is a file")


def test_a_folder_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    _refused(_config(), tmp_path / "file" / "run", "cannot make the folder")


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"config": {"a": 1}, "people_digest": ""}'])
def test_a_damaged_claim_is_refused(tmp_path, content):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(content)
    _refused(_config(), tmp_path / "run", "is not the folder of a run .config.json is missing or not readable.")


def test_missing_people_are_refused(tmp_path):
    _refused(_config(facts={"csv": "nobody.csv"}), tmp_path / "run", "cannot read people from nobody.csv")


def test_tensorboard_that_is_not_installed_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    _refused(_config(), tmp_path / "run", "TensorBoard", tensorboard=True)


@pytest.mark.parametrize("device", ["nonsense", "", "meta", "cpu:x", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(tmp_path, device):
    _refused(_config(), tmp_path / "run", f"no device {device!r}", device=device)


def test_a_folder_with_nothing_but_what_a_killed_run_left_is_taken(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".config.json.99.tmp").write_text("{")
    assert run(_config(training__steps=1), tmp_path / "run")["steps"] == 1


def test_the_current_folder_can_be_the_folder_of_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(_config(training__steps=1), Path("."))["steps"] == 1
    assert (tmp_path / "row.json").exists()


# ---- Models


def test_a_saved_model_is_loaded_with_its_weights(tmp_path):
    config = _config()
    model = Transformer(config.model, torch.Generator().manual_seed(3))
    save_model(model, tmp_path / "model", config)
    for folder in (tmp_path, tmp_path / "model"):
        loaded, saved = load_model(folder)
        assert saved == config and not loaded.training
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))


def test_weights_of_another_shape_are_refused(tmp_path):
    config = _config()
    save_model(Transformer(config.model), tmp_path, override(config, {"model.d_model": 16}))
    with pytest.raises(InputError, match="do not fit its configuration"):
        load_model(tmp_path)


def test_a_run_that_is_not_finished_has_no_model_yet(tmp_path):
    with pytest.raises(InputError, match="there is no checkpoint"):
        load_model(tmp_path / "nothing")
    (tmp_path / "run").mkdir()
    with pytest.raises(InputError, match="is incomplete"):
        load_model(tmp_path / "run")


def test_auto_is_a_device_that_exists():
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert resolve_device("cpu") == torch.device("cpu")


# ---- Provenance


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A git checkout with one commit that holds lib/code.py, in place of this one."""
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "code.py").write_text("x = 1\n")
    for name in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{name}_NAME", "a")
        monkeypatch.setenv(f"GIT_{name}_EMAIL", "a@b.c")
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        _git(*arguments)
    commit.cache_clear()
    yield tmp_path
    commit.cache_clear()


def test_the_commit_of_a_clean_tree_is_named(checkout):
    (checkout / "notes.txt").write_text("not code")
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=checkout, capture_output=True, text=True).stdout.strip()
    assert len(head) == 40 and commit() == head


@pytest.mark.parametrize("change", ["code.py", "new.py"])
def test_a_tree_whose_code_differs_from_its_commit_is_dirty(checkout, change):
    (checkout / "lib" / change).write_text("x = 2\n")
    assert commit().endswith("-dirty")


def test_without_a_checkout_the_commit_is_unknown(checkout, monkeypatch):
    monkeypatch.setenv("GIT_DIR", str(checkout / "nowhere"))
    assert commit() == "unknown"


def test_the_commit_is_that_of_the_code_that_was_imported(checkout, tmp_path, monkeypatch):
    head = _git("rev-parse", "HEAD")

    finish = _Cell.finish

    def finish_after_someone_commits(*arguments):
        (checkout / "lib" / "code.py").write_text("x = 2\n")
        _git("commit", "-qam", "second")
        return finish(*arguments)

    monkeypatch.setattr(_Cell, "finish", finish_after_someone_commits)
    assert run(_config(), tmp_path / "runs" / "run")["commit"] == head


# ---- Files, and two processes at once


def test_json_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "row.json"
    write_json(path, {"a": 1})

    def fail(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    write_json(path, {"a": 3})
    assert json.loads(path.read_text()) == {"a": 3}


@pytest.mark.slow
def test_two_processes_that_are_given_the_same_cell_produce_it_once(tmp_path):
    config = _config(training__steps=150)
    (tmp_path / "config.json").write_text(config.canonical_json())
    command = [sys.executable, "-m", "lib", "train", "--config", "config.json", "--out", "run"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(paths.ROOT)}
    start = {"env": environment, "cwd": tmp_path, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **start) for _ in range(2)]
    outputs = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert outputs[0] == outputs[1]  # the same recall, steps and seconds: one row
    assert [line["step"] for line in read_metrics(tmp_path / "run") if "loss" in line] == [50, 100, 150]
