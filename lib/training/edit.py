"""Change what a trained model knows: teach it other facts, or make it forget some (Section 7, our own)."""

import copy
import time
from collections.abc import Callable, Sized
from typing import Any, NamedTuple

import torch
from torch import nn

from lib.config import OptimConfig
from lib.dialogs.tokens import TokenizedDialogs
from lib.model.transformer import Transformer
from lib.training.loss import IGNORED, Batch, batch_loss
from lib.training.optim import build_optimizers

#: Dialogs per step, and as many again of those to keep.
BATCH = 32


class Edited(NamedTuple):
    """An edited model, and the cost of the edit."""

    model: nn.Module
    done: bool  # whether `is_done` held within `max_steps`
    steps: int
    dialogs: int  # trained on, those of `keep` included
    seconds: float  # of the steps alone, without `is_done`


def edit(
    model: nn.Module,
    dialogs: Sized,
    optim: OptimConfig,
    is_done: Callable[[nn.Module], bool],
    *,
    keep: Sized | None = None,
    mean_loss: Callable[[nn.Module, Any, torch.Tensor], torch.Tensor] | None = None,
    forget: bool = False,
    max_steps: int = 1_000,
    look_every: int = 5,
    seed: int = 0,
) -> Edited:
    """Train a copy of a model on some dialogs until `is_done`, asked every `look_every` steps, or for `max_steps`.

    forget: increase the loss of these dialogs instead (gradient ascent). keep: dialogs that the model must not forget:
    every step trains on as many of them. optim: its learning rates are kept constant. mean_loss(model, dialogs, rows):
    that of the dialogs at `rows`; default: of a `Transformer` on `TokenizedDialogs`.
    """
    model, mean_loss = copy.deepcopy(model).train(), mean_loss or _mean_loss
    optimizers = build_optimizers(model, optim)
    draw = torch.Generator().manual_seed(seed)
    steps, n_dialogs, seconds, done = 0, 0, 0.0, False
    while not done and steps < max_steps:
        began = time.monotonic()
        for data, sign in ((dialogs, -1 if forget else 1), (keep, 1)):
            if data is not None:
                rows = torch.randperm(len(data), generator=draw)[:BATCH]
                (sign * mean_loss(model, data, rows)).backward()
                n_dialogs += len(rows)
        nn.utils.clip_grad_norm_(model.parameters(), optim.clip_norm or float("inf"))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        seconds, steps = seconds + time.monotonic() - began, steps + 1
        done = steps % look_every == 0 and is_done(model.eval())
        model.train()
    return Edited(model.eval(), done, steps, n_dialogs, seconds)


def _mean_loss(model: Transformer, data: TokenizedDialogs, rows: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy of the trained tokens of some dialogs, in nats."""
    tokens, mask = data.batch(rows)
    first = int(data.first[rows].min()) - 1
    targets = tokens.masked_fill(~mask, IGNORED)[:, first + 1 :]
    total, n_targets, _ = batch_loss(model, Batch(tokens[:, :-1], targets, first), 0.0)
    return total / n_targets
