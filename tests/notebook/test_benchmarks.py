"""The measurements measure what they say, and the contenders do the same work."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import benchmarks
from lib import paths
from lib.agent.tools import SqlTool
from lib.config import RunConfig
from lib.dialogs.tokenizers import ByteTokenizer
from lib.dialogs.tokens import tokenize_people
from lib.facts.database import write_database
from lib.facts.sampling import load_people, sample_people
from lib.training.saved import load_model


def test_contenders_take_turns_and_the_first_round_does_not_count(monkeypatch):
    calls, now = [], [0.0]
    monkeypatch.setattr(benchmarks, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def contender(name: str, seconds: float, units: int):
        def work() -> int:
            calls.append(name)
            now[0] += 20 if len(calls) <= 2 else seconds * len(calls)  # a slow first round, for compiling say
            return units

        return work

    table = benchmarks.take_turns({"fast": contender("fast", 0.01, 5), "slow": contender("slow", 0.04, 2)}, rounds=3)
    assert calls == ["fast", "slow"] * 4
    fast, slow = table.itertuples()
    # Rounds of 3, 5, 7 and 4, 6, 8 times the seconds.
    assert (fast.contender, fast.most, fast.per_second, fast.least) == (
        "fast",
        *(pytest.approx(500 / k) for k in (3, 5, 7)),
    )
    assert (slow.contender, slow.most, slow.per_second, slow.least) == (
        "slow",
        *(pytest.approx(50 / k) for k in (4, 6, 8)),
    )


def test_training_throughput_counts_dialogs_of_both():
    table = benchmarks.training_throughput("in-weight", 8, batch_size=16, steps=1, rounds=1, compiled=False)
    assert list(table.contender) == ["ours", "Hugging Face"]
    assert (table.per_second > 0).all() and table.share_of_peak.between(0, 1).all()


def test_the_loop_to_compare_with_learns_as_ours_does(tmp_path):
    """Same model, same optimizer: after as many passes over few dialogs both know them about as well."""
    config = RunConfig.parse({
        "facts": {"n_people": 4}, "model": {"d_model": 16}, "training": {"batch_size": 16, "steps": 60},
        "optim": {"name": "adamw", "lr": 1e-2, "schedule": "constant", "clip_norm": None},
        "evaluation": {"every": None},
    })  # fmt: skip
    data = tokenize_people(load_people(config.facts), "in-weight", ByteTokenizer())
    trainer = benchmarks._trainer(config, tmp_path, data)
    losses = []
    their_loss = torch.nn.functional.cross_entropy

    def spy(*arguments, **options):
        result = their_loss(*arguments, **options)
        losses.append(result.item())
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "cross_entropy", spy)
        assert benchmarks._their_steps(config, data, 60)() == 60 * 16
    trainer.train()
    assert losses[0] == pytest.approx(6, abs=1) and losses[-1] < 0.5
    assert losses[-1] == pytest.approx(float(trainer.losses[-1]), abs=0.1)


def test_hugging_face_generate_agrees_with_our_verdicts():
    model, config = load_model(paths.CHECKPOINTS / "in-weight", "cpu")
    known = list(load_people(config.facts).facts())[:12]
    unknown = list(sample_people(3, seed=99).facts())
    table = benchmarks.recall_throughput(model, known + unknown, rounds=1)
    assert set(table.contender) == {"ours, verifying", "ours, decoding", "Hugging Face"}
    assert table.same_verdicts.all() and (table.recall == 12 / 24).all()


def test_recall_of_an_in_tool_model_is_measured_with_a_tool(tmp_path):
    model, config = load_model(paths.CHECKPOINTS / "in-tool", "cpu")
    people = load_people(config.facts)
    write_database(people, tmp_path / "people.sqlite")
    with SqlTool(tmp_path / "people.sqlite") as tool:
        table = benchmarks.recall_throughput(model, list(people.facts())[:12], tool, rounds=1)
    assert list(table.contender) == ["ours, verifying", "ours, decoding"]
    assert table.same_verdicts.all()


def test_a_learning_curve_keeps_the_models_on_its_way():
    config = RunConfig.parse({
        "facts": {"n_people": 2}, "model": {"d_model": 16}, "training": {"steps": 300},
        "evaluation": {"every": 20},
    })  # fmt: skip
    curve, (half, full) = benchmarks.learning_curve(config)
    assert list(curve.steps) == list(range(20, curve.steps.iloc[-1] + 1, 20))
    assert curve.seconds.is_monotonic_increasing and curve.recall.iloc[-2:].eq(1).all()
    facts = list(load_people(config.facts).facts())
    recalls = [benchmarks.measure_recall(model, facts, ByteTokenizer()).overall for model in (half, full)]
    first = [curve.recall[curve.recall >= level].iloc[0] for level in (0.5, 1.0)]
    assert recalls == first


def test_growth_states_the_memory_of_the_dialogs():
    table = benchmarks.growth([2, 8], d_model=8, steps=1, rounds=1)
    tokens = [int(tokenize_people(sample_people(n), "in-weight", ByteTokenizer()).offsets[-1]) for n in (2, 8)]
    # int16 tokens and a bool mask; int64 offsets, numbers of trained tokens and places of the first
    assert np.allclose(1e6 * table.megabytes, [3 * t + 8 * (12 * n + 1) for t, n in zip(tokens, (2, 8), strict=True)])
    assert list(table.n_facts) == [8, 32] and (table.microseconds == 1e6 / table.per_second).all()


@pytest.mark.slow
def test_a_cold_start_is_a_whole_run():
    row = benchmarks.cold_start(
        RunConfig.parse({"facts": {"n_people": 2}, "model": {"d_model": 8}, "training": {"steps": 3}})
    )
    assert row["steps"] == 3 and row["wall_seconds"] > row["train_seconds"]
