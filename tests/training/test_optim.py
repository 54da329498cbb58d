"""Optimizers and schedules against closed forms, and against torch's own schedulers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lib.config import ModelConfig, OptimConfig
from lib.model.transformer import Transformer
from lib.training.optim import build_optimizers, orthogonalize, schedule_factor, set_learning_rate


def _model() -> Transformer:
    return Transformer(ModelConfig(d_model=8), torch.Generator().manual_seed(0))


def _set_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def _weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def _is_norm(name: str) -> bool:
    return name.endswith("norm.weight")


def _is_hidden_matrix(name: str) -> bool:
    return name.startswith("blocks.") and not _is_norm(name)


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("shape", [{"d_model": 8}, {"d_model": 16, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2}])
def test_every_parameter_is_in_exactly_one_group(name, shape):
    model = Transformer(ModelConfig(**shape))
    optimizers = build_optimizers(model, OptimConfig(name=name))
    held = [id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(map(id, model.parameters()))


def test_muon_takes_the_hidden_matrices_and_adamw_the_rest():
    model = _model()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    adamw, muon = build_optimizers(model, OptimConfig(name="muon"))
    assert isinstance(adamw, torch.optim.AdamW) and isinstance(muon, torch.optim.Muon)
    held = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    assert held == {name for name in names.values() if _is_hidden_matrix(name)}
    assert len(held) == 2 * 7


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize(("decay_norms", "of_norms"), [(False, 0.0), (True, 0.3)])
def test_weight_decay_spares_the_norms_unless_asked_and_nothing_else(name, decay_norms, of_norms):
    model = _model()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for optimizer in build_optimizers(model, OptimConfig(name=name, weight_decay=0.3, decay_norms=decay_norms)):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                assert group["weight_decay"] == (of_norms if _is_norm(names[id(parameter)]) else 0.3)


@pytest.mark.parametrize(("factor", "decay"), [(1.0, 0.0), (1.0, 0.1), (0.25, 0.1)])
def test_the_first_step_of_adamw_is_the_closed_form(factor, decay):
    # With bias correction the moments of the first step are g and g^2: w <- w (1 - lr decay) - lr g / (|g| + eps).
    model, config = _model(), OptimConfig(name="adamw", lr=0.01, weight_decay=decay)
    optimizers = build_optimizers(model, config)
    before, gradients = _weights(model), _set_gradients(model)
    set_learning_rate(optimizers, factor)
    for optimizer in optimizers:
        optimizer.step()
    lr = factor * 0.01
    for name, after in _weights(model).items():
        shrunk = before[name] * (1 - lr * (0.0 if _is_norm(name) else decay))
        expected = shrunk - lr * gradients[name] / (gradients[name].abs() + 1e-8)
        torch.testing.assert_close(after, expected, rtol=1e-6, atol=1e-7)


def test_the_second_step_of_adamw_is_the_closed_form():
    config = OptimConfig(name="adamw", lr=0.01, beta1=0.8, beta2=0.9)
    model = _model()
    optimizers = build_optimizers(model, config)
    first = _set_gradients(model)
    for optimizer in optimizers:
        optimizer.step()
    before = _weights(model)
    for name, parameter in model.named_parameters():
        parameter.grad = first[name] * 3 - 1
    for optimizer in optimizers:
        optimizer.step()
    for name, after in _weights(model).items():
        g1, g2 = first[name].double(), (first[name] * 3 - 1).double()
        mean = (0.8 * 0.2 * g1 + 0.2 * g2) / (1 - 0.8**2)
        square = (0.9 * 0.1 * g1**2 + 0.1 * g2**2) / (1 - 0.9**2)
        expected = before[name].double() - 0.01 * mean / (square.sqrt() + 1e-8)
        torch.testing.assert_close(after.double(), expected, rtol=1e-5, atol=1e-6)


def test_the_first_step_of_muon_is_nearly_the_orthogonal_part_of_the_gradient():
    model, config = _model(), OptimConfig(name="muon", muon_lr=0.1)
    optimizers = build_optimizers(model, config)
    before, gradients = _weights(model), _set_gradients(model)
    parts = {}
    for name, parameter in model.named_parameters():
        if _is_hidden_matrix(name):
            left, _, right = parts[name] = torch.linalg.svd(gradients[name], full_matrices=False)
            parameter.grad = left @ torch.linspace(1, 3, len(right)).diag() @ right
    for optimizer in optimizers:
        optimizer.step()
    for name, (left, _, right) in parts.items():
        rows, columns = before[name].shape
        step = (before[name] - model.get_parameter(name).detach()) / (0.1 * math.sqrt(max(1, rows / columns)))
        # Newton-Schulz brings all singular values near 1 and leaves the singular vectors as they were.
        inside = left.T @ step @ right.T
        assert (inside.diagonal() - 1).abs().max() < 0.4, name
        assert (inside - inside.diagonal().diag()).abs().max() < 0.05, name


def test_muon_steps_as_pytorchs_own_which_rounds_to_bfloat16():
    ours, theirs = _model(), _model()
    config = OptimConfig(name="muon", weight_decay=0.1)
    _, muon = build_optimizers(ours, config)
    matrices = [theirs.get_parameter(name) for name, _ in theirs.named_parameters() if _is_hidden_matrix(name)]
    reference = torch.optim.Muon(matrices, lr=config.muon_lr, weight_decay=0.1)
    generator = torch.Generator().manual_seed(7)
    for _ in range(4):
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        muon.step()
        reference.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=4 * 0.02 * 0.03)  # four steps of 0.02, 3 % of each


def test_each_optimizer_follows_its_own_peak_rate():
    optimizers = build_optimizers(_model(), OptimConfig(name="muon", lr=0.004, muon_lr=0.02))
    set_learning_rate(optimizers, 0.5)
    set_learning_rate(optimizers, 0.25)
    adamw, muon = ({group["lr"] for group in optimizer.param_groups} for optimizer in optimizers)
    assert (adamw, muon) == ({0.001}, {0.005})


# ---- Schedules

SCHEDULES = st.builds(
    OptimConfig, schedule=st.sampled_from(["cosine", "linear", "constant"]), warmup_steps=st.integers(0, 30)
)


def _closed_form(config: OptimConfig, step: int, total: int) -> float:
    warmup = config.warmup_steps
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "linear":
        return (total - step) / (total - warmup)
    return math.cos(math.pi / 2 * (step - warmup) / (total - warmup)) ** 2  # (1 + cos 2x) / 2 = cos^2 x


@given(SCHEDULES, st.integers(1, 200), st.data())
def test_the_schedule_is_the_closed_form_and_never_zero(config, total, data):
    step = data.draw(st.integers(0, total - 1))
    factor = schedule_factor(config, step, total)
    assert 0 < factor <= 1
    assert factor == pytest.approx(_closed_form(config, step, total), abs=1e-12)


@pytest.mark.parametrize(
    ("schedule", "torchs"),
    [
        ("cosine", lambda optimizer, total: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=total)),
        ("linear", lambda optimizer, total: torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total)),
    ],
)
@given(total=st.integers(2, 100))
def test_schedules_without_warmup_are_those_of_torch(schedule, torchs, total):
    config = OptimConfig(schedule=schedule)
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scheduler = torchs(optimizer, total)
    for step in range(total):
        assert schedule_factor(config, step, total) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 32, 8), (2, 8, 32), (1, 1, 5)])
def test_orthogonalizing_keeps_the_singular_vectors_and_levels_the_values(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, _, vt = torch.linalg.svd(matrices, full_matrices=False)
    levelled = u.mT @ orthogonalize(matrices) @ vt.mT
    values = levelled.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(levelled, torch.diag_embed(values), rtol=0, atol=1e-9)
    assert values.min() > 0.4 and values.max() < 1.3


def test_a_gradient_of_zero_moves_nothing():
    assert not orthogonalize(torch.zeros(2, 4, 8)).any()
