"""What is handed to Slurm and how it stands, without a cluster (tests/cluster has one).

Where commands of Slurm are needed, scripts of the same names answer what a real cluster answered.
"""

import json
import math
import os
import pickle
import signal
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import submitit
from finished import FINISHED
from hypothesis import given
from hypothesis import strategies as st
from vocabularies import train_bpe, write_ranks

from lib import paths
from lib.base import DamagedFile, WorkError
from lib.config import UNOBSERVED, RunConfig
from lib.experiments import plan
from lib.experiments.rows import OWN
from lib.experiments.sweep import Report
from lib.provenance import COMMIT
from lib.slurm import job, submissions, tasks
from lib.slurm.submissions import Submission
from lib.slurm.tasks import Resources, Work
from lib.training.distributed import Preempted


@pytest.fixture
def commands(tmp_path, monkeypatch) -> Path:
    """A folder with commands of Slurm; sbatch accepts everything, and nothing is in the queue."""
    folder = tmp_path / "bin"
    folder.mkdir()
    answers = {"sinfo": "slurm 23.11\n", "sbatch": "Submitted batch job 71\n", "squeue": "", "srun": "", "scancel": ""}
    for name, answer in answers.items():
        _command(folder, name, answer)
    _command(folder, "sacct", "", 1, "Slurm accounting storage is disabled")
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    return folder


def _command(folder: Path, name: str, answer: str, code: int = 0, error: str = "") -> None:
    (folder / f"{name}.out").write_text(answer)
    script = f'echo "$@" >> "{folder}/{name}.calls"; cat "{folder}/{name}.out"; echo "{error}" >&2; exit {code}'
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


# ---- Searches as tasks


@given(st.lists(st.floats(1e-6, 100), max_size=30), st.floats(0, 50) | st.just(math.inf))
def test_searches_are_packed_in_their_order_as_long_as_they_fit(hours, limit):
    groups = tasks.pack(dict(enumerate(hours)), limit)
    assert [position for group in groups for position in group] == list(range(len(hours)))
    for group, following in zip(groups, [*groups, None][1:], strict=True):
        filled = 0.0
        for position in group:
            filled += hours[position]
        assert len(group) == 1 or filled <= limit
        assert following is None or filled + hours[following[0]] > limit


@pytest.fixture
def asked(monkeypatch) -> list:
    """The searches that jobs ask for instead of running them."""
    asked = []

    def sweep(section, profile, plan, **_):
        asked.extend(plan)
        return Report()

    monkeypatch.setattr("lib.experiments.sweep.sweep", sweep)
    return asked


@pytest.mark.parametrize("section", ["05_1", "05_2", "05_3"])
@pytest.mark.parametrize(("profile", "hours"), [("quick", 0), ("laptop", 1)])
def test_the_jobs_of_a_sweep_do_its_whole_plan_once(own_runs, monkeypatch, asked, section, profile, hours):
    monkeypatch.setattr(paths, "PAPER_DATA", own_runs.parent / "no_paper_data")
    work = tasks.sweep(section, profile, hours, "cpu")
    for task in work.tasks:
        tasks.do(work.kind, {}, json.loads(json.dumps(task.arguments)))
    searches = plan.searches(section, profile)
    assert [s for s in asked if s.threshold is not None] == [s for s in searches if s.threshold is not None]
    grids = [replace(s, sizes=(size,)) for s in searches if s.threshold is None for size in s.sizes]
    assert [s for s in asked if s.threshold is None] == grids
    assert hours or len(work.tasks) == len(asked)


def test_thousands_of_runs_are_at_most_a_thousand_tasks(own_runs, monkeypatch):
    monkeypatch.setattr(paths, "PAPER_DATA", own_runs.parent / "no_paper_data")
    work = tasks.sweep("05_1", "paper", 0, "cpu")
    assert 500 < len(work.tasks) <= 1000
    assert [i for task in work.tasks for i in task.arguments["positions"]] == list(range(7800))


def test_only_what_has_no_row_becomes_a_task(own_runs, asked):
    first, second = plan.searches("05_1", "smoke")
    _row(own_runs / "smoke" / "05_1", *first.pending({}))
    (task,) = tasks.sweep("05_1", "smoke", 1, "cpu").tasks
    tasks.do("sweep", {}, task.arguments)
    assert asked == [second] and task.title == "in-tool, 8 facts, seed 0"
    _row(own_runs / "smoke" / "05_1", *second.pending({}))
    assert tasks.sweep("05_1", "smoke", 1, "cpu").tasks == []


def test_a_task_with_a_failed_run_fails(own_runs, monkeypatch):
    report = Report(failed={"0123": "ValueError: no"})
    monkeypatch.setattr("lib.experiments.sweep.sweep", lambda *_, **__: report)
    (task,) = tasks.sweep("05_1", "smoke", 1, "cpu").tasks
    with pytest.raises(WorkError, match="0123: ValueError: no"):
        tasks.do("sweep", {}, task.arguments)


@pytest.mark.parametrize("section", OWN)
def test_a_section_with_a_sweep_of_its_own_is_one_task(own_runs, monkeypatch, section):
    asked = []

    def sweep(profile, dry_run=False, **how):
        asked.append((profile, dry_run, how))
        return Report(missing=CONFIGS, failed={} if dry_run else {"0123": "ValueError: no"})

    monkeypatch.setattr(f"{OWN[section]}.sweep", sweep)
    (task,) = tasks.sweep(section, "smoke", 1, "cpu").tasks
    with pytest.raises(WorkError, match="0123: ValueError: no"):
        tasks.do("sweep", {}, json.loads(json.dumps(task.arguments)))
    assert asked[1:] == [("smoke", False, {"device": "cpu"})] and task.title == f"section {section}, 8 runs"
    monkeypatch.setattr(f"{OWN[section]}.sweep", lambda *_, **__: Report())
    assert tasks.sweep(section, "smoke", 1, "cpu").tasks == []


def _row(folder: Path, *configs: RunConfig) -> None:
    for config in configs:
        row = FINISHED | {"run_id": config.run_id, "config": config.canonical_json()}
        (folder / config.run_id).mkdir(parents=True)
        (folder / config.run_id / "row.json").write_text(json.dumps(row))


# ---- The command line


def test_a_dry_run_prints_what_sbatch_would_get_and_leaves_nothing(own_runs, commands, itl):
    resources = ["--time", "30", "--account", "phys", "--qos", "low", "--constraint", "a100|h100"]
    arguments = ["sweep", "05_1", "--profile", "smoke", "--hours", "0", "--jobs", "7", *resources, "--dry-run"]
    code, script, said = itl("submit", *arguments)
    assert (code, said) == (0, "")
    flags = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2] for line in script.splitlines() if "#SBATCH" in line
    )
    expected = {"array": "0-1%2", "time": "30", "account": "phys", "qos": "low", "constraint": "'a100|h100'"}
    expected |= {"requeue": "", "signal": "USR2@90", "nodes": "1", "ntasks-per-node": "1", "chdir": str(Path.cwd())}
    assert expected.items() <= flags.items()
    assert flags.keys().isdisjoint({"partition", "mem", "cpus-per-task", "gpus-per-node"})  # Slurm's defaults
    assert f"export PYTHONPATH={own_runs}/submissions/sweep-05_1-smoke/code\n" in script
    assert f"export ITL_RUNS={own_runs}\n" in script and "\nsrun " in script
    assert not own_runs.exists() and not (commands / "sbatch.calls").exists()
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_a_training_has_a_process_a_gpu(own_runs, commands, itl):
    resources = ["--nodes", "2", "--gpus", "4", "--cpus", "3", "--partition", "gpu", "--mem", "8G"]
    code, script, said = itl("submit", "train", "--people", "2", *resources, "--dry-run")
    assert (code, said) == (0, "")
    for flag in ("nodes=2", "gpus-per-node=4", "ntasks-per-node=4", "cpus-per-task=3", "partition=gpu", "mem=8G"):
        assert f"#SBATCH --{flag}\n" in script
    assert "--array" not in script


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("submit train --people 0", "facts.n_people"),
        ("submit train --gpus -1", "resources.gpus"),
        ("submit sweep 05_9", "unknown experiment '05_9'"),
        ("submit sweep 05_1 --nodes 2", "each job of a sweep takes one node and at most one GPU"),
        ("submit sweep 05_1 --profile smoke --jobs 0", "'--jobs': Input should be greater than or equal to 1"),
        ("submit notebook 05_9", "'05_9' is not a notebook"),
        ("submit notebook 05_1 -p nothing=1", "05_1_parameter_bounds has no parameter 'nothing'"),
        ("submit notebook 05_1 --nodes 2", "a notebook runs on one node"),
        ("status nothing", "unknown submission 'nothing': there are none"),
        ("cancel nothing", "unknown submission 'nothing'"),
        ("retry nothing", "unknown submission 'nothing'"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(own_runs, commands, itl, arguments, sentence):
    code, printed, said = itl(*arguments.split())
    assert (code, printed, len(said.splitlines())) == (2, "", 1) and sentence in said
    assert not own_runs.exists()


@pytest.mark.parametrize("place", ["plan", "option", "runs", "folder"])
def test_no_name_adds_a_line_to_the_script_of_a_job(own_runs, commands, itl, tmp_path, monkeypatch, place):
    """Quotes do not help: bash takes the line after a comment for a command, and sbatch one more #SBATCH."""
    bad = tmp_path / "a\ntouch pwned;#"
    bad.mkdir()
    plan = (bad if place == "folder" else tmp_path) / ("b\ntouch pwned;#.yaml" if place == "plan" else "b.yaml")
    plan.write_text("base: {training: {steps: 4}}\nsizes: [8]\n")
    monkeypatch.chdir(plan.parent)
    if place == "runs":
        monkeypatch.setenv("ITL_RUNS", str(bad / "runs"))
    options = ["--account", "me\n#SBATCH --uid=0"] if place == "option" else []
    for dry in (["--dry-run"], []):
        code, printed, said = itl("submit", "sweep", plan.name, *options, *dry)
        assert (code, printed, len(said.splitlines())) == (2, "", 1) and "a line break in a name or an option" in said
    assert not (commands / "sbatch.calls").exists() and not any(tmp_path.rglob("submissions/*"))


def test_a_job_trains_on_what_was_submitted_wherever_it_starts(own_runs, commands, itl, tmp_path, monkeypatch):
    """People and vocabulary are copied; the run is the one that `itl train` would have made then and there."""
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    elsewhere.mkdir()
    here.mkdir()
    monkeypatch.chdir(here)
    (here / "people.csv").write_text("name,pet\nAnn,cat\nBob,dog\n")
    write_ranks(here / "bpe.tiktoken", train_bpe())
    (here / "talk.jsonl").write_text('[["user", "Hi"], ["assistant", "Ho"]]\n')
    settings = ["tokenizer=bpe.tiktoken", "model.vocab_size=404", "model.d_model=8", "training.steps=2"]
    settings += ['training.files={"talk.jsonl": 0.5}', "evaluation.every=null"]
    options = ["--csv", "people.csv", *(word for setting in settings for word in ("--set", setting))]
    assert itl("train", *options, "--out", "reference")[0] == 0
    assert itl("submit", "train", *options)[0] == 0
    (here / "people.csv").write_text("name,pet\nAnn,eel\n")
    write_ranks(here / "bpe.tiktoken", train_bpe(n_people=20))
    monkeypatch.chdir(elsewhere)
    (submission,) = submissions.everything()
    submissions.perform(submission.name, 0)
    folder = Path(submission.tasks[0].title)
    rows = [json.loads((run / "row.json").read_text()) for run in (here / "reference", folder)]
    same = rows[0].keys() - {"train_seconds", "finished_at"}
    assert {name: rows[1][name] for name in same} == {name: rows[0][name] for name in same}
    assert folder.name == rows[0]["run_id"] and json.loads(submission.outcome(0).read_text()) == {"error": None}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--csv", "nobody.csv"], "cannot read people from nobody.csv"),
        (["--csv", "bad.csv"], "bad.csv has no column 'name'"),
        (["--set", "tokenizer=none.tiktoken"], "tokenizer = 'none.tiktoken' is no tokenizer"),
        (["--set", 'training.files={"none.jsonl": 0.5}'], "cannot read the dialogs of none.jsonl"),
        (["--set", 'training.files={".": 0.5}'], "cannot read the dialogs of ."),
    ],
)
def test_files_that_a_job_could_not_read_are_refused_at_once(
    own_runs, commands, itl, tmp_path, monkeypatch, options, sentence
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.csv").write_text("who,pet\nAnn,cat\n")
    for more in ([], ["--dry-run"]):
        code, printed, said = itl("submit", "train", *options, *more)
        assert (code, printed, len(said.splitlines())) == (2, "", 1) and sentence in said
    assert not own_runs.exists() and not (commands / "sbatch.calls").exists()


def test_a_fine_tuning_starts_where_it_was_submitted(own_runs, commands, itl, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert itl("submit", "finetune", "--model", "some/folder")[0] == 0
    began = []
    monkeypatch.setattr("lib.finetune.train.finetune", lambda config, *_, **__: began.append((config.base, Path.cwd())))
    monkeypatch.chdir("/")
    (submission,) = submissions.everything()
    submissions.perform(submission.name, 0)
    assert began == [("some/folder", tmp_path)] and Path.cwd() == Path("/")
    monkeypatch.chdir(tmp_path)
    code, _, said = itl("submit", "finetune", "--set", "task=trivia", "--set", "source=none.jsonl")
    assert (code, len(said.splitlines())) == (2, 1) and "none.jsonl" in said


@pytest.mark.parametrize("command", ["submit sweep 05_1 --dry-run", "submit train", "submit notebook 05_1", "status"])
def test_without_slurm_one_sentence_says_what_to_use(own_runs, tmp_path, monkeypatch, itl, command):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert itl(*command.split()) == (2, "", f"itl: {job.NO_SLURM}\n")
    assert "itl sweep --jobs N" in job.NO_SLURM
    assert not own_runs.exists()


def test_what_slurm_refuses_leaves_nothing(own_runs, commands, itl):
    _command(commands, "sbatch", "", 1, "sbatch: error: invalid account")
    said = "itl: Slurm refused the job: sbatch: error: invalid account\n"
    assert itl("submit", "train", "--people", "2") == (2, "", said)
    assert list((own_runs / "submissions").iterdir()) == []


# ---- Records


CONFIGS = [RunConfig.parse({"seed": seed, "facts": {"n_people": 2}}) for seed in range(8)]


def _submission(n_tasks: int = 1) -> Submission:
    """A submission of runs, which have the jobs 9_0, 9_1 and so on."""
    made = [tasks.train(config, Path("run"), UNOBSERVED, {}).tasks[0] for config in CONFIGS[:n_tasks]]
    planned = submissions.plan(Work(name="mine", kind="train", tasks=made), Resources(nodes=2), 2)
    planned.jobs.update({i: f"9_{i}" for i in range(n_tasks)})
    for folder in ("logs", "outcomes"):
        (planned.folder / folder).mkdir(parents=True)
    planned.write()
    return planned


def test_a_submission_is_read_as_it_was_written_and_the_next_one_has_another_name(own_runs, commands):
    first = _submission(2)
    second = submissions.plan(Work(name="mine", kind="notebook", tasks=[]), Resources())
    assert (first.name, second.name) == ("mine", "mine-2")
    second.folder.mkdir()
    second.write()
    assert submissions.everything() == [first, second]
    assert "cpus" not in json.loads((first.folder / submissions.RECORD).read_text())["resources"]  # at its default


def test_a_damaged_submission_harms_no_other(own_runs, commands, capsys):
    made = _submission()
    made.write()
    other = submissions.submissions_dir() / "other" / submissions.RECORD
    other.parent.mkdir()
    other.write_text('{"kind": "sweep", "tasks": 3}')
    assert [submission.name for submission in submissions.everything()] == [made.name]
    assert f"{other} is damaged" in capsys.readouterr().err
    with pytest.raises(DamagedFile, match="is damaged"):
        submissions.find("other")


def test_states_follow_from_outcomes_and_the_queue(own_runs, commands):
    made = _submission(8)
    del made.jobs[7]
    for position, error in {0: None, 1: None, 3: "ValueError: early", 4: "ValueError: no"}.items():
        paths.write_json(made.outcome(position), {"error": error})
    (made.logs / "9_3_0_log.out").write_text("training: 10/600\rtraining: 20/600\n\n")
    queue = {
        "9_0": ("COMPLETING", "None"),
        "9_2": ("PENDING", "Priority"),
        "9_3": ("RUNNING", "None"),
        "9_4": ("FAILED", "NonZeroExitCode"),
        "9_5": ("OUT_OF_MEMORY", "OutOfMemory"),
        "9_6": ("CANCELLED", "None"),
    }
    standings = submissions.status(made, queue)
    assert [(s.state, s.reason) for s in standings] == [
        ("done", ""),
        ("done", ""),
        ("queued", "Priority"),
        ("running", ""),
        ("failed", "ValueError: no"),
        ("failed", "OUT_OF_MEMORY (OutOfMemory)"),
        ("missing", "CANCELLED"),
        ("missing", "Slurm no longer knows its job"),
    ]
    assert [s.last_line for s in standings if s.last_line] == ["training: 20/600"]
    assert submissions.summary(standings) == "1 queued, 1 running, 2 done, 2 failed, 2 missing"


def test_a_job_that_has_not_ended_is_running_and_one_that_is_held_is_queued(own_runs, commands):
    made = _submission()
    expected = dict.fromkeys(["SIGNALING", "STAGE_OUT", "STOPPED", "RESIZING", "NEWER_THAN_THIS"], "running")
    expected |= dict.fromkeys(["REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD", "SPECIAL_EXIT"], "queued")
    assert {state: submissions.status(made, {"9_0": (state, "None")})[0].state for state in expected} == expected


def test_an_outcome_that_a_power_cut_left_empty_is_a_failure(own_runs, commands):
    made = _submission(2)
    made.outcome(0).touch()
    paths.write_json(made.outcome(1), {"error": None})
    first, second = submissions.status(made, {})
    assert first.state == "failed" and "0.json is damaged" in first.reason and second.state == "done"


def test_the_outcome_of_a_failed_task_is_the_first_error_of_its_processes(own_runs, commands, monkeypatch):
    made = _submission()

    def perform(message: str) -> None:
        monkeypatch.setattr("lib.training.run.run", lambda *_, **__: 1 / 0 if not message else _raise(message))
        with pytest.raises((ValueError, ZeroDivisionError)):
            submissions.perform("mine", 0)

    perform("no people")
    perform("")
    assert json.loads(made.outcome(0).read_text()) == {"error": "ValueError: no people"}
    monkeypatch.setattr("lib.training.run.run", lambda *_, **__: None)
    monkeypatch.setenv("RANK", "1")
    submissions.perform("mine", 0)
    told = json.loads(made.outcome(0).read_text())
    assert told == {"error": "ValueError: no people"}  # only the first process says that all is done
    for first in ("0", ""):
        monkeypatch.setenv("RANK", first)
        made.outcome(0).unlink()
        submissions.perform("mine", 0)
        assert json.loads(made.outcome(0).read_text()) == {"error": None}


def _raise(message: str) -> None:
    raise ValueError(message)


def test_retry_submits_what_failed_or_is_missing_and_cancel_ends_what_is_alive(own_runs, commands):
    made = _submission(5)
    for position, error in {0: None, 1: "no"}.items():
        paths.write_json(made.outcome(position), {"error": error})
    (commands / "squeue.out").write_text("9_0|COMPLETED|None\n9_2|PENDING|Priority\n9_3|RUNNING|None\n")
    assert submissions.cancel(made) == 2
    assert (commands / "scancel.calls").read_text() == "9_2 9_3\n"
    assert submissions.retry(made) == 2
    assert submissions.find("mine").jobs == {0: "9_0", 1: "71_0", 2: "9_2", 3: "9_3", 4: "71_1"}
    assert not made.outcome(1).exists()
    assert "#SBATCH --array=0-1%2" in (made.logs / "71_submission.sh").read_text()
    jobs = [pickle.loads((made.logs / f"71_{i}_submitted.pkl").read_bytes()) for i in range(2)]
    assert [job.args for job in jobs] == [(submissions.perform, "mine", 1), (submissions.perform, "mine", 4)]


def test_accounting_tells_of_jobs_that_the_queue_has_forgotten(commands):
    _command(commands, "sacct", "a note\n\n7_0|TIMEOUT|None\n7_1|CANCELLED by 0|None\n7_2|PENDING|None\n")
    (commands / "squeue.out").write_text("7_2|RUNNING|None\n")
    assert job.queue() == {"7_0": ("TIMEOUT", "None"), "7_1": ("CANCELLED", "None"), "7_2": ("RUNNING", "None")}


@pytest.mark.parametrize("state, comes_back", [("RUNNING", True), ("SIGNALING", True), ("COMPLETING", False)])
def test_a_job_that_slurm_is_not_ending_is_requeued(commands, monkeypatch, state, comes_back):
    def preempted():
        raise Preempted

    requeued = []
    monkeypatch.setattr(submitit, "JobEnvironment", lambda: SimpleNamespace(num_tasks=1, raw_job_id="7"))
    monkeypatch.setattr(signal, "getsignal", lambda _: lambda *signalled: requeued.append(signalled))
    (commands / "squeue.out").write_text(f"{state}\n")
    with nullcontext() if comes_back else pytest.raises(SystemExit):
        job.Job()(preempted)
    assert bool(requeued) == comes_back


# ---- The copy of the code


@pytest.mark.slow
def test_a_copy_of_the_code_says_what_commit_it_is(tmp_path):
    project, git = tmp_path / "project", ["git", "-C", str(tmp_path / "project")]
    submissions.snapshot(project)
    assert (project / COMMIT).exists() and (project / "lib" / "slurm" / "job.py").exists()
    (project / COMMIT).unlink()
    identity = ["-c", "user.name=A Test", "-c", "user.email=test@localhost"]
    for arguments in (["init", "--quiet"], ["add", "."], [*identity, "commit", "--quiet", "--message=A test"]):
        subprocess.run(git + arguments, check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()

    def copy(name: str) -> str:
        """The commit that code copied from the project says it is of."""
        ask = "import sys; from pathlib import Path; from lib import provenance; from lib.slurm import submissions;"
        copied = f"{ask} submissions.snapshot(Path(sys.argv[1]))"
        _python(project, copied, str(tmp_path / name))
        return _python(tmp_path / name, f"{ask} print(provenance.commit())")

    assert copy("clean") == head
    (project / "lib" / "base.py").write_text((project / "lib" / "base.py").read_text() + "\nEDITED = True\n")
    assert copy("dirty") == f"{head}-dirty"
    assert "EDITED" in (tmp_path / "dirty" / "lib" / "base.py").read_text()
    assert _python(tmp_path / "clean", "from lib import base; print(hasattr(base, 'EDITED'))") == "False"


def _python(folder: Path, code: str, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONSAFEPATH": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()
