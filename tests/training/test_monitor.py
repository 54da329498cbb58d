"""Progress that suits its audience, and a record that survives a kill."""

import io
import json
import os
import struct
import sys
from contextlib import suppress
from types import SimpleNamespace

import nbformat
import pytest
import ranks
import torch
from full_disk import full_after
from nbconvert.preprocessors import ExecutePreprocessor
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm
from waiting import wait_for
from wandb.proto.wandb_internal_pb2 import Record

from lib.base import InputError, WorkError
from lib.config import UNOBSERVED, Observers
from lib.paths import ROOT
from lib.progress import _Lines, progress
from lib.training import monitor
from lib.training.distributed import Preempted
from lib.training.monitor import Monitor, Throughput, check_observers, read_record
from lib.training.profiling import WAIT, WARM_UP


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def nobody_watches(monkeypatch, capsys):
    """Whatever the tests are started from: no terminal, no kernel, nothing asked for."""
    monkeypatch.delenv("ITL_PROGRESS", raising=False)
    monkeypatch.delitem(sys.modules, "IPython", raising=False)


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves only by hand."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr("tqdm.std.time", lambda: clock.now)
    return clock


# ---- Progress


def test_a_terminal_gets_a_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress(4, "training", initial=1) as bar:
        assert isinstance(bar, tqdm) and not bar.disable
        assert (bar.n, bar.total) == (1, 4)
        bar.update(3)
        assert "training" in sys.stderr.getvalue()


def test_a_kernel_gets_a_widget_that_leaves_nothing_in_the_notebook():
    cells = ["from lib.progress import progress; bar = progress(4, 'open')", "with progress(4, 'x') as b: b.update(3)"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    ExecutePreprocessor(kernel_name="python3").preprocess(notebook, {"metadata": {"path": str(ROOT)}})
    (still_open,), (closed,) = (cell.outputs for cell in notebook.cells)
    assert "application/vnd.jupyter.widget-view+json" in still_open.data
    assert closed.data == {"text/plain": ""}


@pytest.mark.parametrize("shell", [None, SimpleNamespace()])
def test_the_notebook_runner_and_ipython_in_a_terminal_are_no_kernel(monkeypatch, shell):
    monkeypatch.setitem(sys.modules, "ipykernel", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    assert isinstance(progress(4, "training"), _Lines)


def test_where_nobody_watches_there_are_lines_now_and_then(clock, capsys):
    with progress(1000, "training") as lines:
        for step in range(1000):
            clock.now += 0.035
            lines.set_postfix_str(f"loss={step}", refresh=False)
            lines.update()
    written = capsys.readouterr().err.splitlines()
    assert len(written) == 3  # 35 seconds, a line every 10
    assert written[0].startswith("training: 286/1000 [00:10<00:24, 28.57it/s, loss=285]")


def test_what_is_over_soon_prints_nothing(clock, capsys):
    with progress(1000, "training") as lines:
        clock.now += 9.9
        lines.update(1000)
    assert capsys.readouterr().err == ""


def test_the_speed_of_a_resumed_run_is_that_of_its_own_steps(clock, capsys):
    lines = progress(100, "training", initial=60)
    clock.now += 10
    lines.update(20)
    assert capsys.readouterr().err.startswith("training: 80/100 [00:10<00:10,  2.00it/s]")


def test_lines_in_a_kernel_go_to_its_output(monkeypatch, clock, capsys):
    monkeypatch.setenv("ITL_PROGRESS", "lines")
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel=object())))
    lines = progress(10, "training")
    clock.now += 10
    lines.update()
    written = capsys.readouterr()
    assert written.out.startswith("training: 1/10") and written.err == ""


@pytest.mark.parametrize(
    ("asked", "description", "kind"),
    [("lines", "training", "lines"), ("off", "training", "off"), ("", None, "off"), ("lines", None, "off")],
)
def test_progress_can_be_asked_for_and_switched_off(monkeypatch, asked, description, kind):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("ITL_PROGRESS", asked)
    with progress(10, description) as bar:
        assert isinstance(bar, _Lines) if kind == "lines" else bar.disable
        bar.set_postfix_str("loss=1", refresh=False)
        bar.update(10)
    assert sys.stderr.getvalue() == ""


# ---- Metrics


def test_metrics_are_lines_of_json_that_can_be_read_while_they_are_written(tmp_path):
    with Monitor(tmp_path / "new", total=3) as record:
        record.log(1, loss=0.1 + 0.2)
        assert read_record(tmp_path / "new" / "metrics.jsonl") == [{"step": 1, "loss": 0.1 + 0.2}]
        record.log(2, loss=0.25, recall=1.0)
    lines = (tmp_path / "new" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "loss": 0.30000000000000004},
        {"step": 2, "loss": 0.25, "recall": 1.0},
    ]


def test_a_resumed_record_drops_what_came_after_the_checkpoint_and_a_half_written_line(tmp_path):
    with Monitor(tmp_path, total=9) as record:
        for step in (2, 4, 4, 6):
            record.log(step, loss=float(step))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    assert [line["step"] for line in read_record(tmp_path / "metrics.jsonl")] == [2, 4, 4, 6]
    with Monitor(tmp_path, total=9, step=4) as record:
        record.log(6, loss=0.5)
    lines = read_record(tmp_path / "metrics.jsonl")
    assert [(line["step"], line["loss"]) for line in lines] == [(2, 2.0), (4, 4.0), (4, 4.0), (6, 0.5)]


def test_a_line_that_does_not_fit_on_the_disk_names_the_file_and_those_before_stay(tmp_path):
    refusal = r"^cannot write .*evaluations\.jsonl: File too large$"
    with (
        full_after(60),
        pytest.raises(WorkError, match=refusal),
        monitor.Record(tmp_path / "evaluations.jsonl") as made,
    ):
        for step in range(10):
            made.write(step, recall=0.5)
    with monitor.Record(tmp_path / "evaluations.jsonl") as again:
        assert again.steps == {0, 1}


def test_a_last_line_that_lacks_only_its_end_is_kept_and_ended(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 2, "loss": 1.0}')
    with Monitor(tmp_path, total=9, step=2) as record:
        record.log(4, loss=2.0)
    assert [line["step"] for line in read_record(tmp_path / "metrics.jsonl")] == [2, 4]


def test_the_bar_shows_steps_and_the_last_metrics(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Monitor(tmp_path, total=5, step=2, description="training") as record:
        record.advance()
        record.log(3, loss=1.23456)
        assert (record.bar.n, record.bar.postfix) == (3, "loss=1.235")


def test_throughput_is_tokens_and_arithmetic_a_second_without_pauses(monkeypatch):
    clock = SimpleNamespace(now=5.0)
    monkeypatch.setattr("lib.training.monitor.time.perf_counter", lambda: clock.now)
    throughput = Throughput(peak=2e12)
    for _ in range(2):
        for _ in range(4):
            clock.now += 0.5
            throughput.count(tokens=100, flops=2.5e11)
        with throughput.paused():
            clock.now += 60
        assert throughput.read() == {"tokens_per_second": 200.0, "tflops": 0.5, "mfu": 0.25}
    throughput = Throughput(None)
    clock.now += 1
    assert throughput.read() == {"tokens_per_second": 0.0, "tflops": 0.0}


# ---- TensorBoard


def _scalars(folder) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("loss")]


def test_tensorboard_sees_the_same_numbers_without_what_a_kill_made_void(tmp_path):
    with Monitor(tmp_path, total=4, observers=Observers(tensorboard=True)) as record:
        record.log(1, loss=0.5)
        record.log(2, loss=0.75)
        record.log(3, loss=4.0)
    assert _scalars(tmp_path) == [(1, 0.5), (2, 0.75), (3, 4.0)]
    with Monitor(tmp_path, total=4, step=1, observers=Observers(tensorboard=True)) as record:
        record.log(2, loss=0.25)
    assert _scalars(tmp_path) == [(1, 0.5), (2, 0.25)]


# ---- Weights & Biases


def _history(folder, n_lines: int) -> list[dict]:
    """What the package wrote down offline, once it has: its own process may still be at it."""
    return wait_for(lambda: len(history := _read_history(folder)) >= n_lines and history)


def _read_history(folder) -> list[dict]:
    """A log in the format of LevelDB, of protobuf records."""
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    content, at, record, history = path.read_bytes(), 7, b"", []  # after the file's own header
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:  # no room for a header left in this block
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", content[at + 4 : at + 7])
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            parsed, record = Record.FromString(record), b""
            if parsed.WhichOneof("record_type") == "history":
                items = parsed.history.item
                history.append({item.key or item.nested_key[0]: json.loads(item.value_json) for item in items})
    return history


@pytest.fixture
def offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))


def test_weights_and_biases_gets_the_same_metrics_offline_and_without_an_account(tmp_path, offline):
    observers = Observers(wandb="facts")
    check_observers(observers)
    with suppress(Preempted), Monitor(tmp_path / "run", total=4, observers=observers) as record:
        record.log(1, loss=0.1 + 0.2)
        record.log(2, loss=0.75)
        record.log(2, recall=1.0)
        raise Preempted
    lines = _history(tmp_path / "run", 2)
    found = [{k: v for k, v in line.items() if k in ("_step", "loss", "recall")} for line in lines]
    assert found == [{"_step": 1, "loss": 0.1 + 0.2}, {"_step": 2, "loss": 0.75, "recall": 1.0}]
    assert [line["step"] for line in read_record(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 2]
    # Interrupted, it goes on as the same run there; another folder is another run.
    ids = {}
    for folder, step in (("run", 2), ("other", 0)):
        with Monitor(tmp_path / folder, total=4, step=step, observers=observers) as record:
            assert record.wandb.name == folder and record.wandb.project == "facts"
            record.log(step + 1, loss=0.5)
        ids[folder] = {path.stem for path in (tmp_path / folder).glob("wandb/*/*.wandb")}
    assert len(ids["run"]) == len(ids["other"]) == 1 and ids["run"] != ids["other"]


def test_a_project_that_cannot_be_is_one_sentence(offline):
    with pytest.raises(InputError, match="Weights & Biases: Invalid project name 'a/b'"):
        check_observers(Observers(wandb="a/b"))


@pytest.mark.parametrize("name", ["metrics.jsonl", "probes.jsonl"])
def test_a_record_is_not_read_from_a_pipe(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(InputError, match=f"cannot write .*{name}"):
        Monitor(tmp_path, total=4, observers=Observers(probe_every=1))


# ---- Profiles


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    """The folder of a run of which three steps were profiled, its weights, and those of one that was not."""
    folder, weights = tmp_path_factory.mktemp("profiled"), []
    for name, observers in (("run", Observers(profile_steps=3)), ("other", UNOBSERVED)):
        trainer = ranks.trainer(ranks.config(steps=12, grad_accumulation=1), folder / name)
        trainer.train(observers=observers)
        weights.append(list(trainer.model.parameters()))
    return folder / "run" / "profile", *weights


def test_a_trace_holds_the_matrix_products_of_as_many_steps_as_were_asked_for(profile):
    events = json.loads(next(profile[0].glob("*.pt.trace.json")).read_text())["traceEvents"]
    steps = [event["name"] for event in events if event["name"].startswith("ProfilerStep")]
    assert steps == [f"ProfilerStep#{WAIT + WARM_UP + i}" for i in range(3)]
    products = [event for event in events if event["name"] == "aten::mm"]
    # Each of 2 layers' 7 matrices and the output: forward, gradient of the input, gradient of the weights.
    assert len(products) == 3 * 3 * (2 * 7 + 1)
    inner = [event["args"]["Input Dims"] for event in products]
    assert all(one[1] == other[0] for one, other in inner) and any(other == [16, 260] for _, other in inner)
    assert all(event["dur"] > 0 for event in products)


def test_profiled_training_ends_with_the_same_weights_bit_for_bit(profile):
    _, profiled, plain = profile
    assert all(map(torch.equal, profiled, plain))


def test_training_that_ends_too_early_is_told_to_have_no_profile(tmp_path):
    with pytest.warns(UserWarning, match="nothing was profiled"):
        with Monitor(tmp_path, total=3, observers=Observers(profile_steps=3)) as record:
            record.advance()
    assert not (tmp_path / "profile").exists()
