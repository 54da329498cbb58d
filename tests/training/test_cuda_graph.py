"""Steps for CUDA graphs, as far as a CPU can show them: batches of one shape, rates as tensors. See also tests/gpu."""

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
from lib.training.cuda_graph import CudaGraph
from lib.training.trainer import Trainer

STEPS = 20
VARIANTS = [
    {"optim": {"weight_decay": 0.1}},
    {"optim": {"name": "adamw", "clip_norm": None, "warmup_steps": 5, "weight_decay": 0.1}},
    {"mode": "in-tool", "training": {"batch_size": 7}},
    {"training": {"grad_accumulation": 3, "batch_size": 11}},
    {"training": {"biographies": 0.3}},
]


def make_trainer(variant: dict, folder: Path, cuda_graph: bool, device: str = "cpu", evaluate=None) -> Trainer:
    """In float64, so that the order of sums is no matter."""
    training = {"steps": STEPS, "batch_size": 12, **variant.get("training", {})}
    config = RunConfig.parse({"facts": {"n_people": 13}, **variant, "model": {"d_model": 8}, "training": training})
    people = load_people(config.facts)
    texts = [config.mode, "biography"] if config.training.biographies else [config.mode]
    parts = [tokenize_people(people, text, ByteTokenizer()) for text in texts]
    shares = [config.training.questions, config.training.biographies]
    sources = [Source(len(part), share) for part, share in zip(parts, shares, strict=False)]
    model = Transformer(config.model, torch.Generator().manual_seed(config.seed)).double().to(device)
    return Trainer(model, join(parts), config, folder, evaluate, sources=sources, cuda_graph=cuda_graph)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_batches_of_one_shape_have_the_losses_of_batches_as_they_are(variant, tmp_path):
    losses, shapes = {}, {}
    for padded in (False, True):
        trainer = make_trainer(variant, tmp_path / str(padded), padded)
        losses[padded], shapes[padded] = [], set()
        for _ in range(STEPS):
            parts, _ = trainer.next_batch()
            shapes[padded] |= {(tuple(p.tokens.shape), tuple(p.targets.shape), p.first) for p in parts}
            trainer.step()
            losses[padded].append(float(trainer.losses[-1]))
    assert losses[True] == pytest.approx(losses[False], rel=1e-7)
    assert losses[True][0] - losses[True][-1] > 0.2
    assert len(shapes[True]) == 1 < len(shapes[False])


def test_a_run_goes_on_with_or_without_a_cuda_graph(tmp_path):
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


def test_away_from_a_gpu_nothing_is_captured():
    graph = CudaGraph()
    for i in range(6):
        with graph.capture([torch.tensor(i)]) as (held,):
            assert held == i and not graph.is_captured


def test_a_trainer_leaves_its_memory_at_once(tmp_path):
    """Not when Python happens to look for cycles: a GPU's memory would run out before it does."""
    gc.disable()
    try:
        trainer = make_trainer({}, tmp_path, True)
        trainer.step()
        left = weakref.ref(trainer)
        del trainer
        assert left() is None
    finally:
        gc.enable()


def test_only_what_one_process_does_uncompiled_is_captured(tmp_path):
    trainer = make_trainer({}, tmp_path, False)
    with pytest.raises(ValueError, match="not compiled"):
        Trainer(trainer.model, trainer.data, trainer.config, tmp_path, compiled=True, cuda_graph=True)
