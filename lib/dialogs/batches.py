"""The order in which dialogs are trained on."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch


class Source(NamedTuple):
    """Consecutive dialogs of a dataset that are drawn more or less often than others."""

    n_dialogs: int
    weight: float  # probability that a dialog is drawn from here, relative to other sources


class Batches:
    """The order in which a dataset is trained on: batch `step` for any step, without state.

    Every epoch is a fresh seeded shuffle, cut into batches of equal size (give or take one dialog), at most
    `batch_size`. Dialogs of similar length share a batch: every `pool` batches together are sorted by length and cut
    again, then the batches are shuffled. That saves padding, but a batch then asks about one or two attributes only,
    and optimizers that normalize their steps, such as Muon, learn worse from it. With a pool of 1, batches are random.

    `sources` make up the dataset, in their order. An epoch is one pass over the first; from each other source
    it takes dialogs in proportion to its weight: full passes, and a random choice for the rest.
    """

    def __init__(
        self, lengths: torch.Tensor, batch_size: int, seed: int, sources: Sequence[Source] = (), pool: int = 8
    ):
        self.lengths, self.pool = lengths.cpu(), pool
        self.seed = seed
        sources = sources or [Source(len(lengths), 1.0)]
        starts = accumulate((source.n_dialogs for source in sources), initial=0)
        self._parts = [  # first row, how many dialogs there are, and how many of them an epoch takes
            (start, n, round(sources[0].n_dialogs * weight / sources[0].weight))
            for start, (n, weight) in zip(starts, sources, strict=False)
        ]
        #: Number of dialogs per epoch.
        self.n_dialogs = sum(count for *_, count in self._parts)
        self.per_epoch = -(-self.n_dialogs // batch_size)
        # Two epochs are kept: reading ahead may have begun the next one.
        self._batches = lru_cache(maxsize=2)(self._shuffle)

    def __getitem__(self, step: int) -> torch.Tensor:
        """Return the rows (B,) of the dataset that make the batch of `step`, counted from 0."""
        epoch, batch = divmod(step, self.per_epoch)
        return self._batches(epoch)[batch]

    def _shuffle(self, epoch: int) -> list[torch.Tensor]:
        rng = np.random.default_rng([self.seed, epoch])
        rows = np.concatenate([start + _take(n, count, rng) for start, n, count in self._parts])
        batches = list(torch.from_numpy(rng.permutation(rows)).tensor_split(self.per_epoch))
        for start in range(0, self.per_epoch, self.pool):
            pool = slice(start, start + self.pool)
            sizes = [len(batch) for batch in batches[pool]]
            rows = torch.cat(batches[pool])
            batches[pool] = rows[self.lengths[rows].argsort(stable=True)].split(sizes)
        return [batches[i] for i in rng.permutation(self.per_epoch)]


def _take(n: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """Return `count` of the numbers below `n`: some full passes, and a random choice for the rest."""
    passes, rest = divmod(count, n)
    return np.concatenate([*[np.arange(n)] * passes, rng.choice(n, rest, replace=False)])
