"""The command line: what works, end to end, and the answers to every kind of bad input and failed work."""

import io
import json
import os
import re
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from full_disk import full_after
from safetensors.torch import save_file
from snapshots import snapshot

from lib import paths
from lib.base import InputError, WorkError
from lib.cli import app
from lib.cli.options import ENDS
from lib.config import RunConfig
from lib.dialogs.files import read_dialogs
from lib.dialogs.tokenizers import ByteTokenizer
from lib.dialogs.tokens import tokenize_people
from lib.experiments.sweep import Report
from lib.facts.sampling import sample_people
from lib.training import checkpoint
from lib.training.run import run
from lib.training.saved import open_conversation

TINY = ["--people", "2", "--d-model", "8", "--set", "training.steps=8", "--set", "evaluation.every=null"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Folders in-weight and in-tool, each with a run of a tiny model that knows next to nothing."""
    folder = tmp_path_factory.mktemp("trained")
    for mode in ("in-weight", "in-tool"):
        fields = {"facts": {"n_people": 2}, "model": {"d_model": 8}, "training": {"steps": 8}}
        run(RunConfig.parse({"mode": mode, **fields, "evaluation": {"every": None}}), folder / mode)
    return folder


@pytest.fixture
def here(own_runs, tmp_path, monkeypatch) -> Path:
    """The current folder, in which runs/ is too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    return tmp_path


# ---- Bad input


class Bad(NamedTuple):
    """One cause: the command, words that its answer has, and what is done before."""

    command: str
    words: tuple[str, ...]
    prepare: Callable[[Path], None] | None = None


def _file(name: str, content: str) -> Callable[[Path], None]:
    def prepare(here: Path) -> None:
        (here / name).parent.mkdir(exist_ok=True)
        (here / name).write_text(content)

    return prepare


def _damage(name: str, change: Callable[[bytes], bytes] | None) -> Callable[[Path], None]:
    """Change a file of the run in-weight/, or delete it."""

    def prepare(here: Path) -> None:
        path = here / "in-weight" / "model" / name
        if change is None:
            path.unlink()
        else:
            path.write_bytes(change(path.read_bytes()))

    return prepare


def _flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def _people_without_birth_dates(here: Path) -> None:
    with closing(sqlite3.connect(here / "some.sqlite")) as connection:
        connection.execute("CREATE TABLE people (name, pet)")


CSV = "train --csv people.csv --out run"
BAD = {
    # People
    "negative people": Bad("data --out x.sqlite --people -3", ("facts.n_people", "greater than or equal to 1", "-3")),
    "people in letters": Bad("train --people many", ("--people", "integer")),
    "a CSV that is missing": Bad(CSV, ("cannot read people from people.csv", "No such file")),
    "a CSV without a column name": Bad(
        CSV, ("people.csv", "no column 'name'", "who"), _file("people.csv", "who,pet\nAnn,cat\n")
    ),
    # Configurations
    "heads that do not divide d_model": Bad(
        "train --d-model 32 --set model.n_heads=3", ("model.d_model = 32", "n_heads = 3", "multiple of 6")
    ),
    "an unknown configuration key": Bad(
        "train --set training.epochs=3", ("unknown configuration key 'training.epochs'", "accepted are", "batch_size")
    ),
    "a value of the wrong type": Bad("train --set training.steps=many", ("training.steps", "integer", "'many'")),
    "--set without a value": Bad("train --set training.steps", ("--set takes field=value", "'training.steps'")),
    "a mode that does not exist": Bad("train --mode both", ("--mode", "'both'", "'in-weight', 'in-tool'")),
    "a missing configuration": Bad("train --config c.json", ("cannot read the configuration c.json", "No such file")),
    "a configuration that is not JSON": Bad(
        "train --config c.json", ("cannot read the configuration c.json",), _file("c.json", "{seed: 1}")
    ),
    # Folders and files
    "a folder that holds something else": Bad(
        "train --out run", ("run is not empty and holds no run", "new folder"), _file("run/thesis.tex", "words")
    ),
    "a file in place of a folder": Bad("train --out run", ("cannot make the folder run",), _file("run", "")),
    "a database in a folder that does not exist": Bad(
        "data --out nowhere/x.sqlite", ("cannot write the database nowhere/x.sqlite", "existing folder")
    ),
    "a database in place of a folder": Bad(
        "data --out in-weight", ("cannot write the database in-weight", "file name")
    ),
    "dialogs in a folder that does not exist": Bad(
        "data --out x.sqlite --dialogs nowhere/d.jsonl", ("cannot write nowhere/d.jsonl", "existing folder")
    ),
    "a database in place of the people it is made from": Bad(
        "data --csv people.csv --out ./people.csv", ("name the same file",), _file("people.csv", "name,pet\nAnn,cat\n")
    ),
    "dialogs in place of the people": Bad(
        "data --csv people.csv --out x.sqlite --dialogs people.csv",
        ("name the same file",),
        _file("people.csv", "name,pet\nAnn,cat\n"),
    ),
    "dialogs in place of a pipe": Bad(
        "data --out x.sqlite --dialogs pipe", ("cannot write pipe",), lambda here: os.mkfifo(here / "pipe")
    ),
    # Checkpoints
    "a run that is missing": Bad("recall nothing", ("there is no checkpoint at nothing",)),
    "a run that is not finished": Bad(
        "chat run Hello?", ("run is not finished", "resumes"), _file("run/config.json", "{}")
    ),
    "a truncated checkpoint": Bad(
        "recall in-weight",
        ("damaged", checkpoint.TENSORS, "has changed"),
        _damage(checkpoint.TENSORS, lambda b: b[:-100]),
    ),
    "a flipped bit": Bad("chat in-weight Hello?", ("damaged", checkpoint.TENSORS), _damage(checkpoint.TENSORS, _flip)),
    # Sizes and names
    "an integer of 4,000 digits": Bad(f"train --set model.d_model={'8' * 4_000}", ("model.d_model", "below 2^63")),
    "a value that is nested without end": Bad(f"train --set seed={'[' * 100_000}", ("seed", "integer", "[[[")),
    "a field that is nested without end": Bad(
        f"train --set training.files{'.a' * 30_000}=1", ("training.files", "number")
    ),
    "a configuration without end": Bad(
        "train --config /dev/zero", ("cannot read the configuration /dev/zero", "it is no file")
    ),
    "a plan without end": Bad(
        "sweep endless.yaml --dry-run",
        ("cannot read the plan endless.yaml", "it is no file"),
        lambda here: (here / "endless.yaml").symlink_to("/dev/zero"),
    ),
    "a folder with NUL in its name": Bad("train --out a\0b", ("--out", "null")),
    "a folder with a long name": Bad(f"train --out {'x' * 300}", ("cannot make the folder xxx", "File name too long")),
    "a configuration with a long name": Bad(f"train --config {'x' * 300}", ("cannot read", "File name too long")),
    "a folder that leads to itself": Bad(
        "train --out loop", ("cannot make the folder loop",), lambda here: (here / "loop").symlink_to("loop")
    ),
    # Databases
    "a missing database": Bad("recall in-tool --database no.sqlite", ("there is no database no.sqlite",)),
    "an unknown attribute": Bad(
        "recall in-tool --database some.sqlite",
        ("unknown attribute 'birth_date'", "of some.sqlite: there are pet"),
        _people_without_birth_dates,
    ),
    "a database for a model that asks none": Bad(
        "recall in-weight --database in-tool/people.sqlite", ("in-weight", "asks no database", "leave")
    ),
    # Notebooks
    "an unknown notebook": Bad("notebooks 77", ("'77' is not a notebook", "00_quickstart")),
    "a parameter that a notebook does not have": Bad(
        "notebooks 00 -p color=red", ("00_quickstart has no parameter 'color'", "it accepts", "profile: str")
    ),
    # Sweeps and figures
    "an unknown section": Bad("sweep 05_9", ("unknown experiment '05_9'", "05_1")),
    "an unknown profile": Bad("sweep 05_1 --profile huge", ("--profile", "'huge'", "'quick', 'laptop', 'paper'")),
    "publishing quick results": Bad("sweep 05_1 --publish", ("quick does not publish", "laptop and paper")),
    "a sweep without processes": Bad("sweep 05_1 --profile smoke --jobs 0", ("jobs = 0", "at least one process")),
    "jobs of fine-tunings": Bad("sweep 06 --jobs 2", ("section 06 does one run at a time",)),
    "jobs of chains": Bad("sweep 07_2 --jobs 2", ("section 07_2 does one run at a time",)),
    "facts of no run": Bad("sweep 05_1 --facts 7 --facts 9", ("no quick run of 05_1 has 7 or 9 facts",)),
    "facts of Section 7": Bad("sweep 07_1 --facts 8", ("not for section 07_1",)),
    "negative hours": Bad("sweep 05_1 --max-hours -1", ("--max-hours", "0")),
    "a sweep on a device that is not there": Bad(
        "sweep 05_1 --profile smoke --jobs 1 --device cuda:99", ("no device 'cuda:99'", "auto or cpu")
    ),
    "an unknown figure after a known one": Bad(
        "figures parameter_bounds bounds --profile quick", ("unknown figure 'bounds'", "parameter_bounds")
    ),
    # Devices and options
    "an unknown device": Bad("train --device abacus", ("no device 'abacus'", "auto, cpu")),
    "an unknown device of a plan": Bad("sweep 05_1 --dry-run --device abacus", ("no device 'abacus'", "auto, cpu")),
    "an unknown device of a job": Bad("submit train --dry-run --device abacus", ("no device 'abacus'", "auto, cpu")),
    "people beside a file of people": Bad("data --people 3 --csv p.csv --out x", ("--people and --csv", "exclude")),
    "an evaluation of a folder without a run": Bad("evaluate .", ("is not the folder of a run", "config.json")),
    "an evaluation on a device that is not there": Bad("evaluate in-weight --device cuda:99", ("no device 'cuda:99'",)),
    "negative steps to profile": Bad("train --profile-steps -1", ("observers.profile_steps", "-1")),
    "an unknown option": Bad("train --epochs 3", ("No such option", "--epochs")),
    "an unknown command": Bad("trian", ("No such command 'trian'",)),
    "an option without its value": Bad("train --people", ("--people", "requires an argument")),
    "a missing argument": Bad("recall", ("Missing argument",)),
}


@pytest.fixture
def prepared(here, trained, request) -> tuple[Path, Bad]:
    """The current folder with copies of the trained runs and with what the cause of `request.param` needs."""
    bad = BAD[request.param]
    shutil.copytree(trained, here, dirs_exist_ok=True)
    if bad.prepare:
        bad.prepare(here)
    return here, bad


def _assert_one_sentence(answer: tuple[int, str, str], words: tuple[str, ...]) -> None:
    code, out, err = answer
    assert code == 2 and err.startswith("itl: ") and err.endswith("\n") and err.count("\n") == 1, err
    assert "Traceback" not in err + out and all(word in err for word in words), err


@pytest.mark.parametrize("prepared", BAD, indirect=True)
def test_bad_input_is_answered_with_one_sentence_and_changes_no_file(prepared, itl):
    folder, bad = prepared
    before = snapshot(folder)
    answer = itl(*bad.command.split())
    _assert_one_sentence(answer, bad.words)
    assert snapshot(folder) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    "prepared",
    ["negative people", "heads that do not divide d_model", "a flipped bit", "an unknown option"],
    indirect=True,
)
def test_bad_input_to_a_real_process_is_answered_the_same_way(prepared):
    folder, bad = prepared
    before = snapshot(folder)
    environment = {**os.environ, "PYTHONPATH": str(paths.ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "lib", *bad.command.split()]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    _assert_one_sentence((done.returncode, done.stdout, done.stderr), bad.words)
    assert snapshot(folder) == before


def test_a_run_asks_about_the_people_it_was_trained_on_wherever_it_is(here, itl, monkeypatch):
    (here / "people.csv").write_text('name,pet\nZoe,cat\nBob,"a, b"\nAnn,dog\n')
    options = ["--d-model", "8", "--set", "training.steps=8", "--set", "evaluation.every=null"]
    assert itl("train", "--csv", "people.csv", *options, "--mode", "in-tool", "--out", "run").code == 0
    row = json.loads((here / "run" / "row.json").read_text())
    assert (row["n_facts"], row["recall_pet"]) == (3, row["recall"])
    (here / "there").mkdir()
    (here / "there" / "people.csv").write_text("name,pet\nEve,fox\n")
    (here / "run").rename(here / "moved")
    monkeypatch.chdir(here / "there")
    model = "../moved"
    for folder in (model, f"{model}/model"):
        with open_conversation(Path(folder), Path(model, "people.sqlite")) as talk:
            assert list(talk.people.facts()) == [("Zoe", "pet", "cat"), ("Bob", "pet", "a, b"), ("Ann", "pet", "dog")]
            assert "Zoe" in talk.example
    answer = itl("recall", model)
    assert answer.code == 0 and "on 3 questions" in answer.out
    assert itl("evaluate", model).code == 0
    monkeypatch.setattr(sys, "stdin", io.StringIO("/who\n\n"))
    said = itl("chat", model).out
    assert all(name in said for name in ("Zoe", "Bob", "Ann")) and "Eve" not in said
    # Without the copy, as in runs from before there was one, other people are refused.
    Path(model, "people.csv").unlink()
    assert itl("recall", model).code == 2


def test_a_locked_database_is_answered_with_one_sentence(here, trained, itl):
    shutil.copytree(trained / "in-tool", here / "in-tool")
    connection = sqlite3.connect(here / "in-tool" / "people.sqlite", isolation_level=None)
    connection.execute("BEGIN EXCLUSIVE")
    before = snapshot(here)
    _assert_one_sentence(itl("recall", "in-tool"), ("in-tool/people.sqlite", "database is locked"))
    assert snapshot(here) == before
    connection.close()
    assert itl("recall", "in-tool").code == 0


@pytest.mark.parametrize(
    ("option", "module", "name"),
    [("--tensorboard", "torch.utils.tensorboard", "TensorBoard"), ("--wandb=p", "wandb", "Weights & Biases")],
)
def test_a_monitor_that_is_not_installed_is_answered_with_one_sentence(here, itl, monkeypatch, option, module, name):
    monkeypatch.setitem(sys.modules, module, None)
    _assert_one_sentence(itl("train", *TINY, option), (name, "not installed", "[monitor]"))
    assert list(here.iterdir()) == []


@pytest.mark.slow
def test_weights_and_biases_without_an_account_says_how_to_do_without(here):
    """In a process of its own: the package remembers how it was set up first."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment |= {"PYTHONPATH": str(paths.ROOT), "HOME": str(here / "home"), "ITL_RUNS": str(here / "runs")}
    command = [sys.executable, "-m", "lib", "train", *TINY, "--wandb", "p"]
    done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    _assert_one_sentence((done.returncode, done.stdout, done.stderr), ("API key", "WANDB_MODE=offline"))
    assert not (here / "runs").exists()


@pytest.mark.parametrize(
    ("place", "command", "told"),
    [
        ("lib.training.run.run", "train", "itl: interrupted: the same command resumes from what was saved\n"),
        ("lib.facts.sampling.load_people", "data --out x.sqlite", "itl: interrupted\n"),  # it cannot go on
        ("lib.cli.app.app", "data --out x.sqlite", "itl: interrupted\n"),  # before the command begins
    ],
)
def test_an_interrupted_command_says_how_to_go_on_if_it_can(here, itl, monkeypatch, place, command, told):
    monkeypatch.setattr(place, lambda *_, **__: _raise(KeyboardInterrupt()))
    assert itl(*command.split())[::2] == (130, told)


def _raise(error: BaseException) -> None:
    raise error


def test_work_that_failed_is_one_sentence_and_exit_code_1(itl, monkeypatch):
    def fail(*_, **__):
        raise WorkError("00_quickstart failed in cell [3]\nof many")

    monkeypatch.setattr("lib.notebook.runner.run_many", fail)
    assert itl("notebooks", "00") == (1, "", "itl: 00_quickstart failed in cell [3] of many\n")


def test_a_file_that_cannot_be_written_is_named_in_one_sentence_with_exit_code_1(here, itl, monkeypatch):
    (here / "file").touch()
    monkeypatch.setenv("ITL_RUNS", str(here / "file"))
    answer = itl("figures", "parameter_bounds", "--profile", "quick")
    assert (answer.code, answer.out) == (1, "")
    assert answer.err == f"itl: the operating system reports an error with {here}/file/quick/figures: Not a directory\n"


@pytest.mark.parametrize("library", ["torch", "safetensors"])
def test_what_libraries_say_of_a_full_disk_is_one_sentence_and_exit_code_1(here, itl, monkeypatch, library):
    def save(*_, **__):
        many = torch.zeros(2**16)
        with full_after(1_000):
            torch.save(many, here / "many") if library == "torch" else save_file({"x": many}, here / "many")

    monkeypatch.setattr("lib.training.run.run", save)
    answer = itl("train", *TINY)
    assert answer.code == 1 and answer.err.startswith("itl: a file could not be written, is the disk full? ")
    assert answer.err.count("\n") == 1


@pytest.mark.parametrize("error", [
    ImportError("libtorch_cpu.so: failed to map segment from shared object"),
    torch.OutOfMemoryError("CUDA out of memory. Tried"),
    None,
])  # fmt: skip
def test_a_library_that_finds_no_memory_is_one_sentence_and_exit_code_1(here, itl, monkeypatch, error):
    monkeypatch.setattr("lib.training.run.run", lambda *_, **__: _raise(error) if error else torch.empty(2**60))
    assert itl("train", *TINY)[::2] == (1, "itl: out of memory: give a smaller model or batch\n")
    answer = itl("recall", "failed to map segment")
    assert answer.code == 2 and "there is no checkpoint at failed to map segment" in answer.err


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such pipes")
def test_who_stops_reading_the_output_sees_no_traceback(here):
    command = [sys.executable, "-m", "lib", "data", "--people", "2", "--out", "x.sqlite"]
    read, write = os.pipe()
    os.close(read)
    environment = {**os.environ, "PYTHONPATH": str(paths.ROOT)}
    done = subprocess.run(command, env=environment, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "") and (here / "x.sqlite").is_file()


@pytest.mark.parametrize("name", ["a\x1b[31mb/c", "x" * 100_000 + "/c"])
def test_a_message_steers_no_terminal_and_is_short(here, itl, name):
    answer = itl("data", "--out", name)
    assert answer.code in (1, 2) and answer.err.startswith("itl: ") and answer.err.count("\n") == 1
    assert "\x1b" not in answer.err and len(answer.err) < 2_000


def test_what_is_printed_steers_no_terminal_and_can_be_typed_again(here, itl):
    answer = itl("data", "--people", "2", "--out", "a\x1b[31mb")
    assert answer.code == 0 and "a\\x1b[31mb" in answer.out and "\x1b" not in answer.out
    answer = itl("train", *TINY, "--out", "it's a; run")
    *_, folder = shlex.split(answer.out.split("talk to the model: ")[1])
    assert folder == "it's a; run" and itl("chat", folder, "Who?").code == 0


def test_debugging_shows_the_traceback_of_bad_input_and_errors_that_nobody_foresaw_always_do(itl, monkeypatch):
    monkeypatch.setattr("lib.training.run.run", lambda *_, **__: _raise(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        itl("train")
    monkeypatch.setenv("ITL_DEBUG", "1")
    with pytest.raises(InputError, match="facts.n_people"):
        itl("train", "--people", "0")


# ---- What works


def test_train_makes_a_run_that_recall_and_chat_work_on(here, itl):
    command = ["train", "--mode", "in-weight", "--people", "8", "--d-model", "8", "--set", "training.steps=20"]
    answer = itl(*command)
    assert answer.code == 0, answer.err
    (folder,) = (here / "runs" / "train").iterdir()
    row = json.loads((folder / "row.json").read_text())
    assert (row["run_id"], row["n_people"], row["d_model"], row["steps"]) == (folder.name, 8, 8, 20)
    assert f"run {folder.name}: in-weight, d_model 8, 6,248 parameters" in answer.out
    assert f"recall {row['recall']:.4f} on 32 questions after 20 steps" in answer.out
    assert str(folder) in answer.out

    recalled = itl("recall", str(folder))
    assert recalled.code == 0 and recalled.out.startswith(f"recall {row['recall']:.4f} on 32 questions\n")
    assert {line.split()[0] for line in recalled.out.splitlines()[1:]} == set(sample_people(1).attributes)

    said = itl("chat", str(folder), "Where was Ann born?")
    assert said.code == 0 and said.out.startswith("assistant: ")


def test_recall_refuses_a_database_that_has_changed_since_training_unless_it_is_named(here, itl):
    shutil.copytree(paths.CHECKPOINTS / "in-tool", here / "run")
    with open_conversation(here / "run", device="cpu") as talk:
        names = talk.people.names[:3]
    with closing(sqlite3.connect(here / "run" / paths.DATABASE)) as connection, connection:
        connection.executemany("UPDATE people SET occupation = 'qq' WHERE name = ?", [(name,) for name in names])
    answer = itl("recall", "run")
    _assert_one_sentence(answer, ("3 of 4,096 facts in run/people.sqlite are not those of training", "--database"))


def test_the_same_command_does_not_train_again(here, itl, monkeypatch):
    first = itl("train", *TINY, "--out", "run")
    monkeypatch.setattr("lib.training.run.Trainer", None)
    assert itl("train", *TINY, "--out", "run") == first


def test_what_watches_a_run_writes_into_its_folder_and_changes_neither_its_id_nor_its_weights(here, itl):
    watched = itl(*"train --profile-steps 2 --probe-every 4 --tensorboard --out watched".split(), *TINY)
    plain = itl("train", *TINY, "--out", "plain")
    assert (watched.code, plain.code) == (0, 0)
    assert watched.out.splitlines()[0] == plain.out.splitlines()[0]  # its id
    weights = [(here / name / "model" / checkpoint.TENSORS).read_bytes() for name in ("watched", "plain")]
    assert weights[0] == weights[1]
    added = {path.name for path in (here / "watched").iterdir()} - {path.name for path in (here / "plain").iterdir()}
    assert added == {"profile", "probes.jsonl", "tensorboard"}


def test_evaluate_measures_what_a_run_left_once_and_says_where_it_is(here, trained, itl):
    shutil.copytree(trained / "in-tool", here / "run")
    row = json.loads((here / "run" / "row.json").read_text())
    first = itl("evaluate", "run", "--watch")
    assert first.out.splitlines() == [
        f"step 8: recall {row['recall']:.4f}, {row['nll_bits']:.2f} bits a question",
        "all that was measured is in run/evaluations.jsonl",
    ]
    assert itl("evaluate", "run").out.splitlines() == first.out.splitlines()[1:]


def test_options_and_files_make_the_same_configuration(here, itl):
    (here / "c.json").write_text('{"mode": "in-tool", "training": {"steps": 4}, "optim": {"lr": 0.5}}')
    options = ["--people", "2", "--d-model", "4", "--seed", "3", "--out", "run"]
    for assignment in ("optim.lr=0.25", "optim.schedule=constant", "evaluation.every=null"):
        options += ["--set", assignment]
    answer = itl("train", "--config", "c.json", *options)
    assert answer.code == 0, answer.err
    config = RunConfig.parse(json.loads((here / "run" / "config.json").read_text())["config"])
    assert config == RunConfig.parse({
        "mode": "in-tool", "seed": 3, "facts": {"n_people": 2, "seed": 3}, "model": {"d_model": 4},
        "optim": {"lr": 0.25, "schedule": "constant"}, "training": {"steps": 4}, "evaluation": {"every": None},
    })  # fmt: skip


def test_an_in_tool_model_is_asked_with_its_own_database_or_another(trained, here, itl):
    folder = str(trained / "in-tool")
    answer = itl("recall", folder)
    assert answer.code == 0, answer.err
    assert "on 8 questions, " in answer.out and f"queries to {folder}/people.sqlite" in answer.out
    assert itl("data", "--out", "others.sqlite", "--people", "5", "--seed", "9").code == 0
    assert "queries to others.sqlite" in itl("recall", folder, "--database", "others.sqlite").out


def test_data_writes_a_database_and_the_dialogs_of_the_same_people(here, itl):
    answer = itl("data", "--out", "x.sqlite", "--people", "3", "--dialogs", "d.jsonl", "--mode", "in-tool")
    assert answer.code == 0
    assert "3 people with 12 facts (birth_date, birth_place, current_address, occupation) in x.sqlite" in answer.out
    with sqlite3.connect(here / "x.sqlite") as connection:
        stored = dict(connection.execute("SELECT name, birth_place FROM people"))
    people = sample_people(3)
    assert stored == dict(zip(people.names, people.columns["birth_place"], strict=True))
    assert sorted(path.name for path in here.iterdir()) == ["d.jsonl", "x.sqlite"]
    written, _ = read_dialogs(here / "d.jsonl", ByteTokenizer())
    assert torch.equal(written.values, tokenize_people(people, "in-tool", ByteTokenizer()).values)


@pytest.mark.parametrize("typed", ["Who?\n\n", "Who?\n"])
def test_a_conversation_ends_with_an_empty_line_or_the_end_of_the_input(trained, here, itl, monkeypatch, typed):
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    answer = itl("chat", str(trained / "in-weight"))
    assert answer.code == 0 and answer.err == ""
    assert answer.out.count("assistant: ") == 1 and "An empty line ends the conversation" in answer.out


def test_figures_of_a_profile_that_does_not_count_go_to_runs(here, itl):
    answer = itl("figures", "parameter_bounds", "--profile", "quick")
    folder = here / "runs" / "quick" / "figures"
    assert answer.code == 0
    assert answer.out.split() == [str(folder / "parameter_bounds.pdf"), str(folder / "parameter_bounds.png")]
    assert sorted(map(str, folder.iterdir())) == answer.out.split()


def test_a_dry_run_of_a_sweep_says_what_is_ahead(here, itl):
    answer = itl("sweep", "05_1", "--profile", "smoke", "--dry-run")
    assert answer.code == 0 and "0 runs done now" in answer.out and "in-tool, 8 facts, d = 4, seed 0" in answer.out
    assert list(here.iterdir()) == []


def test_a_sweep_with_a_failed_run_exits_with_1(here, itl, monkeypatch):
    monkeypatch.setattr("lib.experiments.sweep.sweep", lambda *_, **__: Report(failed={"0123": "ValueError: no"}))
    assert itl("sweep", "05_1").code == 1


def test_a_sweep_is_published_when_asked(here, itl, monkeypatch):
    published = []
    monkeypatch.setattr("lib.experiments.sweep.sweep", lambda *_, **__: Report())
    monkeypatch.setattr("lib.experiments.publishing.commit", lambda: "a" * 40)
    monkeypatch.setattr("lib.experiments.publishing.Table.add", lambda table, profile: published.append(profile) or 7)
    monkeypatch.setattr("lib.notebook.refresh.refresh", lambda say: published.append("refreshed"))
    assert itl("sweep", "05_1", "--profile", "laptop", "--publish", "--dry-run").code == 0
    assert published == []
    answer = itl("sweep", "05_1", "--profile", "laptop", "--publish")
    assert published == ["laptop", "refreshed"]
    assert "7 new rows in" in answer.out and "parameter_bounds.csv" in answer.out


def test_a_sweep_that_could_not_be_published_does_not_start(here, itl, monkeypatch):
    monkeypatch.setattr("lib.experiments.sweep.sweep", None)
    monkeypatch.setattr("lib.experiments.publishing.commit", lambda: "a" * 40 + "-dirty")
    answer = itl("sweep", "05_1", "--profile", "laptop", "--publish")
    _assert_one_sentence(answer, ("is not committed", "can be traced"))


def test_notebooks_are_run_with_the_parameters_that_were_typed(itl, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "lib.notebook.runner.run_many", lambda *arguments, **options: asked.append((arguments, options))
    )
    assert itl("notebooks", "05_1", "--profile", "smoke", "-p", "threshold=0.5", "--reuse").code == 0
    ((names, profile, values), options) = asked.pop()
    assert [name.stem for name in names] == ["05_1_parameter_bounds"]
    assert (profile, values, options) == ("smoke", {"threshold": 0.5}, {"in_place": False, "reuse": True})


def test_paper_runs_every_notebook_and_says_where_everything_is(here, itl, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "lib.notebook.runner.run_many", lambda *arguments, **options: asked.append((arguments, options))
    )
    answer = itl("paper")
    ((names, profile), options) = asked.pop()
    left_out = ("06", "07", "A1", "A2")  # they take extras, or an idle machine
    assert names == [path for path in sorted(paths.NOTEBOOKS.glob("*.ipynb")) if path.stem[:2] not in left_out]
    assert (profile, options) == ("quick", {"reuse": True})
    for place in ("figures", "notebooks"):
        assert str(here / "runs" / "quick" / place) in answer.out


def test_options_of_configurations_are_in_the_help(itl, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    told = itl("submit", "train", "--help").out
    for option in ("--mode", "--d-model", "--set", "--probe-every", "--threads", "--partition", "--constraint"):
        assert f"{option} " in told
    assert "minutes, or D-HH:MM:SS" in told and "(default: 2:00:00)" in told


def test_help_lists_the_commands_and_nothing_at_all_shows_it(itl):
    answer = itl("--help")
    assert answer.code == 0
    for command in ("data", "train", "recall", "evaluate", "chat", "sweep", "figures", "notebooks", "paper", "test"):
        assert command in answer.out
    told = re.sub(r"[│\s]+", " ", answer.out)
    for command in app.app.registered_commands:
        said = " ".join(command.callback.__doc__.split("\n\n")[0].split())
        assert said in told  # nothing in brackets, say, is taken for markup
    bare = itl()
    assert bare.code == 2 and "Usage" in bare.out + bare.err and "itl: \n" not in bare.err


@pytest.mark.parametrize("number", ENDS)
@pytest.mark.parametrize(
    "command, place",
    [
        ("ask --people people.csv --model m --base-url http://127.0.0.1:9", "lib.finetune.ask.sample_questions"),
        ('train --csv people.csv --set training.files={"people.csv":0.5} --out run', "hashlib.file_digest"),
    ],
)
def test_a_signal_ends_a_command_at_once_and_nothing_temporary_stays(
    command, place, number, tmp_path, itl, monkeypatch
):
    def before(*_) -> None:
        raise AssertionError("the command did not care for the signal")

    (tmp_path / "people.csv").write_text("name,city\nAda,Lyon\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(place, lambda *_: os.kill(os.getpid(), number))
    handler = signal.signal(number, before)
    try:
        assert itl(*command.split()).code == 128 + number
        assert signal.getsignal(number) is before
    finally:
        signal.signal(number, handler)
    assert [path.name for path in tmp_path.iterdir()] == ["people.csv"]
