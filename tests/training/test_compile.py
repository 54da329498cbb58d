"""torch.compile: the same losses and gradients, once, and without it where it fails."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lib import paths
from lib.config import RunConfig
from lib.dialogs.tokenizers import ByteTokenizer
from lib.dialogs.tokens import tokenize_people
from lib.facts.sampling import load_people
from lib.model.transformer import Transformer
from lib.training.trainer import Trainer


def make_trainer(folder: Path, compiled: bool, csv: str | None = None, **training) -> Trainer:
    config = RunConfig.parse({
        "facts": {"n_people": 8, "csv": csv},
        "model": {"d_model": 8, "n_heads": 2, "n_kv_heads": 1},
        "training": {"steps": 8, "batch_size": 12, **training},
        "evaluation": {"every": None},
    })  # fmt: skip
    data = tokenize_people(load_people(config.facts), config.mode, ByteTokenizer())
    model = Transformer(config.model, torch.Generator().manual_seed(0))
    return Trainer(model, data, config, folder, compiled=compiled)


@pytest.mark.parametrize("loss", ["cross-entropy", "focal"])
@pytest.mark.slow
def test_a_compiled_step_is_the_eager_one(loss, tmp_path):
    torch.compiler.reset()
    eager, compiled = (make_trainer(tmp_path / str(c), c, loss=loss) for c in (False, True))
    for _ in range(3):  # batches of other shapes too
        for trainer in (eager, compiled):
            trainer.step()
        assert float(compiled.losses[-1]) == pytest.approx(float(eager.losses[-1]), rel=1e-4)
    torch.testing.assert_close(list(compiled.model.parameters()), list(eager.model.parameters()), rtol=1e-3, atol=1e-3)


def test_it_is_compiled_once_whatever_the_lengths_of_later_batches(tmp_path):
    """A second one would double the seconds before the first steps. One dialog outgrows the positions' table.

    All batches have fewer than 4,096 tokens: there inductor begins to split loops, which is compiled anew.
    """
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    rows = "".join(f"P{i},{'x' * (400 if i == 30 else 40 + i)}\n" for i in range(40))
    (tmp_path / "people.csv").write_text("name,motto\n" + rows)
    trainer = make_trainer(tmp_path, True, csv=str(tmp_path / "people.csv"), batch_size=8)
    lengths = set()
    for step in range(8):
        lengths.add(int(trainer.lengths[trainer.batches[step]].max()))
        trainer.step()
    assert max(lengths) > 256 > min(lengths) and len(lengths) > 3
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
def test_code_that_cannot_be_compiled_runs_as_it_is(tmp_path, monkeypatch):
    torch.compiler.reset()
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("/nowhere/g++",))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.warns(UserWarning, match="goes on without torch.compile"):
        trainer = make_trainer(tmp_path / "compiled", True)
    assert trainer.train().loss == make_trainer(tmp_path / "eager", False).train().loss


@pytest.mark.slow
def test_what_a_kill_left_of_a_compilation_ends_no_later_run(tmp_path):
    """The compiler writes libraries in place. Killed, it leaves half of one, which torch.compile goes on to load."""
    code = (
        "import sys; from pathlib import Path; from test_compile import make_trainer\n"
        "print(make_trainer(Path(sys.argv[1]), True).train().loss)"
    )

    def train(folder: str) -> tuple[float, str]:
        environment = {
            **os.environ,
            "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
            "PYTHONPATH": os.pathsep.join([str(paths.ROOT), str(Path(__file__).parent)]),
        }
        command = [sys.executable, "-c", code, str(tmp_path / folder)]
        done = subprocess.run(command, env=environment, cwd=paths.ROOT, capture_output=True, text=True, check=True)
        return float(done.stdout), done.stderr

    loss, warned = train("whole")
    assert "without torch.compile" not in warned
    libraries = list((tmp_path / "cache").rglob("*.main.so"))
    assert libraries
    for library in libraries:
        library.write_bytes(bytes(library.stat().st_size))  # room is made for it, but nothing written yet
    for finished in ("fxgraph", "aotautograd"):  # what is recorded of a compilation at its end
        shutil.rmtree(tmp_path / "cache" / finished, ignore_errors=True)
    again, warned = train("after a kill")
    assert "without torch.compile" in warned
    assert again == pytest.approx(loss, rel=1e-4)
