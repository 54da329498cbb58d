"""A run: what it leaves behind, that it is never repeated, and what it refuses before it writes anything."""

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import time
import traceback
from multiprocessing import get_context
from pathlib import Path

import forging
import pytest
import torch
from snapshots import snapshot

from lib import paths
from lib.agent.tools import SqlTool
from lib.base import InputError, WorkError
from lib.config import RunConfig, override
from lib.dialogs.tokenizers import ByteTokenizer
from lib.evaluation.recall import measure_recall
from lib.facts.sampling import load_people
from lib.paths import CLAIM, write_json
from lib.provenance import _git, commit
from lib.training import checkpoint
from lib.training.devices import resolve_device
from lib.training.distributed import Preempted
from lib.training.monitor import Record, read_record
from lib.training.optim import Muon
from lib.training.run import run
from lib.training.saved import load_model
from lib.training.trainer import Trainer


def _config(mode: str = "in-weight", **assignments) -> RunConfig:
    values = {
        "mode": mode,
        "facts": {"n_people": 4},
        "model": {"d_model": 8},
        "training": {"steps": 12, "checkpoint_every": 5},
        "evaluation": {"every": None},
    }
    return override(RunConfig.parse(values), {name.replace("__", "."): value for name, value in assignments.items()})


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
    assert [line["step"] for line in read_record(directory / "metrics.jsonl")] == [12]


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
    assert row["loss"] == read_record(directory / "metrics.jsonl")[-1]["loss"]
    assert (row["torch"], row["commit"]) == (torch.__version__, commit())
    by_attribute = [row[f"recall_{attribute}"] for attribute in people.attributes]
    assert row["recall"] == pytest.approx(sum(by_attribute) / 4)
    with sqlite3.connect(directory / "people.sqlite") as connection:
        stored = connection.execute("SELECT * FROM people").fetchall()
    assert sorted(stored) == sorted(zip(people.names, *people.columns.values(), strict=True))
    again, _ = load_model(directory / "model")
    assert not again.training and all(map(torch.equal, again.parameters(), model.parameters()))


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


def test_a_finished_run_is_not_repeated(finished, monkeypatch):
    config, directory, row = finished
    before = snapshot(directory)
    monkeypatch.setattr("lib.training.run.Trainer", None)
    assert run(config, directory) == row
    assert snapshot(directory) == before


def test_a_run_that_was_killed_goes_on_in_its_folder(tmp_path, finished, monkeypatch):
    config, reference, row = finished

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("lib.training.run.save_model", die)  # after training, before the row
        with pytest.raises(KeyboardInterrupt):
            run(config, tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    assert {path.name for path in checkpoints.iterdir()} == {"step_00000010", "step_00000012"}  # at the end, too
    shutil.rmtree(checkpoints / "step_00000012")  # as if it had died before
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


def test_the_way_from_a_run_to_the_optimizer_is_short(tmp_path, monkeypatch):
    ways, step = [], Muon.step

    def seen(optimizer: Muon) -> None:
        frames = traceback.extract_stack()
        ways.append([frame.name for frame in frames if Path(frame.filename).is_relative_to(paths.ROOT / "lib")])
        step(optimizer)

    monkeypatch.setattr(Muon, "step", seen)
    run(_config(training__steps=1), tmp_path / "run")
    assert ways == [["run", "train", "step"]]


def test_a_run_that_diverges_has_no_row(tmp_path):
    config = _config(optim={"name": "adamw", "lr": 1e30, "clip_norm": None})
    for _ in range(2):
        with pytest.raises(WorkError, match="training diverged, the loss of step . is not finite"):
            run(config, tmp_path / "run")
        assert not (tmp_path / "run" / "row.json").exists() and not (tmp_path / "run" / "model").exists()


# ---- What is refused, and leaves everything as it was


def _refused(config: RunConfig, directory: Path, words: str, **options) -> None:
    before = snapshot(directory.parent)
    with pytest.raises(InputError, match=words) as caught:
        run(config, directory, **options)
    assert "\n" not in str(caught.value)
    assert snapshot(directory.parent) == before


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


def test_an_attribute_may_be_called_recall(tmp_path):
    (tmp_path / "people.csv").write_text("name,product_recall\nAnn,May\nBob,June\n")
    config = _config(facts={"csv": str(tmp_path / "people.csv")}, training__steps=1)
    row = run(config, tmp_path / "run")
    assert row["nll_bits_product_recall"] > 1 and run(config, tmp_path / "run") == row


REFUSED = {
    "more parts of a batch than dialogs": ({"training.grad_accumulation": 17}, {}, "batches of 16 dialogs"),
    "no threads": ({}, {"threads": 0}, "threads = 0"),
    "more threads than any machine has": ({}, {"threads": 10**30}, "threads = 1000"),
    "a device without a name": ({}, {"device": ""}, "no device ''"),
    "a device of another kind": ({}, {"device": "meta"}, "no device 'meta'"),
    "people that are not there": ({"facts": {"csv": "nobody.csv"}}, {}, "cannot read people from nobody.csv"),
    "tensor ranks that are not there": ({}, {"tensor": 2}, "tensor = 2 does not divide"),
    "a device that is not there": ({}, {"device": "cuda:99"}, "no device"),
    "a file of dialogs that is not there": ({"training.files": {"none.jsonl": 0.5}}, {}, "no such file"),
    "a file of dialogs that holds none": ({"training.files": {os.devnull: 0.5}}, {}, "no such file"),
    "a tokenizer that is none": ({"tokenizer": "none.json"}, {}, "is no tokenizer"),
    "more columns than a database has": ({"facts": {"csv": "wide.csv"}}, {}, "too many columns"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_refused_run_claims_no_folder_whether_or_not_it_is_there(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    columns = [f"a{i}" for i in range(3000)]
    (tmp_path / "wide.csv").write_text(f"name,{','.join(columns)}\nAnn,{','.join('x' for _ in columns)}\n")
    assignments, options, words = REFUSED[kind]
    directory = tmp_path / "new" / "run"
    _refused(override(_config(), assignments), directory, words, **options)
    directory.mkdir(parents=True)
    _refused(override(_config(), assignments), directory, words, **options)


def test_after_a_refused_command_the_corrected_one_has_its_folder(tmp_path):
    _refused(_config(training__grad_accumulation=17), tmp_path / "new" / "run", "batches of 16 dialogs")
    assert run(_config(training__steps=1), tmp_path / "new" / "run")["steps"] == 1


@pytest.mark.parametrize(
    ("place", "name", "content", "words"),
    [
        ("run", "run/thesis.tex", "years of work", "is not empty and holds no run"),
        ("run", "run", "", "cannot make the folder"),
        ("file/run", "file", "", "cannot make the folder"),
        ("run", "run/config.json", "", "is not the folder of a run .config.json is missing or not readable."),
        ("run", "run/config.json", '{"config": {"a": 1}, "people_digest": ""}', "is not the folder of a run"),
    ],
)
def test_a_place_that_is_taken_is_refused(tmp_path, place, name, content, words):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(content)
    before = snapshot(tmp_path)
    _refused(_config(), tmp_path / place, words)
    assert snapshot(tmp_path) == before


def test_a_folder_with_nothing_but_what_a_killed_run_left_is_taken(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".config.json.99.tmp").write_text("{")
    assert run(_config(training__steps=1), tmp_path / "run")["steps"] == 1


def test_the_current_folder_can_be_the_folder_of_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(_config(training__steps=1), Path("."))["steps"] == 1
    assert (tmp_path / "row.json").exists()


# ---- Models


FORGED = forging.FORGED | {
    "a state without a configuration": forging.state(lambda state: {"tokenizer": "bytes"}),
    "a configuration that is none": forging.state(lambda state: state | {"config": None}),
    "a width that is no number": forging.state(lambda state: state | {"config": {"model": {"d_model": "8"}}}),
    "another width": forging.state(lambda state: state | {"config": {"model": {"d_model": 12}}}),
    "a width beyond all memory": forging.state(lambda state: state | {"config": {"model": {"d_model": 4 * 10**8}}}),
    "layers without end": forging.state(lambda state: state | {"config": {"model": {"n_layers": 10**7}}}),
    "another tokenizer": forging.state(lambda state: state | {"tokenizer": ["bytes"]}),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", FORGED)
def test_a_model_that_no_run_wrote_is_refused_though_its_checksums_fit(finished, tmp_path, kind):
    folder = shutil.copytree(finished[1] / "model", tmp_path / "model")
    FORGED[kind](folder)
    with pytest.raises(InputError) as caught:
        load_model(folder, "cpu")
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_a_run_that_is_not_finished_has_no_model_yet(tmp_path):
    with pytest.raises(InputError, match="there is no checkpoint"):
        load_model(tmp_path / "nothing")
    (tmp_path / "run").mkdir()
    with pytest.raises(InputError, match="is incomplete or damaged"):
        load_model(tmp_path / "run")
    (tmp_path / "run" / CLAIM).write_text("{}")
    with pytest.raises(InputError, match="is not finished: the command that began it resumes it"):
        load_model(tmp_path / "run")


def test_auto_is_a_device_that_exists():
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert resolve_device("cpu") == torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_is_found_without_taking_its_memory(monkeypatch):
    """A sweep's parent process only names GPUs: a tensor here would fail, as there is none."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [str(resolve_device(name)) for name in ("cuda", "cuda:1")] == ["cuda:0", "cuda:1"]
    with pytest.raises(InputError, match="no device 'cuda:2'"):
        resolve_device("cuda:2")


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


@pytest.mark.parametrize("ignored", [True, False])
def test_the_commit_of_a_checkout_around_the_code_is_not_the_codes(checkout, monkeypatch, ignored):
    """Code that was unpacked in a checkout of something else, which ignores it or not, or has it beside its own."""
    inner = checkout / "unpacked"
    (inner / "lib").mkdir(parents=True)
    (inner / "lib" / "code.py").write_text("y = 1\n")
    if ignored:
        (checkout / ".gitignore").write_text("unpacked\n")
    _git("add", ".")
    _git("commit", "-qm", "second")
    monkeypatch.setattr(paths, "ROOT", inner)
    assert commit() == "unknown"


def test_the_commit_of_a_checkout_that_ignores_the_code_is_not_the_codes(checkout):
    _git("rm", "-q", "-r", "--cached", "lib")
    (checkout / ".gitignore").write_text("lib\n")
    _git("add", ".")
    _git("commit", "-qm", "second")
    assert commit() == "unknown"


@pytest.mark.parametrize("change", ["code.py", "new.py"])
def test_a_tree_whose_code_differs_from_its_commit_is_dirty(checkout, change):
    (checkout / "lib" / change).write_text("x = 2\n")
    assert commit().endswith("-dirty")


def test_without_a_checkout_the_commit_is_unknown(checkout, monkeypatch):
    monkeypatch.setenv("GIT_DIR", str(checkout / "nowhere"))
    assert commit() == "unknown"


def test_the_commit_is_that_of_the_code_that_was_imported(checkout, tmp_path, monkeypatch):
    head = _git("rev-parse", "HEAD")

    def measure_after_someone_commits(*arguments):
        (checkout / "lib" / "code.py").write_text("x = 2\n")
        _git("commit", "-qam", "second")
        return measure_recall(*arguments)

    monkeypatch.setattr("lib.training.run.measure_recall", measure_after_someone_commits)
    assert run(_config(), tmp_path / "runs" / "run")["commit"] == head


# ---- Files, and two processes at once


def test_what_json_cannot_say_is_not_written(tmp_path):
    def write_record() -> None:
        with Record(tmp_path / "record.jsonl") as record:
            record.write(1, loss=-torch.inf)

    for write in (
        lambda: checkpoint.save(tmp_path / "model", {"w": torch.zeros(1)}, {"loss": torch.nan}),
        lambda: checkpoint.save_step(tmp_path, 1, {"w": torch.zeros(1)}, {"loss": torch.inf}, keep=1),
        write_record,
    ):
        with pytest.raises(WorkError, match="not finite") as caught:
            write()
        assert "\n" not in str(caught.value)
    assert (tmp_path / "record.jsonl").read_text() == ""


def _run_in_process(config: dict, directory: Path, out: Path) -> None:
    out.write_text(json.dumps(run(RunConfig.parse(config), directory)))


@pytest.mark.slow
def test_a_second_process_waits_for_the_first_and_finds_its_row(tmp_path):
    context, processes = get_context("spawn"), []
    for i in range(2):
        arguments = _config(training__steps=60).model_dump(), tmp_path / "run", tmp_path / f"{i}.json"
        processes.append(context.Process(target=_run_in_process, args=arguments, daemon=True))
        processes[-1].start()
    for process in processes:
        process.join(timeout=600)  # of a busy machine
    assert [process.exitcode for process in processes] == [0, 0]
    rows = [json.loads((tmp_path / f"{i}.json").read_text()) for i in range(2)]
    assert rows[0] == rows[1]  # to the second in which they were finished: one run
    assert [line["step"] for line in read_record(tmp_path / "run" / "metrics.jsonl")] == [50, 60]


# ---- Threads


@pytest.fixture
def several_cores(monkeypatch):
    """An environment that leaves the number of threads open; gives the threads that steps were computed with."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("lib.training.run.usable_cores", lambda: 2)
    before, seen, step = torch.get_num_threads(), [], Trainer.step

    def counted(trainer):
        seen.append(torch.get_num_threads())
        step(trainer)

    monkeypatch.setattr(Trainer, "step", counted)
    torch.set_num_threads(2)
    yield seen
    assert torch.get_num_threads() == 2  # as it was before the run
    torch.set_num_threads(before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_while_a_run_is_measured_ends_it_at_once_and_it_goes_on_later(tmp_path, monkeypatch, finished, number):
    def asked(*_):
        os.kill(os.getpid(), number)
        time.sleep(60)

    before = signal.getsignal(number)
    with monkeypatch.context() as patch, pytest.raises(Preempted, match="stopped by a signal"):
        patch.setattr("lib.training.run.save_model", asked)
        run(_config(), tmp_path / "run")
    assert signal.getsignal(number) == before and not (tmp_path / "run" / "row.json").exists()
    monkeypatch.setattr(Trainer, "step", None)  # all steps are done
    assert run(_config(), tmp_path / "run")["recall"] == finished[2]["recall"]


def test_a_new_run_tries_out_threads_and_a_resumed_one_keeps_its_own(tmp_path, several_cores, monkeypatch):
    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("lib.training.run.save_model", die)
        run(_config(), tmp_path / "run")
    claimed = json.loads((tmp_path / "run" / "config.json").read_text())["threads"]
    assert set(several_cores[:-12]) == {1, 2} and several_cores[-12:] == [claimed] * 12
    for claimed, threads in ((1, 1), (2, 2), (96, 2)):  # whatever was fastest then, perhaps on a larger machine
        shutil.rmtree(tmp_path / "run" / "checkpoints", ignore_errors=True)
        (tmp_path / "run" / "row.json").unlink(missing_ok=True)
        claim = json.loads((tmp_path / "run" / "config.json").read_text())
        write_json(tmp_path / "run" / "config.json", {**claim, "threads": claimed})
        several_cores.clear()
        assert run(_config(), tmp_path / "run")["threads"] == threads
        assert several_cores == [threads] * 12


def test_trying_out_threads_changes_no_weight(tmp_path, several_cores, monkeypatch):
    monkeypatch.setattr("lib.training.devices.WORTH_A_CORE", 1e9)  # one thread it is
    run(_config(), tmp_path / "tried")
    assert len(several_cores) > 12
    run(_config(), tmp_path / "given", threads=1)
    tensors = [(tmp_path / name / "model" / checkpoint.TENSORS).read_bytes() for name in ("tried", "given")]
    assert tensors[0] == tensors[1]


def test_threads_that_are_given_are_not_tried_out(tmp_path, several_cores, monkeypatch):
    assert run(_config(), tmp_path / "option", threads=2)["threads"] == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert run(_config(), tmp_path / "variable")["threads"] == 2
    assert several_cores == [2] * 24
