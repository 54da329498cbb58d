"""Training on a GPU, where steps are replayed from a CUDA graph, against eager steps and against a CPU."""

import pytest
import torch
from steps import STEPS, VARIANTS, make_trainer

from lib.agent.tools import SqlTool
from lib.config import RunConfig
from lib.dialogs.tokenizers import ByteTokenizer
from lib.dialogs.tokens import tokenize_people
from lib.evaluation.recall import measure_recall
from lib.experiments.sweep import sweep
from lib.facts.sampling import load_people
from lib.model.transformer import Transformer
from lib.paths import DATABASE
from lib.training.cuda_graph import WARM_UP, CudaGraph
from lib.training.monitor import read_record
from lib.training.run import run
from lib.training.saved import load_model
from lib.training.trainer import Trainer


def _losses(trainer: Trainer, steps: int = STEPS) -> list[float]:
    losses = []
    for _ in range(steps):
        trainer.step()
        losses.append(float(trainer.losses[-1]))
    return losses


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_replayed_steps_have_the_losses_of_eager_ones_and_of_a_cpu(variant, tmp_path):
    ways = {"cpu": ("cpu", False), "eager": ("cuda", False), "replayed": ("cuda", True)}
    losses = {
        way: _losses(make_trainer(variant, tmp_path / way, cuda_graph, device))
        for way, (device, cuda_graph) in ways.items()
    }
    assert losses["cpu"][0] - losses["cpu"][-1] > 0.2
    assert losses["replayed"] == pytest.approx(losses["cpu"], rel=1e-7)
    assert losses["eager"] == pytest.approx(losses["cpu"], rel=1e-7)


def test_a_replayed_run_that_was_killed_ends_as_if_nothing_had_happened(tmp_path):
    variant = {"training": {"checkpoint_every": 8}}
    expected = make_trainer(variant, tmp_path / "whole", True, "cuda")
    expected.train()
    first = make_trainer(variant, tmp_path / "parts", True, "cuda")
    for _ in range(11):
        first.step()
        if first.counters["step"] % first.config.training.checkpoint_every == 0:
            first.save()
    second = make_trainer(variant, tmp_path / "parts", True, "cuda")
    second.train()
    for name, tensor in second.model.state_dict().items():
        torch.testing.assert_close(tensor, expected.model.state_dict()[name], rtol=1e-7, atol=1e-9)


def test_an_evaluation_that_sees_longer_texts_does_not_disturb_the_graph(tmp_path):
    def evaluate(model: Transformer) -> float:
        with torch.inference_mode():
            model(torch.zeros(1, 3000, dtype=torch.int64, device=model.device))  # the rotary table is made anew
        torch.cuda.empty_cache()
        torch.full((64, 1024, 1024), float("nan"), device=model.device)  # and what it was is written over
        return 0.0

    variant = {"evaluation": {"every": 6}}
    disturbed = make_trainer(variant, tmp_path / "a", True, "cuda", evaluate).train()
    assert disturbed.loss == pytest.approx(make_trainer(variant, tmp_path / "b", False).train().loss, rel=1e-7)


def test_the_work_is_done_once_a_step():
    total = torch.zeros((), device="cuda")
    graph, outputs = CudaGraph(), []
    for i in range(2 * WARM_UP + 2):
        inputs = [torch.full((2,), float(i), device="cuda")]
        if graph.is_captured:
            graph.replay(inputs)
        else:
            with graph.capture(inputs) as (held,):
                total.add_(held.sum())
                output = total * 2
        outputs.append(float(output))
    sums = torch.arange(2 * WARM_UP + 2).mul(2).cumsum(0)
    assert outputs == (2 * sums).tolist()


@pytest.mark.parametrize("mode", ["in-weight", "in-tool"])
def test_a_run_on_a_gpu_learns_and_a_cpu_gives_its_model_the_same_verdicts(mode, tmp_path):
    training = {"steps": 600, "batch_size": 32}
    config = RunConfig.parse({"mode": mode, "facts": {"n_people": 8}, "model": {"d_model": 24}, "training": training})
    row = run(config, tmp_path / "run", device="cuda")
    assert row["device"].startswith("cuda (NVIDIA") and row["recall"] > 0.9
    facts = list(load_people(config.facts).facts())
    verdicts = []
    for device in ("cpu", "cuda"):
        model, _ = load_model(tmp_path / "run", device)
        with SqlTool(tmp_path / "run" / DATABASE) as database:
            tool = database if mode == "in-tool" else None
            verdicts.append(measure_recall(model, facts, ByteTokenizer(), tool).correct.tolist())
    assert verdicts[0] == verdicts[1] and sum(verdicts[0]) / len(facts) == row["recall"]


def test_bfloat16_trains_near_float32_when_replayed(tmp_path):
    losses = []
    for dtype in ("float32", "bfloat16"):
        config = RunConfig.parse({"facts": {"n_people": 13}, "training": {"dtype": dtype, "batch_size": 12}})
        data = tokenize_people(load_people(config.facts), config.mode, ByteTokenizer())
        model = Transformer(config.model, torch.Generator().manual_seed(0)).cuda()
        losses.append(_losses(Trainer(model, data, config, tmp_path / dtype, cuda_graph=True)))
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.1)


def test_a_sweep_shares_the_gpu_among_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("ITL_RUNS", str(tmp_path))
    report = sweep("05_1", "smoke", jobs=2, device="cuda")
    assert (report.done_now, report.failed) == (2, {})


def test_metrics_give_the_share_of_a_known_peak(tmp_path):
    trainer = make_trainer({"training": {"dtype": "bfloat16"}}, tmp_path, True, "cuda")
    trainer.train()
    assert 0 < read_record(tmp_path / "metrics.jsonl")[-1]["mfu"] < 1
