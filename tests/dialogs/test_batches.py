"""The order of training."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lib.dialogs.batches import Batches, Source
from lib.dialogs.templates import dialogs
from lib.dialogs.tokenizers import ByteTokenizer
from lib.dialogs.tokens import tokenize
from lib.facts.sampling import sample_people

TOKENIZER = ByteTokenizer()


lengths_lists = st.lists(st.integers(1, 300), min_size=1, max_size=200)


@given(lengths_lists, st.integers(1, 40), st.integers(0, 5), st.integers(0, 3), st.integers(1, 9))
def test_an_epoch_is_a_permutation_cut_into_even_batches(lengths, batch_size, seed, epoch, pool):
    batches = Batches(torch.tensor(lengths), batch_size, seed, pool=pool)
    steps = range(epoch * batches.per_epoch, (epoch + 1) * batches.per_epoch)
    cut = [batches[step] for step in steps]
    assert sorted(torch.cat(cut).tolist()) == list(range(len(lengths)))
    sizes = [len(batch) for batch in cut]
    assert max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1
    assert len(cut) == -(-len(lengths) // batch_size)  # as few as there can be


@given(lengths_lists, st.integers(1, 40), st.integers(0, 5), st.lists(st.integers(0, 60), max_size=12))
def test_the_batch_of_a_step_does_not_depend_on_what_was_asked_before(lengths, batch_size, seed, steps):
    batches = Batches(torch.tensor(lengths), batch_size, seed)
    for step in steps:
        assert torch.equal(batches[step], Batches(torch.tensor(lengths), batch_size, seed)[step])


def _epoch(batches: Batches, epoch: int = 0) -> list[list[int]]:
    return [batches[epoch * batches.per_epoch + i].tolist() for i in range(batches.per_epoch)]


def test_seeds_and_epochs_have_orders_of_their_own():
    lengths = torch.arange(256) % 50
    orders = [_epoch(Batches(lengths, 32, seed), epoch) for seed in range(4) for epoch in range(4)]
    assert len({str(order) for order in orders}) == len(orders)
    assert len({str(sorted(map(sorted, order))) for order in orders}) == len(orders)  # and other company in a batch


def test_every_dialog_is_as_likely_to_come_early_as_late():
    lengths = torch.arange(128)
    when = np.zeros((400, 128))
    for epoch, seen in enumerate(when):
        for i, batch in enumerate(_epoch(Batches(lengths, 8, seed=7), epoch)):
            seen[batch] = i
    # The mean of 400 draws from 0..15 has a standard deviation of 4.6 / 20 around 7.5.
    assert abs(when.mean(0) - 7.5).max() < 5 * 4.6 / 20


@pytest.mark.parametrize(("pool", "is_random"), [(1, True), (8, False)])
def test_batches_of_a_pool_of_one_are_random_whatever_the_lengths(pool, is_random):
    """Four kinds of dialogs, of four lengths: the share of a kind in a batch is hypergeometric."""
    lengths = 50 + torch.arange(1024) % 4
    shares = []
    for seed in range(10):
        for batch in _epoch(Batches(lengths, 32, seed, pool=pool)):
            shares.append(float((lengths[torch.tensor(batch)] == 50).double().mean()))
    spread = math.sqrt(0.25 * 0.75 / 32 * (1024 - 32) / 1023)
    assert np.mean(shares) == pytest.approx(0.25)
    assert (abs(np.std(shares) / spread - 1) < 0.15) == is_random


@pytest.mark.parametrize(("mode", "at_most"), [("in-weight", 0.05), ("in-tool", 0.03)])
def test_little_of_a_batch_is_padding(mode, at_most):
    lengths = tokenize(dialogs(sample_people(1000), mode), TOKENIZER).lengths()
    batches = [lengths[rows] for rows in map(torch.tensor, _epoch(Batches(lengths, 128, seed=0)))]
    padded = sum(len(batch) * int(batch.max()) for batch in batches)
    assert 1 - int(lengths.sum()) / padded < at_most


@given(
    st.lists(st.tuples(st.integers(1, 20), st.floats(0.05, 4)), min_size=1, max_size=4),
    st.integers(1, 16),
    st.integers(0, 3),
)
def test_an_epoch_takes_of_every_source_what_its_weight_asks_for(sources, batch_size, epoch):
    sources = [Source(*source) for source in sources]
    lengths = torch.arange(sum(source.n_dialogs for source in sources))
    batches = Batches(lengths, batch_size, 7, sources)
    rows = [row for batch in _epoch(batches, epoch) for row in batch]
    counts = np.bincount(rows, minlength=len(lengths))
    first = sources[0]
    start = 0
    for n_dialogs, weight in sources:
        part = counts[start : start + n_dialogs]
        assert part.max() - part.min() <= 1  # every dialog as often as any other, as nearly as can be
        assert part.sum() == round(first.n_dialogs * weight / first.weight)
        start += n_dialogs
    assert counts[: first.n_dialogs].tolist() == [1] * first.n_dialogs and len(rows) == batches.n_dialogs


def test_one_source_is_the_dataset_itself():
    lengths = torch.arange(50)
    plain, one = Batches(lengths, 8, 3), Batches(lengths, 8, 3, [Source(50, 0.3)])
    assert _epoch(plain, 2) == _epoch(one, 2)


def test_the_random_rest_of_a_source_changes_from_epoch_to_epoch():
    batches = Batches(torch.ones(40), 8, 0, [Source(20, 1.0), Source(20, 0.5)])
    seen = [{row for batch in _epoch(batches, epoch) for row in batch if row >= 20} for epoch in range(10)]
    assert all(len(rows) == 10 for rows in seen) and set.union(*seen) == set(range(20, 40))
