"""Stacked models: each gets the gradients, the training and the row that it gets alone."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lib import paths
from lib.base import InputError
from lib.config import RunConfig
from lib.dialogs.templates import dialogs
from lib.dialogs.tokenizers import ByteTokenizer
from lib.dialogs.tokens import tokenize
from lib.facts.sampling import sample_people
from lib.model.transformer import Transformer
from lib.training.gradients import Gradients
from lib.training.optim import build_optimizers
from lib.training.trainer import Trainer, train_together

#: Eight runs that differ in people, batch, schedule, rates and optimizer.
VARIANTS = [
    {"facts": {"n_people": 8}},
    {"seed": 1, "facts": {"n_people": 8}},
    {"facts": {"n_people": 24, "seed": 3}, "training": {"batch_size": 32}},
    {"facts": {"n_people": 5}, "training": {"batch_size": 64}},
    {"facts": {"n_people": 8}, "optim": {"name": "adamw"}},
    {"facts": {"n_people": 8}, "optim": {"lr": 3e-3, "muon_lr": 1e-2, "weight_decay": 0.1, "warmup_steps": 5}},
    {"facts": {"n_people": 8, "seed": 7}, "optim": {"muon_lr": 5e-3}},
    {"facts": {"n_people": 8}, "optim": {"clip_norm": 0.1, "schedule": "constant", "lr": 3e-3}},
]


def _config(variant: dict, steps: int) -> RunConfig:
    training = {"steps": steps, "batch_size": 12, **variant.get("training", {})}
    model = {"d_model": 8, "n_heads": 2, "n_kv_heads": 1}
    return RunConfig.parse({**variant, "model": model, "training": training, "evaluation": {"every": None}})


def _trainer(config: RunConfig, directory: Path, dtype: torch.dtype, evaluate=None) -> Trainer:
    people = sample_people(config.facts.n_people, config.facts.seed)
    data = tokenize(dialogs(people, config.mode), ByteTokenizer())
    model = Transformer(config.model, torch.Generator().manual_seed(config.seed)).to(dtype)
    return Trainer(model, data, config, directory, evaluate)


def _losses(trainer: Trainer) -> list[float]:
    """Appended to as the trainer trains."""
    losses, count_step = [], trainer.count_step

    def count(loss: torch.Tensor) -> None:
        losses.append(float(loss))
        count_step(loss)

    trainer.count_step = count
    return losses


@pytest.mark.parametrize(("dtype", "steps"), [(torch.float32, 100), (torch.float64, 100)])
def test_eight_stacked_runs_have_the_losses_they_have_alone(dtype, steps, tmp_path):
    alone, together = [], []
    for i, variant in enumerate(VARIANTS):
        trainer = _trainer(_config(variant, steps), tmp_path / f"alone{i}", dtype)
        alone.append(_losses(trainer))
        trainer.train()
    trainers = [
        _trainer(_config(variant, steps), tmp_path / f"stacked{i}", dtype) for i, variant in enumerate(VARIANTS)
    ]
    together = [_losses(trainer) for trainer in trainers]
    train_together(trainers)
    assert [len(losses) for losses in together] == [steps] * 8
    assert min(losses[0] - losses[-1] for losses in alone) > 0.5  # they do learn
    for one, other in zip(alone, together, strict=True):
        assert max(abs(a - b) for a, b in zip(one, other, strict=True)) < 1e-4


@pytest.mark.parametrize("loss", ["cross-entropy", "focal"])
def test_a_stack_of_both_modes(loss, tmp_path):
    variant = {"facts": {"n_people": 3}, "training": {"loss": loss}}
    configs = [_config({**variant, "mode": mode}, 5) for mode in ("in-weight", "in-tool")]
    alone = [_trainer(config, tmp_path / f"a{config.mode}", torch.float64).train() for config in configs]
    together = train_together([_trainer(config, tmp_path / f"s{config.mode}", torch.float64) for config in configs])
    assert [ending.loss for ending in together] == pytest.approx([ending.loss for ending in alone], abs=1e-9)


def test_runs_of_other_lengths_leave_the_stack_as_they_end(tmp_path):
    lengths = [7, 20, 1, 13]
    configs = [_config({**VARIANTS[i], "seed": 50 + i}, steps) for i, steps in enumerate(lengths)]
    alone = [_trainer(config, tmp_path / f"a{i}", torch.float64) for i, config in enumerate(configs)]
    stacked = [_trainer(config, tmp_path / f"s{i}", torch.float64) for i, config in enumerate(configs)]
    endings = train_together(stacked)
    for steps, one, other, ending in zip(lengths, alone, stacked, endings, strict=True):
        expected = one.train()
        assert (ending.steps, ending.stopped, ending.dialogs_seen) == (steps, "budget", expected.dialogs_seen)
        assert ending.loss == pytest.approx(expected.loss, abs=1e-9)
        for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-7)


def test_a_stack_that_was_killed_goes_on_as_if_nothing_had_happened(tmp_path):
    configs = [_config({**variant, "training": {"checkpoint_every": 4}}, 12) for variant in VARIANTS[:3]]

    def trainers(folder: str) -> list[Trainer]:
        return [_trainer(config, tmp_path / folder / str(i), torch.float32) for i, config in enumerate(configs)]

    undisturbed = trainers("undisturbed")
    train_together(undisturbed)
    killed = trainers("killed")

    def die(loss: torch.Tensor) -> None:
        if killed[1].counters["step"] == 9:
            raise KeyboardInterrupt
        Trainer.count_step(killed[1], loss)

    killed[1].count_step = die
    with pytest.raises(KeyboardInterrupt):
        train_together(killed)
    resumed = trainers("killed")
    train_together(resumed)
    for one, other in zip(undisturbed, resumed, strict=True):
        assert other.counters["step"] == 12
        for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True):
            assert torch.equal(a, b)


def test_a_run_that_reaches_its_recall_ends_alone(tmp_path):
    configs = [_config({**variant}, 12) for variant in VARIANTS[:3]]
    configs = [c.model_copy(update={"evaluation": c.evaluation.model_copy(update={"every": 2})}) for c in configs]
    recalls = [lambda _: 0.5, lambda _: 1.0, lambda _: 0.0]
    trainers = [
        _trainer(config, tmp_path / str(i), torch.float32, recall)
        for i, (config, recall) in enumerate(zip(configs, recalls, strict=True))
    ]
    endings = train_together(trainers)
    assert [(e.steps, e.stopped) for e in endings] == [(12, "budget"), (4, "recall"), (12, "budget")]


def test_models_in_a_stack_share_its_memory_and_stay_models(tmp_path):
    trainers = [
        _trainer(_config(variant, 3), tmp_path / str(i), torch.float32) for i, variant in enumerate(VARIANTS[:2])
    ]
    before = [{n: p.clone() for n, p in trainer.model.named_parameters()} for trainer in trainers]
    gradients = Gradients([trainer.model for trainer in trainers])
    for i, trainer in enumerate(trainers):
        for name, parameter in trainer.model.named_parameters():
            assert torch.equal(parameter, before[i][name])
            parameter.data += 1
            assert torch.equal(gradients.stacked[name][i], before[i][name] + 1)


def test_runs_of_different_shapes_do_not_train_together(tmp_path):
    small = _config(VARIANTS[0], 3)
    large = small.model_copy(update={"model": small.model.model_copy(update={"d_model": 32})})
    with pytest.raises(ValueError, match="the same model"):
        train_together([_trainer(c, tmp_path / str(c.model.d_model), torch.float32) for c in (small, large)])


@pytest.mark.parametrize("loss", ["cross-entropy", "focal"])
def test_compiled_gradients_are_the_eager_ones(loss, tmp_path):
    config = _config({**VARIANTS[0], "training": {"loss": loss}}, 3)
    trainer = _trainer(config, tmp_path, torch.float32)
    compiled = Gradients([trainer.model], compiled=True, gamma=config.training.gamma)
    for step in range(3):  # batches of other shapes too
        trainer.counters["step"] = step
        parts, n_trained = trainer.next_batch()
        found = []
        for gradients in (trainer.gradients, compiled):
            (sums,) = gradients.accumulate(parts, [n_trained])
            found.append([*sums, *(parameter.grad for parameter in trainer.model.parameters())])
            trainer.model.zero_grad()
        torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_stacked_optimizers_step_as_pytorchs_own(tmp_path):
    """Muon of several models at once against torch.optim.Muon of each, which rounds to bfloat16."""
    from lib.training.optim import step_all

    models = [Transformer(_config({}, 1).model, torch.Generator().manual_seed(i)) for i in range(2)]
    twins = [Transformer(_config({}, 1).model, torch.Generator().manual_seed(i)) for i in range(2)]
    config = RunConfig.parse({"optim": {"weight_decay": 0.1}}).optim
    ours = [optimizer for model in models for optimizer in build_optimizers(model, config)]
    theirs = []
    for twin in twins:
        adamw, muon = build_optimizers(twin, config)
        theirs += [adamw, torch.optim.Muon(muon.param_groups[0]["params"], lr=config.muon_lr, weight_decay=0.1)]
    generator = torch.Generator().manual_seed(7)
    for _ in range(4):
        for model, twin in zip(models, twins, strict=True):
            for a, b in zip(model.parameters(), twin.parameters(), strict=True):
                a.grad = torch.randn(a.shape, generator=generator)
                b.grad = a.grad.clone()
        step_all(ours)
        for optimizer in theirs:
            optimizer.step()
    for model, twin in zip(models, twins, strict=True):
        for a, b in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=4 * 0.02 * 0.03)  # four steps of 0.02, 3 % of each


def test_it_is_compiled_once_whatever_the_lengths_of_later_batches(tmp_path):
    """A second compilation would double the seconds before the first steps."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    trainer = _trainer(_config({"facts": {"n_people": 40}}, 8), tmp_path, torch.float32)
    trainer.gradients = Gradients([trainer.model], compiled=True)
    lengths = set()
    for step in range(8):
        lengths.add(int(trainer.lengths[trainer.batches[step]].max()))
        trainer.step()
    assert len(lengths) > 3
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_code_that_cannot_be_compiled_runs_as_it_is(tmp_path, monkeypatch):
    torch.compiler.reset()
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("/nowhere/g++",))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises(Exception, match="nowhere"):
        torch.compile(lambda x: x.sin() + 1)(torch.ones(3))
    trainer = _trainer(_config(VARIANTS[0], 2), tmp_path, torch.float32)
    trainer.gradients = Gradients([trainer.model], compiled=True)
    with pytest.warns(UserWarning, match="goes on without torch.compile"):
        trainer.train()
    assert trainer.counters["step"] == 2


@pytest.mark.slow
def test_what_a_kill_left_of_a_compilation_ends_no_later_run(tmp_path):
    """The compiler writes libraries in place. Killed, it leaves half of one, which torch.compile goes on to load."""
    code = (
        "import sys, torch; from pathlib import Path; from lib.training.gradients import Gradients\n"
        "from tests.test_gradients import VARIANTS, _config, _trainer\n"
        "trainer = _trainer(_config(VARIANTS[0], 3), Path(sys.argv[1]), torch.float32)\n"
        "trainer.gradients = Gradients([trainer.model], compiled=True)\n"
        "print(trainer.train().loss)"
    )

    def train(folder: str) -> tuple[float, str]:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
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


def test_runs_of_uneven_batches_add_up_their_gradients_in_as_many_parts(tmp_path):
    """20 dialogs in batches of at most 7 are two of 7 and one of 6, in four parts. More parts are refused."""
    variants = [
        {"facts": {"n_people": 5}, "seed": seed, "training": {"grad_accumulation": 4, "batch_size": 7}}
        for seed in (0, 1)
    ]
    with pytest.raises(InputError, match="grad_accumulation = 7, but there are batches of 6"):
        variant = {"facts": {"n_people": 5}, "training": {"grad_accumulation": 7, "batch_size": 7}}
        _trainer(_config(variant, 12), tmp_path, torch.float32)
    together = [_trainer(_config(v, 12), tmp_path / str(i), torch.float32) for i, v in enumerate(variants)]
    assert {len(trainer.batches[step]) for trainer in together for step in range(3)} == {6, 7}
    endings = train_together(together)
    for i, variant in enumerate(variants):
        alone = _trainer(_config(variant, 12), tmp_path / f"alone{i}", torch.float32).train()
        assert endings[i].loss == pytest.approx(alone.loss, abs=1e-4)
