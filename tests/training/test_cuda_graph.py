"""Recorded steps, as far as a CPU can show them: batches of one shape, rates as tensors. The rest is in tests/gpu."""

import gc
import weakref
from pathlib import Path

import pytest
import torch

from lib.config import RunConfig
from lib.dialogs.batches import Source
from lib.dialogs.tokenizers import ByteTokenizer
from lib.dialogs.tokens import join, tokenize_people
from lib.facts.sampling import load_people
from lib.model.transformer import Transformer
from lib.training.cuda_graph import Recording
from lib.training.trainer import Lockstep, Trainer, train_together

STEPS = 20
VARIANTS = [
    {"optim": {"weight_decay": 0.1}},
    {"optim": {"name": "adamw", "clip_norm": None, "warmup_steps": 5, "weight_decay": 0.1}},
    {"mode": "in-tool", "training": {"batch_size": 7}},
    {"training": {"grad_accumulation": 3, "batch_size": 11}},
    {"training": {"biographies": 0.3}},
]


def make_trainer(variant: dict, folder: Path, recorded: bool, device: str = "cpu", evaluate=None) -> Trainer:
    """In float64, so that the order of sums is no matter."""
    training = {"steps": STEPS, "batch_size": 12, **variant.get("training", {})}
    config = RunConfig.parse({"facts": {"n_people": 13}, **variant, "model": {"d_model": 8}, "training": training})
    people = load_people(config.facts)
    texts = [config.mode, "biography"] if config.training.biographies else [config.mode]
    parts = [tokenize_people(people, text, ByteTokenizer()) for text in texts]
    shares = [config.training.questions, config.training.biographies]
    sources = [Source(len(part), share) for part, share in zip(parts, shares, strict=False)]
    model = Transformer(config.model, torch.Generator().manual_seed(config.seed)).double().to(device)
    return Trainer(model, join(parts), config, folder, evaluate, sources=sources, recorded=recorded)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_batches_of_one_shape_have_the_losses_of_batches_as_they_are(variant, tmp_path):
    losses, shapes = {}, {}
    for recorded in (False, True):
        trainer = make_trainer(variant, tmp_path / str(recorded), recorded)
        losses[recorded], shapes[recorded] = [], set()
        for _ in range(STEPS):
            parts, _ = trainer.next_batch()
            shapes[recorded] |= {(tuple(p.tokens.shape), tuple(p.targets.shape), p.first) for p in parts}
            trainer.step()
            losses[recorded].append(float(trainer.losses[-1]))
    assert losses[True] == pytest.approx(losses[False], rel=1e-7)
    assert losses[True][0] - losses[True][-1] > 0.2
    assert len(shapes[True]) == 1 < len(shapes[False])


def test_a_stack_of_runs_to_be_recorded_has_the_losses_of_each_alone(tmp_path):
    variants = [{"seed": seed, "facts": {"n_people": 9 + seed}} for seed in range(3)]
    alone = [make_trainer(v, tmp_path / f"a{i}", False).train().loss for i, v in enumerate(variants)]
    together = train_together([make_trainer(v, tmp_path / f"s{i}", True) for i, v in enumerate(variants)])
    assert [ending.loss for ending in together] == pytest.approx(alone, rel=1e-7)


def test_a_run_goes_on_whether_its_steps_were_recorded_or_not(tmp_path):
    """As where a GPU began and a CPU ends."""
    variant = {"training": {"checkpoint_every": 5}}
    expected = make_trainer(variant, tmp_path / "whole", False).train()
    for first in (True, False):
        folder = tmp_path / str(first)
        begun = make_trainer(variant, folder, first)
        for _ in range(10):
            begun.step()
        begun.save()
        begun.finish_saving()
        assert make_trainer(variant, folder, not first).train().loss == pytest.approx(expected.loss, rel=1e-7)


def test_away_from_a_gpu_the_work_is_done_as_it_is():
    seen = []

    def work(inputs):
        seen.append(inputs)
        return [inputs[0] + 1]

    recording = Recording()
    for i in range(6):
        assert recording(work, [torch.tensor(i)]) == [torch.tensor(i + 1)]
    assert len(seen) == 6


@pytest.mark.parametrize("n", [1, 2])
def test_what_ended_leaves_its_memory_at_once(n, tmp_path):
    """Not when Python happens to look for cycles: a GPU's memory would run out before it does."""
    gc.disable()
    try:
        trainers = [make_trainer({"seed": i}, tmp_path / str(i), True) for i in range(n)]
        lockstep = Lockstep(trainers)
        lockstep.step()
        trainers[0].step()
        left = [weakref.ref(each) for each in (lockstep, lockstep.gradients, *trainers)]
        del lockstep, trainers
        assert [each() for each in left] == [None] * len(left)
    finally:
        gc.enable()


def test_only_what_one_process_does_uncompiled_is_recorded(tmp_path):
    trainer = make_trainer({}, tmp_path, False)
    with pytest.raises(ValueError, match="not compiled"):
        Trainer(trainer.model, trainer.data, trainer.config, tmp_path, compiled=True, recorded=True)
