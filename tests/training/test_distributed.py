"""Several processes train as one: the same losses, the same checkpoints, and they leave when asked to."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import ranks
import torch
from safetensors.torch import load_file
from waiting import wait_for

from lib import paths
from lib.base import InputError, WorkError
from lib.config import ModelConfig
from lib.model.llama import to_llama
from lib.model.transformer import Transformer
from lib.training import checkpoint
from lib.training.distributed import asked_to_leave, connect, is_first, local_device

LAYOUTS = [*ranks.LAYOUTS, "replicated or sharded x tensor"]


# ---- Several ranks are as good as one


#: Two times two ranks take half a minute, so they do with the default optimizer only, which has AdamW in it.
CASES = [("adamw", layout) for layout in ranks.LAYOUTS] + [("muon", layout) for layout in LAYOUTS]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """By optimizer: a folder with what was trained in each layout by several ranks, and what one process does alone."""

    @functools.cache
    def train(optimizer: str) -> tuple[Path, dict]:
        folder = tmp_path_factory.mktemp(optimizer)
        alone = ranks.trainer(ranks.config(optimizer), folder / "alone")
        found = {"losses": ranks.losses(alone, ranks.STEPS), "weights": ranks.weights(alone)}
        shutil.rmtree(folder / "alone" / "checkpoints" / "step_00000050")  # the ranks go on from the one before
        ranks.launch(2, ranks.train_in_layouts, folder, ranks.LAYOUTS, optimizer)
        if optimizer == "muon":
            ranks.launch(4, ranks.train_in_layouts, folder, {LAYOUTS[-1]: {"tensor": 2}}, optimizer)
        return folder, found

    return train


def _of_ranks(folder: Path, layout: str) -> dict:
    return torch.load(folder / f"{layout}.pt", weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "layout"), CASES)
def test_ranks_have_the_losses_of_one_process(trained, optimizer, layout):
    folder, expected = trained(optimizer)
    found = _of_ranks(folder, layout)
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-6)
    torch.testing.assert_close(found["weights"], expected["weights"], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "layout"), CASES)
def test_a_checkpoint_of_one_process_goes_on_with_several(trained, optimizer, layout):
    folder, expected = trained(optimizer)
    found = _of_ranks(folder, layout)
    assert found["losses after alone"] == pytest.approx(expected["losses"][ranks.HALF :], rel=1e-6)
    torch.testing.assert_close(found["weights after alone"], expected["weights"], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "layout"), CASES)
def test_a_checkpoint_of_several_processes_goes_on_with_one(trained, optimizer, layout):
    folder, expected = trained(optimizer)
    shutil.rmtree(folder / layout / "checkpoints" / "step_00000050")
    alone = ranks.trainer(ranks.config(optimizer), folder / layout)
    alone.resume()
    assert alone.counters["step"] == ranks.HALF
    again = ranks.losses(alone, ranks.STEPS - ranks.HALF)
    assert again == pytest.approx(expected["losses"][ranks.HALF :], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "share"), [*zip(LAYOUTS, (1, 1 / 2, 1 / 2, 1 / 4), strict=True)])
def test_who_shares_the_weights_out_holds_a_part_of_them(trained, layout, share):
    n_params = ranks.config().model.n_params
    norms = 5 * 16  # which tensor ranks all hold
    here = _of_ranks(trained("muon")[0], layout)["parameters here"]
    assert share * n_params <= here <= share * n_params + norms


@pytest.mark.slow
def test_ranks_exchange_gradients_once_a_step_however_many_parts_it_has(tmp_path):
    ranks.launch(2, ranks.count_exchanges, tmp_path)
    before, after = map(int, (tmp_path / "exchanges").read_text().split())
    assert before > 0 and after == 4 * before


@pytest.mark.parametrize(
    ("size", "tensor", "message"),
    [("3", 2, "tensor = 2 does not divide the 3 processes"), ("4", 4, "tensor = 4 does not divide the 2 key-value")],
)
def test_what_cannot_be_divided_is_one_sentence(monkeypatch, size, tensor, message):
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(InputError, match=message), connect(torch.device("cpu"), ModelConfig(), tensor=tensor):
        pass


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE = 'two' in the environment is no number"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE = '-1' in the environment is no number"),
        ({"RANK": "x"}, "RANK = 'x' in the environment is no number"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE = 2 without RANK, MASTER_ADDR and MASTER_PORT"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1"}, "without RANK, MASTER_ADDR and MASTER_PORT"),
    ],
)
def test_variables_of_processes_that_nobody_started_are_one_sentence(monkeypatch, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=message), connect(torch.device("cpu"), ModelConfig()):
        is_first()


def test_empty_variables_are_those_of_a_process_alone(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "")
    with connect(torch.device("cpu"), ModelConfig()) as alone:
        assert alone.size == 1 and is_first()


@pytest.mark.slow
def test_a_model_of_several_ranks_becomes_a_llama(trained):
    folder, _ = trained("muon")
    tensors, _ = checkpoint.load(folder / "sharded" / "checkpoints" / "step_00000025")
    model = Transformer(ranks.config().model)
    model.load_state_dict({n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")})
    tokens = torch.randint(0, 260, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(to_llama(model)(tokens).logits, model(tokens), rtol=1e-4, atol=1e-4)


# ---- Real processes


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(paths.ROOT)}


def _command(directory: Path, *options: str, steps: int = 60) -> list[str]:
    settings = [f"training.steps={steps}", "training.checkpoint_every=10", "evaluation.every=20", "model.d_model=8"]
    given = [part for setting in settings for part in ("--set", setting)]
    return ["-m", "lib", "train", "--mode", "in-tool", "--people", "8", "--out", str(directory), *given, *options]


def _torchrun(directory: Path, *options: str, **settings) -> subprocess.Popen:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "--no-python"]
    command = [*launcher, sys.executable, *_command(directory, *options, **settings)]
    return subprocess.Popen(
        command, env=_environment(), cwd=directory.parent, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def _alone(directory: Path, **settings) -> subprocess.Popen:
    command = [sys.executable, *_command(directory, **settings)]
    return subprocess.Popen(command, env=_environment(), cwd=directory.parent, stderr=subprocess.PIPE, text=True)


def _row(directory: Path) -> dict:
    return json.loads((directory / "row.json").read_text())


def _model(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model" / "tensors.safetensors")


@pytest.mark.slow
def test_torchrun_trains_one_run_and_leaves_the_row_that_one_process_leaves(tmp_path):
    two, one = _torchrun(tmp_path / "two", "--sharded"), _alone(tmp_path / "one")
    out, err = two.communicate(timeout=240)
    assert two.returncode == 0, err
    assert out.count("recall") == 1  # the first rank speaks for both
    assert one.wait(240) == 0
    rows = [_row(tmp_path / name) for name in ("one", "two")]
    same = ["run_id", "steps", "stopped", "dialogs_seen", "n_questions", "people_digest", "n_params"]
    assert [rows[0][column] for column in same] == [rows[1][column] for column in same]
    for column in ("loss", "nll_bits"):
        assert rows[1][column] == pytest.approx(rows[0][column], rel=1e-3)
    assert {path.name for path in (tmp_path / "one").iterdir()} == {path.name for path in (tmp_path / "two").iterdir()}


@pytest.mark.slow
def test_a_rank_that_dies_takes_the_others_along_and_nothing_is_lost(tmp_path):
    whole = _torchrun(tmp_path / "whole", steps=200)
    assert whole.wait(240) == 0
    process = _torchrun(tmp_path / "run", steps=200)
    wait_for(lambda: any(tmp_path.glob("run/checkpoints/step_*")))
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode != 0 and not (tmp_path / "run" / "row.json").exists()
    again = _torchrun(tmp_path / "run", steps=200)
    _, err = again.communicate(timeout=240)
    assert again.returncode == 0, err
    for name, tensor in _model(tmp_path / "whole").items():
        torch.testing.assert_close(_model(tmp_path / "run")[name], tensor, rtol=0, atol=0, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_process_that_is_asked_to_leave_saves_and_says_that_it_wants_to_go_on(tmp_path, number):
    whole = _alone(tmp_path / "whole", steps=300)
    process = _alone(tmp_path / "run", steps=300)
    wait_for(lambda: any(tmp_path.glob("run/checkpoints/step_*")))
    steps = tmp_path / "run" / "checkpoints"
    before = checkpoint.latest(steps)
    for _ in range(3):  # as a cluster that insists
        process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 75 and "stopped by a signal" in err and "Traceback" not in err
    assert checkpoint.latest(steps).name > before.name
    assert _alone(tmp_path / "run", steps=300).wait(240) == 0
    assert whole.wait(240) == 0
    for name, tensor in _model(tmp_path / "whole").items():
        assert torch.equal(tensor, _model(tmp_path / "run")[name]), name


def test_a_process_without_a_gpu_says_so_whichever_it_is(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(WorkError, match="process 1 of this machine has no GPU, there are 1"):  # every process says it
        local_device(torch.device("cuda"))


def test_signals_are_handled_within_and_given_back_after():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2)]
    with asked_to_leave() as asked:
        assert not asked.is_set()
        os.kill(os.getpid(), signal.SIGUSR2)
        assert asked.wait(5)
        os.kill(os.getpid(), signal.SIGTERM)  # again, and another one
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2)] == before
