"""Probes: the moments are those of the tensors that modules put out, and training does not notice them."""

import math
from collections import defaultdict

import numpy as np
import pytest
import ranks
import torch
from hypothesis import given
from hypothesis import strategies as st

from lib.base import InputError
from lib.config import UNOBSERVED, ModelConfig, Observers
from lib.model.transformer import Transformer
from lib.training.monitor import read_record
from lib.training.probes import MOMENTS, moments, probe
from lib.training.run import run

STEPS = 12
TOKENS = torch.randint(260, (6, 9), generator=torch.Generator().manual_seed(1))


def _model() -> Transformer:
    return Transformer(ModelConfig(d_model=8), torch.Generator().manual_seed(0))


def _moments(tensor: torch.Tensor) -> list[float]:
    return moments(tensor).tolist()


def _by_definition(values: np.ndarray) -> list[float]:
    """Standardized, then the means of powers."""
    values = values.astype(np.float64).ravel()
    z = (values - values.mean()) / values.std()
    return [values.mean(), values.std(), (z**3).mean(), (z**4).mean() - 3]


# ---- Moments


@pytest.mark.parametrize(("ones", "n"), [(1, 2), (1, 100), (37, 100)])
def test_moments_of_zeros_and_ones_are_those_of_a_biased_coin(ones, n):
    p = ones / n
    variance = p * (1 - p)
    expected = [p, variance**0.5, (1 - 2 * p) / variance**0.5, (1 - 6 * variance) / variance]
    assert _moments((torch.arange(n) < ones).float()) == pytest.approx(expected, abs=1e-12)


def test_moments_of_equally_spaced_numbers_are_those_of_a_discrete_uniform_distribution():
    n = 1000
    expected = [(n - 1) / 2, ((n * n - 1) / 12) ** 0.5, 0, -6 / 5 * (n * n + 1) / (n * n - 1)]
    assert _moments(torch.arange(n).float()) == pytest.approx(expected, abs=1e-9)


@given(
    st.lists(st.integers(-1000, 1000), min_size=2, max_size=50).filter(lambda values: len(set(values)) > 1),
    st.integers(-10, 10).map(lambda exponent: 2.0**exponent),
    st.integers(-(10**6), 10**6),
)
def test_moments_are_those_of_the_definition(values, scale, shift):
    array = np.array(values, dtype=np.float64) * scale + shift
    assert _moments(torch.from_numpy(array)) == pytest.approx(_by_definition(array), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.1, -3e8])
def test_a_constant_has_no_shape(value):
    mean, std, skew, kurtosis = _moments(torch.full((1001,), value))
    assert (mean, std) == pytest.approx((torch.tensor(value).item(), 0), abs=1e-7)
    assert math.isnan(skew) and math.isnan(kurtosis)


# ---- Of a model


def _backward(model: Transformer, tokens: torch.Tensor) -> None:
    model(tokens).logsumexp(-1).sum().backward()


def test_every_output_and_its_gradient_is_probed_in_all_passes_together():
    model, kept = _model(), defaultdict(list)

    def keep(name: str, output: torch.Tensor) -> None:
        output.retain_grad()
        kept[name].append(output)

    for name, module in model.named_modules():
        if name:
            module.register_forward_hook(lambda _, __, output, name=name: keep(name, output))
    with probe(model) as rows:
        for part in TOKENS.split(4):  # of four rows and of two
            _backward(model, part)
    assert set(kept) == {name for name, _ in model.named_modules()} - {"", "blocks"}
    assert {(row["tensor"], row["of"]) for row in rows} == {(n, of) for n in kept for of in ("output", "gradient")}
    assert len(rows) == 2 * len(kept)
    for row in rows:
        tensors = [output if row["of"] == "output" else output.grad for output in kept[row["tensor"]]]
        expected = _by_definition(np.concatenate([tensor.detach().numpy().ravel() for tensor in tensors]))
        assert [row[moment] for moment in MOMENTS] == pytest.approx(expected, rel=1e-6, abs=1e-9), row


def test_only_passes_that_record_gradients_count():
    model = _model()
    with probe(model) as alone:
        _backward(model, TOKENS)
    with probe(model) as beside:
        with torch.no_grad():
            model(TOKENS[:2])
        _backward(model, TOKENS)
        with torch.inference_mode():
            model(TOKENS[:3])
    assert beside == alone
    with torch.no_grad(), probe(model) as nothing:
        model(TOKENS)
    assert nothing == []


def test_what_has_no_shape_is_none_for_json_has_no_nan():
    model = _model()
    with probe(model) as rows:
        (0 * model(TOKENS)).sum().backward()
    gradients = [row for row in rows if row["of"] == "gradient"]
    assert gradients and all((row["std"], row["skew"], row["kurtosis"]) == (0, None, None) for row in gradients)


def _hooks(model: Transformer) -> list:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [hook for module in model.modules() for kind in kinds for hook in getattr(module, kind).values()]


def test_hooks_are_there_within_and_gone_afterwards_even_after_an_error():
    model = _model()
    with probe(model):
        assert len(_hooks(model)) > 0
    assert _hooks(model) == []
    with pytest.raises(ZeroDivisionError), probe(model):
        raise ZeroDivisionError
    assert _hooks(model) == []


# ---- Of a run


def _train(directory, observers: Observers, evaluate=None):
    config = ranks.config(steps=STEPS, checkpoint_every=5)
    trainer = ranks.trainer(
        config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"every": 4})}), directory
    )
    trainer.evaluate = evaluate or (lambda model: float(model(TOKENS).detach().mean() > 9))
    trainer.train(observers=observers)
    return trainer


def test_training_is_bit_for_bit_the_same_with_and_without(tmp_path):
    without, with_ = _train(tmp_path / "without", UNOBSERVED), _train(tmp_path / "with", Observers(probe_every=1))
    assert all(map(torch.equal, without.model.parameters(), with_.model.parameters()))
    assert ranks.record(tmp_path / "without") == ranks.record(tmp_path / "with")
    assert not (tmp_path / "without" / "probes.jsonl").exists()
    assert _hooks(with_.model) == []


def test_readings_are_of_the_weights_after_so_many_steps(tmp_path):
    trained = _train(tmp_path, Observers(probe_every=5))
    rows = read_record(tmp_path / "probes.jsonl")
    assert sorted({row["step"] for row in rows}) == [0, 5, 10]
    fresh = ranks.trainer(ranks.config(steps=STEPS), tmp_path / "fresh")
    with probe(fresh.model) as first:
        fresh.step()
    assert [{"step": 0, **row} for row in first] == [row for row in rows if row["step"] == 0]
    assert {row["tensor"] for row in rows} == {n for n, _ in trained.model.named_modules()} - {"", "blocks"}


@pytest.mark.parametrize("killed_after", [4, 8])
def test_the_record_of_a_run_that_was_killed_is_that_of_one_that_was_not(tmp_path, killed_after):
    class Killed(BaseException):
        pass

    calls = []

    def evaluate(_) -> float:
        calls.append(None)
        if 4 * len(calls) == killed_after:
            raise Killed
        return 0.0

    _train(tmp_path / "whole", Observers(probe_every=2), lambda _: 0.0)
    with pytest.raises(Killed):
        _train(tmp_path / "killed", Observers(probe_every=2), evaluate)
    _train(tmp_path / "killed", Observers(probe_every=2), lambda _: 0.0)
    records = [read_record(tmp_path / name / "probes.jsonl") for name in ("whole", "killed")]
    assert records[0] == records[1]


def test_probed_runs_are_not_compiled(tmp_path, monkeypatch):
    monkeypatch.setattr("lib.training.run._pays_to_compile", lambda *_: pytest.fail("compiling was thought of"))
    run(ranks.config(steps=1), tmp_path / "run", observers=Observers(probe_every=1))
    assert read_record(tmp_path / "run" / "probes.jsonl")


def test_what_cannot_be_probed_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="a single process"):
        run(ranks.config(), tmp_path / "a", observers=Observers(probe_every=1))
    assert list(tmp_path.iterdir()) == []
