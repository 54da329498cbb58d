"""What is handed to Slurm and how it stands, without a cluster (tests/cluster has one).

Where commands of Slurm are needed, scripts of the same names answer what a real cluster answered.
"""

import json
import math
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vocabularies import train_bpe, write_ranks

from lib import paths
from lib.base import InputError
from lib.cli import app
from lib.config import RunConfig
from lib.experiments import plan
from lib.experiments.search import Search
from lib.provenance import COMMIT
from lib.slurm import job, submissions
from lib.slurm.job import NodeKind, Resources
from lib.slurm.submissions import Submission, Sweep

SINFO = """debug*|up|2:00:00|64|256000|(null)
long|up|infinite|64|512000|(null)
long|up|infinite|32|128000|(null)
gpu|up|3-00:00:00|96|1000000|gpu:a100:8(S:0-1)
mixed|up|1-12:00:00|32|64000|gpu:v100:2,gpu:t4:1,nvme:3
small|up|30:00|2|1|gpu:1g.10gb:7
broken|down|infinite|64|256000|gpu:4
"""
KINDS = job.parse_sinfo(SINFO)


@pytest.fixture
def runs(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("ITL_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


@pytest.fixture
def commands(tmp_path, monkeypatch) -> Path:
    """A folder with commands of Slurm; sbatch accepts everything, and nothing is in the queue."""
    folder = tmp_path / "bin"
    folder.mkdir()
    answers = {"sinfo": SINFO, "sbatch": "Submitted batch job 71\n", "squeue": "", "srun": "", "scancel": ""}
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


# ---- Slurm's words


@given(st.integers(0, 40), st.integers(0, 23), st.integers(0, 59), st.integers(0, 59))
def test_times_are_read_as_slurm_writes_them(days, hours, minutes, seconds):
    total = math.ceil(((days * 24 + hours) * 60) + minutes + seconds / 60)
    assert job.minutes(f"{days}-{hours:02}:{minutes:02}:{seconds:02}") == total
    assert job.minutes(f"{days}-{hours}:{minutes}") == (days * 24 + hours) * 60 + minutes
    assert job.minutes(f"{days}-{hours}") == (days * 24 + hours) * 60
    assert job.minutes(f"{hours}:{minutes:02}:{seconds:02}") == math.ceil(hours * 60 + minutes + seconds / 60)
    assert job.minutes(f"{minutes}:{seconds:02}") == math.ceil(minutes + seconds / 60)
    assert job.minutes(str(minutes)) == minutes


@pytest.mark.parametrize("text", ["", "soon", "1h", "1:2:3:4", "-5", "1-", "1.5", "1:00:00 "])
def test_other_times_are_refused(text):
    with pytest.raises(InputError, match="--time takes minutes, hours:minutes:seconds"):
        job.minutes(text)


def test_nodes_are_read_as_sinfo_prints_them():
    assert KINDS == [
        NodeKind("debug", True, 120, 64, 256_000, 0),
        NodeKind("long", False, None, 64, 512_000, 0),
        NodeKind("long", False, None, 32, 128_000, 0),
        NodeKind("gpu", False, 4320, 96, 1_000_000, 8),
        NodeKind("mixed", False, 2160, 32, 64_000, 3),
        NodeKind("small", False, 30, 2, 1, 7),
    ]


# ---- What a job gets


@pytest.mark.parametrize(
    ("asked", "partition", "time", "cpus", "mem"),
    [
        ({}, "debug", "120", 1, "4000M"),
        ({"cpus": 16}, "debug", "120", 16, "64000M"),
        ({"partition": "long"}, "long", "1440", 1, "4000M"),
        ({"partition": "long", "time": "3-00"}, "long", "3-00", 1, "4000M"),
        ({"partition": "long", "cpus": 32}, "long", "1440", 32, "128000M"),
        ({"gpus": 1}, "gpu", "1440", 12, "125000M"),
        ({"gpus": 8, "tasks": 8}, "gpu", "1440", 12, "1000000M"),
        ({"gpus": 2, "mem": "8G", "cpus": 1}, "gpu", "1440", 1, "8G"),
        ({"gpus": 3, "partition": "mixed"}, "mixed", "1440", 32, "64000M"),
        ({"partition": "small"}, "small", "30", 1, None),
        ({"partition": "debug,long", "cpus": 32}, "debug,long", "120", 32, "128000M"),
    ],
)
def test_what_is_left_open_is_chosen_from_the_nodes(asked, partition, time, cpus, mem):
    filled = job.fill(Resources(**asked), KINDS)
    expected = {"partition": partition, "time": time, "cpus": cpus, "mem": mem}
    assert filled == Resources(**asked | expected)


_kinds = st.builds(
    NodeKind,
    st.sampled_from("abc"),
    st.booleans(),
    st.none() | st.integers(1, 10_000),
    st.integers(1, 256),
    st.integers(2, 2_000_000),
    st.integers(0, 8),
)


@given(st.lists(_kinds, min_size=1, max_size=6), st.integers(0, 8), st.sampled_from([None, "a", "b", "a,b"]))
def test_a_filled_request_fits_a_node_of_its_partition_or_says_that_none_does(kinds, gpus, partition):
    wanted = partition.split(",") if partition else "abc"
    able = [kind for kind in kinds if kind.partition in wanted and kind.gpus >= gpus]
    missing = partition and not {*wanted} <= {kind.partition for kind in kinds}
    if missing or not able:
        with pytest.raises(InputError, match="no partition" if missing else f"no node has {gpus} GPUs"):
            job.fill(Resources(gpus=gpus, partition=partition), kinds)
        return
    filled = job.fill(Resources(gpus=gpus, partition=partition), kinds)
    assert any(
        kind.partition in filled.partition.split(",")
        and kind.cpus >= filled.cpus
        and kind.megabytes >= int(filled.mem.removesuffix("M"))
        and (kind.minutes or math.inf) >= job.minutes(filled.time)
        for kind in able
    )


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"partition": "fast"}, "no partition 'fast' takes jobs here: there are debug, long, gpu, mixed, small"),
        ({"partition": "broken"}, "no partition 'broken' takes jobs"),
        ({"gpus": 9}, "no node has 9 GPUs: the most in debug, long, gpu, mixed, small is 8"),
        ({"gpus": 1, "partition": "debug"}, "no node has 1 GPUs: the most in debug is 0"),
        ({"time": "0"}, "--time takes at least a minute"),
        ({"time": "infinite"}, "--time takes at least a minute and no more than"),
        ({"time": "soon"}, "--time takes minutes"),
    ],
)
def test_what_no_node_can_give_is_refused(asked, sentence):
    with pytest.raises(InputError, match=sentence):
        job.fill(Resources(**asked), KINDS)


# ---- Searches as tasks


@given(st.lists(st.floats(1e-6, 100), max_size=30), st.floats(0, 50))
def test_searches_are_packed_in_their_order_as_long_as_they_fit(hours, limit):
    groups = submissions.pack(hours, limit)
    assert [position for group in groups for position in group] == list(range(len(hours)))
    for group, following in zip(groups, [*groups, None][1:], strict=True):
        filled = 0.0
        for position in group:
            filled += hours[position]
        assert len(group) == 1 or filled <= limit
        assert following is None or filled + hours[following[0]] > limit


@pytest.mark.parametrize("section", ["05_1", "05_2", "05_3"])
@pytest.mark.parametrize("profile", paths.PROFILES)
@pytest.mark.parametrize("hours", [0, 1])
def test_tasks_hold_the_whole_plan_once_and_as_plain_data(runs, monkeypatch, section, profile, hours):
    monkeypatch.setattr(paths, "PAPER_DATA", runs.parent / "no_paper_data")
    tasks = submissions.sweep_tasks(section, profile, hours)
    assert 0 < len(tasks) <= 1000
    again = [Sweep.parse(json.loads(json.dumps(task.model_dump()))) for task in tasks]
    planned = [search for task in again for search in task.plan]
    searches = plan.searches(section, profile)
    assert [s for s in planned if s.threshold is not None] == [s for s in searches if s.threshold is not None]
    assert all(len(search.sizes) == 1 for search in planned if search.threshold is None)
    runs_of = [config.run_id for search in planned if search.threshold is None for config in search.pending({})]
    grids = [config.run_id for search in searches if search.threshold is None for config in search.pending({})]
    assert runs_of == grids
    if hours == 0 and len(planned) <= 1000:
        assert len(tasks) == len(planned)


def test_only_what_has_no_row_becomes_a_task(runs):
    first, second = plan.searches("05_1", "smoke")
    _row(runs / "smoke" / "05_1", *first.pending({}))
    (task,) = submissions.sweep_tasks("05_1", "smoke", 1)
    assert task.plan == [second]
    _row(runs / "smoke" / "05_1", *second.pending({}))
    assert submissions.sweep_tasks("05_1", "smoke", 1) == []


def _row(folder: Path, *configs: RunConfig) -> None:
    for config in configs:
        row = {"run_id": config.run_id, "recall": 0.5, "steps": 20, "steps_budget": 20, "train_seconds": 1.0}
        row["device"] = "cpu"
        (folder / config.run_id).mkdir(parents=True)
        (folder / config.run_id / "row.json").write_text(json.dumps(row | {"config": config.canonical_json()}))


# ---- The command line


@pytest.fixture
def itl(monkeypatch, capsys):
    """Runs a command in this process; its exit code, and what it printed and complained."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["itl", *arguments])
        with pytest.raises(SystemExit) as ended:
            app.main()
        return ended.value.code, *capsys.readouterr()

    return run


def test_a_dry_run_prints_what_sbatch_would_get_and_leaves_nothing(runs, commands, itl):
    resources = ["--time", "30", "--account", "phys", "--qos", "low", "--constraint", "a100|h100"]
    arguments = ["sweep", "05_1", "--profile", "smoke", "--hours", "0", "--jobs", "7", *resources, "--dry-run"]
    code, script, said = itl("submit", *arguments)
    assert (code, said) == (0, "")
    flags = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2] for line in script.splitlines() if "#SBATCH" in line
    )
    expected = {"array": "0-1%2", "time": "30", "partition": "debug", "mem": "4000M", "account": "phys", "qos": "low"}
    expected |= {"constraint": "'a100|h100'", "requeue": "", "signal": "USR2@90", "nodes": "1", "cpus-per-task": "1"}
    assert expected.items() <= flags.items()
    assert f"export PYTHONPATH={runs}/submissions/sweep-05_1-smoke/code\n" in script
    assert f"export ITL_RUNS={runs}\n" in script and "\nsrun " in script
    assert not runs.exists() and not (commands / "sbatch.calls").exists()
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_a_training_has_a_process_a_gpu(runs, commands, itl):
    code, script, said = itl("submit", "train", "--people", "2", "--nodes", "2", "--gpus", "4", "--dry-run")
    assert (code, said) == (0, "")
    for flag in ("nodes=2", "gpus-per-node=4", "ntasks-per-node=4", "cpus-per-task=12", "partition=gpu", "mem=500000M"):
        assert f"#SBATCH --{flag}\n" in script
    assert "--array" not in script


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("submit train --people 0", "facts.n_people"),
        ("submit train --time soon", "--time takes minutes"),
        ("submit train --mem lots", "resources.mem"),
        ("submit train --partition fast", "no partition 'fast' takes jobs here"),
        ("submit sweep 05_9", "there is no experiment 05_9"),
        ("submit sweep 05_1 --nodes 2", "each job of a sweep takes one node and at most one GPU"),
        ("submit sweep 05_1 --profile smoke --jobs 0", "at least one job"),
        ("submit notebook 05_9", "'05_9' is not a notebook"),
        ("submit notebook 05_1 -p nothing=1", "05_1_parameter_bounds has no parameter 'nothing'"),
        ("submit notebook 05_1 --nodes 2", "a notebook runs on one node"),
        ("status nothing", "there is no submission 'nothing': there are none"),
        ("cancel nothing", "there is no submission 'nothing'"),
        ("retry nothing", "there is no submission 'nothing'"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(runs, commands, itl, arguments, sentence):
    code, printed, said = itl(*arguments.split())
    assert (code, printed, len(said.splitlines())) == (2, "", 1) and sentence in said
    assert not runs.exists()


def test_a_job_trains_on_what_was_submitted_wherever_it_starts(runs, commands, itl, tmp_path, monkeypatch):
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
    submissions.perform(str(submission.folder), 0)
    rows = [
        json.loads((Path(task) / "row.json").read_text())
        for task in (here / "reference", submission.tasks[0].directory)
    ]
    same = rows[0].keys() - {"train_seconds", "finished_at"}
    assert {name: rows[1][name] for name in same} == {name: rows[0][name] for name in same}
    assert Path(submission.tasks[0].directory).name == rows[0]["run_id"]


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
    runs, commands, itl, tmp_path, monkeypatch, options, sentence
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.csv").write_text("who,pet\nAnn,cat\n")
    for more in ([], ["--dry-run"]):
        code, printed, said = itl("submit", "train", *options, *more)
        assert (code, printed, len(said.splitlines())) == (2, "", 1) and sentence in said
    assert not runs.exists() and not (commands / "sbatch.calls").exists()


def test_a_fine_tuning_starts_where_it_was_submitted(runs, commands, itl, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert itl("submit", "finetune", "--model", "some/folder")[0] == 0
    began = []
    monkeypatch.setattr("lib.finetune.train.finetune", lambda config, *_, **__: began.append((config.base, Path.cwd())))
    monkeypatch.chdir("/")
    (submission,) = submissions.everything()
    submissions.perform(str(submission.folder), 0)
    assert began == [("some/folder", tmp_path)] and Path.cwd() == Path("/")
    monkeypatch.chdir(tmp_path)
    code, _, said = itl("submit", "finetune", "--set", "task=trivia", "--set", "source=none.jsonl")
    assert (code, len(said.splitlines())) == (2, 1) and "none.jsonl" in said


@pytest.mark.parametrize("command", ["submit sweep 05_1 --dry-run", "submit train", "submit notebook 05_1", "status"])
def test_without_slurm_one_sentence_says_what_to_use(runs, tmp_path, monkeypatch, itl, command):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert itl(*command.split()) == (2, "", f"itl: {job.NO_SLURM}\n")
    assert "itl sweep --jobs N" in job.NO_SLURM
    assert not runs.exists()


def test_what_slurm_refuses_leaves_nothing(runs, commands, itl):
    _command(commands, "sbatch", "", 1, "sbatch: error: invalid account")
    said = "itl: Slurm refused the job: sbatch: error: invalid account\n"
    assert itl("submit", "train", "--people", "2") == (2, "", said)
    assert list((runs / "submissions").iterdir()) == []


# ---- Records


CONFIGS = [RunConfig.parse({"seed": seed, "facts": {"n_people": 2}}) for seed in range(8)]


def _submission(tasks, jobs, name: str = "mine") -> Submission:
    resources = job.fill(Resources(), KINDS)
    made = Submission(submissions.submissions_dir() / name, tasks, resources, 2, time.time(), jobs)
    made.logs.mkdir(parents=True)
    made.write()
    return made


def test_a_submission_is_read_as_it_was_written(runs):
    search = plan.searches("05_1", "quick")[0]
    for name, task in {
        "train": submissions.train_task(CONFIGS[0], Path("here")),
        "sweep": submissions.sweep_tasks("05_1", "quick", 1)[0],
        "notebook": submissions.notebook_task("05_1", "smoke", ["threshold=0.5"]),
        "finetune": submissions.Finetune(config={"n_facts": 8}, directory="there"),
    }.items():
        made = _submission([task], ["5"], name)
        assert submissions.find(name) == made
    assert submissions.find("sweep").tasks[0].plan[0] == search
    assert [made.name for made in submissions.everything()] == ["train", "sweep", "notebook", "finetune"]


def test_states_follow_from_results_errors_and_the_queue(runs):
    tasks = [submissions.train_task(config, runs / "train" / config.run_id) for config in CONFIGS]
    made = _submission(tasks, [f"9_{i}" for i in range(7)] + [None])
    _row(runs / "train", CONFIGS[0], CONFIGS[1])
    for job_id, outcome in {
        "9_1": ("error", "Traceback\nValueError: late\n"),
        "9_4": ("error", "Tr\nValueError: no\n"),
    }.items():
        (made.logs / f"{job_id}_0_result.pkl").write_bytes(pickle.dumps(outcome))
    (made.logs / "9_3_0_log.out").write_text("training: 10/600\rtraining: 20/600\n\n")
    queue = {
        "9_0": ("RUNNING", "None"),
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


def test_a_sweeps_task_is_done_when_its_searches_are_over_whatever_the_plan_is_now(runs, monkeypatch):
    plan = [Search(config, threshold=None, sizes=(4, 8)) for config in CONFIGS[:2]]
    monkeypatch.setattr(submissions, "searches", lambda section, profile: plan)
    tasks = submissions.sweep_tasks("05_1", "smoke", 0)
    assert len(tasks) == 4
    made = _submission(tasks, ["9_0", "9_1", "9_2", "9_3"])
    _row(runs / "smoke" / "05_1", plan[0].config(8), plan[1].config(4))
    monkeypatch.undo()
    monkeypatch.setenv("ITL_RUNS", str(runs))
    assert [s.state for s in submissions.status(made, {})] == ["missing", "done", "done", "missing"]


def test_a_notebook_is_done_when_its_copy_is_newer_than_the_submission(runs):
    made = _submission([submissions.notebook_task("05_1", "smoke", [])], ["5"])
    executed = runs / "smoke" / "notebooks" / "05_1_parameter_bounds.ipynb"
    executed.parent.mkdir(parents=True)
    executed.touch()
    assert [s.state for s in submissions.status(made, {})] == ["done"]
    os.utime(executed, (made.submitted_at - 10, made.submitted_at - 10))
    assert [s.state for s in submissions.status(made, {"5": ("PENDING", "Resources")})] == ["queued"]


def test_retry_submits_what_failed_or_is_missing_and_cancel_ends_what_is_alive(runs, commands):
    tasks = [submissions.train_task(config, runs / "train" / config.run_id) for config in CONFIGS[:5]]
    made = _submission(tasks, [f"9_{i}" for i in range(5)])
    _row(runs / "train", CONFIGS[0])
    (made.logs / "9_1_0_result.pkl").write_bytes(pickle.dumps(("error", "no")))
    (commands / "squeue.out").write_text("9_0|COMPLETED|None\n9_2|PENDING|Priority\n9_3|RUNNING|None\n")
    assert submissions.cancel(made) == 2
    assert (commands / "scancel.calls").read_text() == "9_2 9_3\n"
    assert submissions.retry(made) == 2
    assert submissions.find("mine").jobs == ["9_0", "71_0", "9_2", "9_3", "71_1"]
    assert "#SBATCH --array=0-1%2" in (made.logs / "71_submission.sh").read_text()
    jobs = [pickle.loads((made.logs / f"71_{i}_submitted.pkl").read_bytes()).function for i in range(2)]
    assert [job.arguments for job in jobs] == [(str(made.folder), 1), (str(made.folder), 4)]


def test_accounting_tells_of_jobs_that_the_queue_has_forgotten(commands):
    _command(commands, "sacct", "7_0|TIMEOUT|None\n7_1|CANCELLED by 0|None\n7_2|PENDING|None\n")
    (commands / "squeue.out").write_text("7_2|RUNNING|None\n")
    assert job.queue() == {"7_0": ("TIMEOUT", "None"), "7_1": ("CANCELLED", "None"), "7_2": ("RUNNING", "None")}


# ---- The copy of the code


@pytest.mark.slow
def test_a_copy_of_the_code_says_what_commit_it_is(tmp_path):
    project, git = tmp_path / "project", ["git", "-C", str(tmp_path / "project")]
    submissions.snapshot(project)
    assert (project / COMMIT).exists() and (project / "lib" / "slurm.py").exists()
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
