"""Editing a trained model: it learns or forgets what it is told to, and the model it came from stays."""

import copy
import itertools

import pytest
import torch
from small_models import build

from lib.config import ModelConfig, OptimConfig
from lib.dialogs.templates import in_weight_dialog
from lib.dialogs.tokenizers import ByteTokenizer
from lib.dialogs.tokens import tokenize
from lib.evaluation.recall import bits_of_dialogs, measure_recall
from lib.facts.sampling import sample_people
from lib.training.edit import BATCH, edit

TOKENIZER = ByteTokenizer()
FACTS = list(sample_people(2).facts())
SOME, OTHERS = (tokenize([in_weight_dialog(*fact) for fact in facts], TOKENIZER) for facts in (FACTS[:2], FACTS[2:]))
OPTIM = OptimConfig(lr=0.005, muon_lr=0.01)


def bits(model, dialogs) -> float:
    return bits_of_dialogs(model, dialogs).mean()


@pytest.fixture(scope="module")
def model():
    return build(ModelConfig(d_model=16)).eval()


def test_it_trains_until_it_is_done_and_counts_what_that_took(model):
    before = copy.deepcopy(model.state_dict())
    edited = edit(model, SOME, OPTIM, lambda m: measure_recall(m, FACTS[:2], TOKENIZER).overall == 1, max_steps=400)
    assert edited.done and measure_recall(edited.model, FACTS[:2], TOKENIZER).overall == 1
    assert edited.steps % 5 == 0 and edited.dialogs == 2 * edited.steps and edited.seconds > 0
    assert all(map(torch.equal, before.values(), model.state_dict().values()))


def test_it_stops_after_its_steps_and_says_that_it_is_not_done(model):
    edited = edit(model, SOME, OPTIM, lambda _: False, max_steps=7)
    assert (edited.done, edited.steps) == (False, 7)


def test_forgetting_raises_the_loss_and_keeping_others_lowers_theirs(model):
    looked = itertools.count()
    edited = edit(model, SOME, OPTIM, lambda _: next(looked) < 0, keep=OTHERS, forget=True, max_steps=20)
    assert bits(edited.model, SOME) > bits(model, SOME) and bits(edited.model, OTHERS) < bits(model, OTHERS)
    assert next(looked) == 4 and edited.dialogs == 20 * len(FACTS)


def test_the_seed_decides_the_weights(model):
    many = tokenize([in_weight_dialog(*fact) for fact in sample_people(BATCH).facts()], TOKENIZER)
    weights = [
        edit(model, many, OPTIM, lambda _: False, max_steps=2, seed=seed).model.embedding.weight for seed in (0, 0, 1)
    ]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
