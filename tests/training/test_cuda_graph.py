"""Steps for CUDA graphs, as far as a CPU can show them: batches of one shape, rates as tensors. See also tests/gpu."""

import gc
import weakref

import pytest
import torch
from steps import STEPS, VARIANTS, make_trainer

from lib.training.cuda_graph import CudaGraph


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
