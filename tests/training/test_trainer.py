"""Training: what a step computes, when it ends, and that a run goes on after a kill as if nothing had happened."""

import re
import shutil
import time
from pathlib import Path

import forging
import pytest
import ranks
import torch
from safetensors.torch import load_file

from lib.base import InputError, WorkError
from lib.config import RunConfig
from lib.dialogs.templates import dialogs
from lib.dialogs.tokenizers import ByteTokenizer
from lib.dialogs.tokens import TokenizedDialogs, encode_dialog, tokenize
from lib.facts.sampling import sample_people
from lib.model.transformer import Transformer
from lib.training import checkpoint
from lib.training.monitor import read_record
from lib.training.trainer import LOG_EVERY, Trainer

PEOPLE = sample_people(8)


@pytest.fixture(scope="module")
def data() -> TokenizedDialogs:
    return tokenize(dialogs(PEOPLE, "in-weight"), ByteTokenizer())


def _config(seed: int = 0, optim: dict | None = None, evaluation: dict | None = None, **training) -> RunConfig:
    return RunConfig.parse({
        "seed": seed,
        "model": {"d_model": 8},
        "optim": {"name": "adamw", **(optim or {})},
        "training": {"steps": 10, "batch_size": 12, **training},
        "evaluation": {"every": None, **(evaluation or {})},
    })  # fmt: skip


def _trainer(data, config: RunConfig, directory: Path, evaluate=None, init: int = 0, **options) -> Trainer:
    model = Transformer(config.model, torch.Generator().manual_seed(init))
    return Trainer(model, data, config, directory, evaluate, **options)


def _weights(model: Transformer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _identical(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---- One step


def _mean_gradient(model: Transformer, rows: torch.Tensor, gamma: float = 0.0) -> tuple[float, dict[str, torch.Tensor]]:
    """Cross-entropy and the loss's gradients of a batch, dialog by dialog without padding, as the definition says."""
    facts, tokenizer = list(PEOPLE.facts()), ByteTokenizer()
    all_dialogs = list(dialogs(PEOPLE, "in-weight"))
    assert len(facts) == len(all_dialogs)
    total, weighted, weight, count = torch.zeros(()), torch.zeros(()), torch.zeros(()), 0
    for row in rows.tolist():
        tokens, trained = encode_dialog(all_dialogs[row], tokenizer)
        logits = model(torch.tensor([tokens[:-1]]))[0]
        p = logits.softmax(-1)[torch.arange(len(tokens) - 1), torch.tensor(tokens[1:])][torch.tensor(trained[1:])]
        weights = (1 - p.detach()) ** gamma
        weighted, weight = weighted - (weights * p.log()).sum(), weight + weights.sum()
        total, count = total - p.log().sum(), count + sum(trained[1:])
    names = [name for name, _ in model.named_parameters()]
    gradients = torch.autograd.grad(weighted / weight, list(model.parameters()))
    return (total / count).item(), dict(zip(names, gradients, strict=True))


def _step_of_plain_descent(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Minus the change of the weights in one step with learning rate 1: the gradient that the optimizer was given."""
    trainer.optimizers = [torch.optim.SGD(trainer.model.parameters(), lr=1.0)]
    trainer.optimizers[0].param_groups[0]["peak_lr"] = 1.0
    before = _weights(trainer.model)
    trainer.step()
    return {name: before[name] - after for name, after in _weights(trainer.model).items()}


@pytest.mark.parametrize(
    ("loss", "gamma", "parts"),
    [("cross-entropy", 0.0, 1), ("cross-entropy", 0.0, 5), ("focal", 2.0, 1), ("focal", 2.0, 10), ("focal", 0.5, 2)],
)
def test_a_batch_in_parts_gives_the_gradient_of_the_whole(data, tmp_path, loss, gamma, parts):
    focal = {"focal_gamma": gamma} if gamma else {}
    config = _config(optim={"clip_norm": None}, grad_accumulation=parts, loss=loss, **focal)
    trainer = _trainer(data, config, tmp_path)
    loss, expected = _mean_gradient(trainer.model, trainer.batches[0], gamma)
    for name, gradient in _step_of_plain_descent(trainer).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)
    assert trainer.loss() == pytest.approx(loss, rel=1e-6)


def test_uneven_batches_are_cut_into_as_many_parts(tmp_path):
    """20 dialogs in batches of at most 7 are two of 7 and one of 6, in four parts. More parts are refused."""
    data = tokenize(dialogs(sample_people(5), "in-weight"), ByteTokenizer())
    with pytest.raises(InputError, match="grad_accumulation = 7, .* is too large for batches of 6"):
        _trainer(data, _config(batch_size=7, grad_accumulation=7), tmp_path)
    losses = []
    for parts in (1, 4):
        trainer = _trainer(data, _config(batch_size=7, grad_accumulation=parts), tmp_path / str(parts))
        assert {len(trainer.batches[step]) for step in range(3)} == {6, 7}
        losses.append(trainer.train().loss)
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)


@pytest.mark.parametrize(("clip_norm", "clipped"), [(None, False), (1e6, False), (0.1, True)])
def test_clipping_scales_the_gradient_down_to_the_norm_and_never_up(data, tmp_path, clip_norm, clipped):
    trainer = _trainer(data, _config(optim={"clip_norm": clip_norm}), tmp_path)
    _, expected = _mean_gradient(trainer.model, trainer.batches[0])
    norm = torch.cat([gradient.flatten() for gradient in expected.values()]).norm()
    assert norm > 0.1
    scale = 0.1 / norm if clipped else 1.0
    for name, gradient in _step_of_plain_descent(trainer).items():
        torch.testing.assert_close(gradient, scale * expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_the_learning_rate_follows_the_schedule(data, tmp_path):
    trainer = _trainer(data, _config(optim={"lr": 0.5, "warmup_steps": 1}, steps=3), tmp_path)
    rates = []
    for _ in range(3):
        trainer.step()
        rates.append(trainer.optimizers[0].param_groups[0]["lr"])
    assert rates == pytest.approx([0.25, 0.5, 0.25])


def test_bfloat16_trains_float32_weights_and_stays_near_float32(data, tmp_path):
    losses, weights = {}, {}
    for dtype in ("float32", "bfloat16"):
        trainer = _trainer(data, _config(dtype=dtype, steps=40), tmp_path / dtype)
        losses[dtype] = trainer.train().loss
        weights[dtype] = _weights(trainer.model)
    assert {tensor.dtype for tensor in weights["bfloat16"].values()} == {torch.float32}
    assert not _identical(weights["float32"], weights["bfloat16"])
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02)


# ---- A whole training


def test_training_lowers_the_loss_and_reports_what_it_did(data, tmp_path):
    outcome = _trainer(data, _config(steps=120, batch_size=32), tmp_path).train()
    metrics = read_record(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in metrics] == [50, 100, 120]
    assert metrics[-1]["loss"] == outcome.loss < 0.7 * metrics[0]["loss"]
    assert (outcome.steps, outcome.dialogs_seen, outcome.stopped) == (120, 120 * 32, "budget")


def test_every_loss_in_the_metrics_stands_beside_the_throughput_of_training_alone(data, tmp_path):
    """Evaluations are left out of the time, and what is counted are the trained tokens of whole batches."""
    config = _config(steps=60, batch_size=32, evaluation={"every": 1, "stop_at_recall": None})
    trainer = _trainer(data, config, tmp_path, lambda _: time.sleep(0.05) or 0.0)
    ending = trainer.train()
    lines = [line for line in read_record(tmp_path / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == [50, 60] and all("mfu" not in line for line in lines)
    tokens = sum(int(trainer.data.n_trained[trainer.batches[step]].sum()) for step in range(50))
    assert tokens / lines[0]["tokens_per_second"] < ending.seconds - 60 * 0.05
    flops = 3 * 50 * 32 * config.model.forward_flops(66, tokens / 50 / 32)
    assert lines[0]["tflops"] / lines[0]["tokens_per_second"] == pytest.approx(flops / tokens / 1e12, rel=0.2)


def test_the_reported_loss_is_the_mean_over_the_last_steps(data, tmp_path):
    trainer = _trainer(data, _config(steps=LOG_EVERY + 7), tmp_path)
    losses = []
    for _ in range(LOG_EVERY + 7):
        trainer.step()
        losses.append(float(trainer.losses[-1]))
    assert trainer.loss() == pytest.approx(sum(losses[-LOG_EVERY:]) / LOG_EVERY)


DIVERGING = {"optim": {"lr": 1e30, "clip_norm": None}}


@pytest.mark.parametrize("every", [LOG_EVERY, 5])
def test_training_that_diverges_ends_with_the_step_and_keeps_good_checkpoints(data, tmp_path, every):
    reference = _trainer(data, _config(steps=2 * LOG_EVERY, checkpoint_every=1, keep_checkpoints=9), tmp_path / "a")
    _train_until(reference, 5)
    good = checkpoint.steps(tmp_path / "a" / "checkpoints")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    config = _config(steps=2 * LOG_EVERY, checkpoint_every=every, keep_checkpoints=1, **DIVERGING)
    trainer = _trainer(data, config, tmp_path / "b")
    with pytest.raises(WorkError) as caught:
        trainer.train()
    step = trainer.counters["step"]
    bad = next(i for i, loss in enumerate(trainer.losses, start=step - len(trainer.losses) + 1) if not loss.isfinite())
    assert f"the loss of step {bad} is not finite" in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.exit_code == 1 and trainer.counters["step"] == max(every, 10)
    assert [folder.name for folder in checkpoint.steps(tmp_path / "b" / "checkpoints")] == [f.name for f in good]
    assert [line["step"] for line in read_record(tmp_path / "b" / "metrics.jsonl")] == []


def test_weights_that_are_not_finite_are_no_checkpoint(data, tmp_path):
    """As after an update that was too large: the loss is of the weights before."""
    trainer = _trainer(data, _config(), tmp_path)
    trainer.step()
    trainer.save()
    trainer.step()
    with torch.no_grad():
        trainer.model.blocks[0].ffn.up_proj.weight[3, 2] = torch.inf
    with pytest.raises(WorkError, match="the weights are not finite after step 2"):
        trainer.save()
    assert [folder.name for folder in checkpoint.steps(tmp_path / "checkpoints")] == ["step_00000001"]


def test_seeds_set_the_order_of_the_data(data, tmp_path):
    ends = []
    for run, seed in enumerate((0, 0, 1)):
        trainer = _trainer(data, _config(seed=seed, steps=3), tmp_path / str(run), init=0)
        trainer.train()
        ends.append(_weights(trainer.model))
    assert _identical(ends[0], ends[1])
    assert not _identical(ends[0], ends[2])


# ---- Evaluation and the end


def _replay(recalls: list[float]):
    values = iter(recalls)
    return lambda model: next(values)


HOPELESS = {"every": 2, "give_up_below": 0.2, "stop_at_recall": None}


@pytest.mark.parametrize(
    ("evaluation", "recalls", "steps", "stopped"),
    [
        ({"every": 2, "stop_at_recall": 0.9}, [0.0, 0.9, 0.89, 1.0, 0.9], 10, "recall"),  # two in a row
        ({"every": 5, "stop_at_recall": 1.0}, [0.0, 0.0, 0.0, 1.0], 20, "budget"),  # the last one alone
        ({"every": 5, "stop_at_recall": None}, [1.0] * 4, 20, "budget"),
        ({"every": None}, [], 20, "budget"),
        (HOPELESS, [0.0] * 4 + [0.5] * 6, 20, "budget"),  # in the first half of the schedule nothing is given up
        (HOPELESS, [0.3, 0.2, 0.1, 0.0, 0.5, 0.0], 12, "hopeless"),
    ],
)
def test_evaluations_decide_when_training_ends(evaluation, recalls, steps, stopped, data, tmp_path):
    outcome = _trainer(data, _config(steps=20, evaluation=evaluation), tmp_path, _replay(recalls)).train()
    assert (outcome.steps, outcome.stopped) == (steps, stopped)
    lines = [(line["step"], line["recall"]) for line in read_record(tmp_path / "metrics.jsonl") if "recall" in line]
    assert lines == [((i + 1) * evaluation["every"], recall) for i, recall in enumerate(recalls)]


# ---- Resuming


class Killed(BaseException):
    """The process is gone."""


def _train_until(trainer: Trainer, step: int) -> None:
    """Train, and die at the beginning of `step`."""
    next_batch = trainer.next_batch

    def next_batch_or_die():
        if trainer.counters["step"] == step:
            raise Killed
        return next_batch()

    trainer.next_batch = next_batch_or_die
    with pytest.raises(Killed):
        trainer.train()


def _everything(trainer: Trainer) -> dict[str, torch.Tensor]:
    """All that the next step depends on, as tensors."""
    state = {f"model.{name}": tensor for name, tensor in _weights(trainer.model).items()}
    for i, optimizer in enumerate(trainer.optimizers):
        saved = optimizer.state_dict()
        for parameter, slots in saved["state"].items():
            state |= {f"optim.{i}.{parameter}.{slot}": value for slot, value in slots.items()}
        for j, group in enumerate(saved["param_groups"]):
            numbers = [group["lr"], group["peak_lr"], group["weight_decay"]]
            state[f"group.{i}.{j}"] = torch.tensor(numbers, dtype=torch.float64)
    counters = {name: value for name, value in trainer.counters.items() if name != "seconds"}
    state["counters"] = torch.tensor(list(counters.values()))
    state["losses"] = torch.stack(trainer.losses)
    state["random"] = torch.get_rng_state()
    return state


@pytest.mark.parametrize(
    ("optimizer", "dtype", "cuda_graph"),
    [("adamw", "float32", False), ("muon", "float32", True), ("muon", "bfloat16", False)],
)
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(data, tmp_path, optimizer, dtype, cuda_graph):
    config = _config(
        optim={"name": optimizer, "warmup_steps": 5, "weight_decay": 0.1},
        evaluation={"every": 6},
        steps=36, checkpoint_every=8, dtype=dtype, grad_accumulation=2,
    )  # fmt: skip

    def evaluate(model) -> float:
        return 0.9 * float(torch.rand(()))  # uses the global random state, which must be restored too

    def trainer(part: str, init: int = 0, seed: int = 5) -> Trainer:
        trainer = _trainer(data, config, tmp_path / part, evaluate, init, cuda_graph=cuda_graph)
        torch.manual_seed(seed)
        return trainer

    whole = trainer("whole")
    expected, state = whole.train(), _everything(whole)
    for step in (3, 14, 24, 25, 35):  # before the first checkpoint, between two, right at one, again, near the end
        _train_until(trainer("parts"), step)
    parts = trainer("parts", init=1, seed=6)
    outcome = parts.train()

    assert _identical(_everything(parts), state)
    assert (outcome.steps, outcome.loss, outcome.dialogs_seen) == (expected.steps, expected.loss, expected.dialogs_seen)
    assert outcome.seconds > 0
    assert ranks.record(tmp_path / "whole") == ranks.record(tmp_path / "parts")
    last = [checkpoint.load(tmp_path / part / "checkpoints" / "step_00000032")[0] for part in ("whole", "parts")]
    assert last[0].keys() == last[1].keys() and _identical(*last)


def test_an_early_end_is_remembered(data, tmp_path):
    config = _config(steps=40, checkpoint_every=2, evaluation={"every": 2})
    first = _trainer(data, config, tmp_path, _replay([1.0, 1.0]))
    outcome = first.train()
    again = _trainer(data, config, tmp_path, _replay([]))
    assert again.train().steps == outcome.steps == 4
    assert _identical(_weights(first.model), _weights(again.model))


def test_the_time_of_all_parts_is_counted(data, tmp_path):
    config = _config(steps=20, checkpoint_every=10)
    first = _trainer(data, config, tmp_path)
    first.counters["seconds"] = 1000.0
    _train_until(first, 15)
    assert _trainer(data, config, tmp_path).train().seconds > 1000


def test_a_checkpoint_from_before_there_was_a_counter_is_resumed(data, tmp_path):
    config = _config(steps=20, checkpoint_every=10)
    first = _trainer(data, config, tmp_path)
    for _ in range(10):
        first.step()
    del first.counters["hopeless"]
    first.save()
    ending = _trainer(data, config, tmp_path).train()
    assert (ending.steps, ending.stopped) == (20, "budget")


def test_a_checkpoint_from_when_rates_were_saved_is_resumed(data, tmp_path, monkeypatch):
    config = _config(steps=20, checkpoint_every=10)
    expected = _trainer(data, config, tmp_path / "whole")
    expected.train()
    save_step = checkpoint.save_step

    def save_with_rates(root, step, tensors, state, *others):
        groups = [[{"lr": 9.0, "params": [0]}]] * 2
        return save_step(root, step, tensors, {**state, "param_groups": groups}, *others)

    monkeypatch.setattr(checkpoint, "save_step", save_with_rates)
    first = _trainer(data, config, tmp_path / "parts")
    for _ in range(10):
        first.step()
    first.save()
    second = _trainer(data, config, tmp_path / "parts")
    second.train()
    assert _identical(_weights(second.model), _weights(expected.model))


FORGED = {
    "another shape": forging.FORGED["another shape"],
    "a weight less": forging.FORGED["a weight less"],
    "no counters": forging.state(lambda state: state | {"counters": None}),
    "a step that is a word": forging.state(lambda state: state | {"counters": state["counters"] | {"step": "ten"}}),
    "a random state that is none": forging.tensors(lambda _, found: found["random.cpu"].zero_()),
}


@pytest.fixture(scope="module")
def half_trained(data, tmp_path_factory) -> Path:
    """The folder of a run with checkpoints after 10 and 20 steps."""
    folder = tmp_path_factory.mktemp("half") / "run"
    _train_until(_trainer(data, _config(optim={"name": "muon"}, steps=30, checkpoint_every=10), folder), 25)
    return folder


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "kind", ["a pipe in place of tensors", "a pipe in place of the state", "a file without a name"]
)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(data, half_trained, tmp_path, kind, capsys):
    shutil.copytree(half_trained, tmp_path / "run")
    forging.FORGED[kind](tmp_path / "run" / "checkpoints" / "step_00000020")
    trainer = _trainer(data, _config(optim={"name": "muon"}, steps=30), tmp_path / "run", init=1)
    trainer.resume()
    told = capsys.readouterr().err
    assert re.match("skipped: the checkpoint .*step_00000020", told)
    assert trainer.counters["step"] == 10 and told.count("\n") == 1 and len(told) < 600
    state = load_file(next((half_trained / "checkpoints" / "step_00000010").glob("*.safetensors")))
    assert all(torch.equal(state[f"model.{name}"], weight) for name, weight in trainer.model.state_dict().items())


@pytest.mark.parametrize("kind", FORGED)
def test_a_checkpoint_that_no_run_wrote_is_refused_in_one_sentence(data, half_trained, tmp_path, kind):
    shutil.copytree(half_trained, tmp_path / "run")
    FORGED[kind](tmp_path / "run" / "checkpoints" / "step_00000020")
    trainer = _trainer(data, _config(optim={"name": "muon"}, steps=30), tmp_path / "run", init=1)
    with pytest.raises(InputError, match="^cannot read the checkpoint .*step_00000020: [^\n]*$"):
        trainer.resume()


def test_moments_that_overflow_do_not_make_a_checkpoint_useless(data, half_trained, tmp_path):
    """A gradient of 10^20 has a square beyond float32; the weights do not suffer."""
    shutil.copytree(half_trained, tmp_path / "run")
    forge = forging.tensors(lambda _, found: found["optim.0.0.exp_avg_sq"].fill_(torch.inf))
    forge(tmp_path / "run" / "checkpoints" / "step_00000020")
    trainer = _trainer(data, _config(optim={"name": "muon"}, steps=30), tmp_path / "run")
    trainer.resume()
    assert trainer.counters["step"] == 20
